//! Super-packets: data that a pod sends in one piece and that the kernel segments later.

use std::{io::Write as _, net::UdpSocket, os::fd::AsRawFd as _};

use imds_tests::{
    METADATA, Pod, PodLink, TestEnv,
    probe::{LONG, connect, http_exchange, reachable},
};

use crate::{ALL, TC_HOOKS};

const SEGMENT: u16 = 1200;
const SEGMENTS: u16 = 10;

/// Sends ten datagrams in one call.
fn send_segments(env: &TestEnv, pod: &Pod) {
    let socket = pod.netns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    let size = libc::c_int::from(SEGMENT);
    let length = libc::socklen_t::try_from(size_of_val(&size)).unwrap();
    // SAFETY: the option takes a C int, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const size).cast(),
            length,
        )
    };
    assert_eq!(result, 0, "UDP_SEGMENT: {}", std::io::Error::last_os_error());
    // The socket hook denies the call if it is on.
    let _ = env.in_cgroup(|| socket.send_to(&[0; (SEGMENT * SEGMENTS) as usize], (METADATA, 9999)));
}

#[test]
fn segmented_udp() {
    for link in [PodLink::Routed, PodLink::Bridged] {
        let env = TestEnv::new();
        let pod = env.add_pod(link);
        env.vectors(&ALL).one_vector("UDP_SEGMENT", || send_segments(&env, &pod)).assert_blocked_all();
        // The hook counts one packet larger than the link's MTU. If the kernel segments before a veth, as Linux 5.10
        // does, it counts one packet per segment.
        for hook in TC_HOOKS {
            let _agent = env.agent().hooks(&[hook]).spawn_ready();
            let before = env.status().total.denied;
            send_segments(&env, &pod);
            let after = env.status_when("all segments are counted", |status| {
                status.total.denied.bytes - before.bytes > u64::from(SEGMENT * SEGMENTS)
            });
            let packets = after.total.denied.packets - before.packets;
            assert!([1, u64::from(SEGMENTS)].contains(&packets), "{hook}: {packets}");
        }
        env.unload();
    }
}

/// Writes as much as possible on a connection from before the agent. All of it is retransmitted and denied.
#[test]
fn segmented_tcp() {
    for hook in TC_HOOKS {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        assert!(reachable(&pod.netns, METADATA));
        let mut stream = pod.netns.run(|| connect(METADATA, LONG)).unwrap();
        let mut after = pod.netns.run(|| connect(METADATA, LONG)).unwrap();
        stream.set_nonblocking(true).unwrap();
        let agent = env.agent().hooks(&[hook]).spawn_ready();
        let before = env.received_packets();
        assert!(stream.write(&vec![b'x'; 64 << 10]).unwrap() > 10_000);
        let status = env.status_when("super-packets are counted", |status| {
            let denied = status.total.denied;
            denied.bytes > denied.packets * 1514
        });
        assert_eq!(env.received_packets(), before, "{status:?}");
        drop(agent);
        env.unload();
        // Another connection from before the agent still works.
        http_exchange(&mut after, LONG).unwrap();
    }
}
