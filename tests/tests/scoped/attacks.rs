//! Attempts of a pod with a scoped exemption to reach the endpoint without the broker.

use std::{
    io,
    net::{SocketAddr, SocketAddrV4, TcpStream},
    os::fd::{AsRawFd as _, FromRawFd as _},
};

use imds_tests::{
    METADATA, PodLink, TestEnv, packets,
    probe::{SHORT, icmp_echo, send_ipv4, udp_echo},
    skip, skip_without_netns_cookie,
};
use io_uring::{IoUring, opcode, types::Fd};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrLike as _, connect,
    sendto, socket,
};

use crate::{ALLOWED, IMDS, REFUSED, assert_scoped, exchange, get, get_with, start};

/// `IPPROTO_MPTCP` (include/uapi/linux/in.h).
const MPTCP: i32 = 262;

#[test]
fn other_ways_to_the_endpoint_are_denied() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = start(&env, &pod);
    env.assert_nothing_arrives(|| {
        for port in [53, 8080, 443] {
            let denied = get(&env, &pod.netns, (METADATA, port).into(), ALLOWED);
            assert_eq!(denied.unwrap_err().kind(), io::ErrorKind::PermissionDenied, "port {port}");
        }
        assert!(!env.in_cgroup(|| udp_echo(&pod.netns, METADATA, SHORT).is_answer()));
        assert!(!icmp_echo(&pod.netns, METADATA, SHORT).is_answer());
        let raw = [packets::syn(pod.address, METADATA, 40_000, 1), packets::udp(pod.address, METADATA, b"x")];
        // The pod's own packets, and those of a process outside of the cgroup of the socket hook.
        send_ipv4(&pod.netns, METADATA, &raw).unwrap();
        env.in_cgroup(|| send_ipv4(&pod.netns, METADATA, &raw)).unwrap();
        let outside = pod.netns.run(|| TcpStream::connect_timeout(&IMDS, SHORT));
        assert!(outside.is_err(), "a socket without the socket hook");
        // sendto(2) with MSG_FASTOPEN connects without the hook of connect(2).
        let fast = env.in_cgroup(|| {
            pod.netns.run(|| {
                let client = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK, None)?;
                let to = SockaddrIn::from(SocketAddrV4::new(METADATA, 80));
                sendto(
                    client.as_raw_fd(),
                    b"GET /metadata/identity HTTP/1.0\r\n\r\n",
                    &to,
                    MsgFlags::from_bits_retain(libc::MSG_FASTOPEN),
                )
            })
        });
        println!("MSG_FASTOPEN: {fast:?}");
    });
    assert_scoped(&env, &pod.netns, IMDS);
}

#[test]
fn listener_serves_direct_connections_alike() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let [pod, other] = [(); 2].map(|()| env.add_pod(PodLink::Routed));
    let _agent = start(&env, &pod);
    // The hook of getpeername(2) does not see sockets outside of the cgroup.
    let listener = listener_of(&env, &pod.netns);
    assert!(listener.ip().is_loopback());
    assert_eq!(get(&env, &pod.netns, listener, ALLOWED).unwrap(), 200);
    assert_eq!(get(&env, &pod.netns, listener, REFUSED).unwrap(), 403);
    // Another pod has another loopback interface.
    assert!(get(&env, &other.netns, listener, ALLOWED).is_err());
    assert!(get(&env, &other.netns, (pod.address, listener.port()).into(), ALLOWED).is_err());
}

/// Returns the address of the listener in the namespace.
fn listener_of(env: &TestEnv, netns: &imds_tests::Netns) -> SocketAddr {
    let is_listener = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, _, state) = (fields.next()?, fields.next()?, fields.next()?);
        let port = local.strip_prefix("0100007F:").filter(|_| state == "0A")?;
        u16::from_str_radix(port, 16).ok()
    };
    let text = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
    let port = text.lines().find_map(is_listener).unwrap_or_else(|| panic!("{text}\n{:#?}", env.status()));
    (std::net::Ipv4Addr::LOCALHOST, port).into()
}

#[test]
fn multipath_tcp_is_redirected() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = start(&env, &pod);
    let connected = env.in_cgroup(|| {
        pod.netns.run(|| {
            // SAFETY: the call takes numbers and returns a new descriptor.
            let client = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, MPTCP) };
            if client < 0 {
                return None;
            }
            // SAFETY: the descriptor is new and has no other owner.
            let mut client = unsafe { TcpStream::from_raw_fd(client) };
            connect(client.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(METADATA, 80))).unwrap();
            let status = exchange(&mut client, REFUSED).unwrap();
            Some(status)
        })
    });
    match connected {
        Some(status) => assert_eq!(status, 403),
        None => println!("this kernel has no MPTCP"),
    }
}

/// `io_uring` connects without the system call connect(2).
#[test]
fn io_uring_is_redirected() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = start(&env, &pod);
    let mut ring = match IoUring::new(1) {
        Ok(ring) => ring,
        Err(error) => return skip("io_uring", &error.to_string()),
    };
    let status = env.in_cgroup(|| {
        pod.netns.run(|| {
            let client = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).unwrap();
            let address = SockaddrIn::from(SocketAddrV4::new(METADATA, 80));
            let entry = opcode::Connect::new(Fd(client.as_raw_fd()), address.as_ptr().cast(), address.len());
            // SAFETY: the address and the descriptor outlive the call that waits for the completion.
            unsafe { ring.submission().push(&entry.build()) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            assert_eq!(ring.completion().next().unwrap().result(), 0);
            exchange(&mut TcpStream::from(client), REFUSED).unwrap()
        })
    });
    assert_eq!(status, 403);
}

/// The redirection applies to the socket's own namespace: a descriptor that another pod passes changes nothing.
#[test]
fn socket_of_another_pod_is_denied() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let [pod, other] = [(); 2].map(|()| env.add_pod(PodLink::Routed));
    let _agent = start(&env, &pod);
    let family = (AddressFamily::Inet, SockType::Stream, SockFlag::empty(), SockProtocol::Tcp);
    let foreign =
        env.in_cgroup(|| other.netns.run(|| socket(family.0, family.1, family.2, family.3))).unwrap();
    let denied = env.in_cgroup(|| {
        pod.netns.run(|| connect(foreign.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(METADATA, 80))))
    });
    assert_eq!(denied, Err(nix::errno::Errno::EPERM));
    let (status, ()) = get_with(&env, &pod.netns, IMDS, ALLOWED, |_| ()).unwrap();
    assert_eq!(status, 200);
}
