//! The harness itself, without an agent: guarantees on which other tests rely.

use std::{
    net::Ipv4Addr,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use imds_tests::{
    METADATA, Netns, PodLink, SERVICE, TestEnv,
    flood::Flood,
    poll::poll_until,
    probe::{LONG, SHORT, http_get, icmp_echo, reachable, udp_echo},
};

#[track_caller]
fn assert_reaches_everything(netns: &Netns) {
    for address in [METADATA, SERVICE] {
        assert!(reachable(netns, address), "HTTP at {address}");
        assert!(udp_echo(netns, address, LONG).is_answer(), "UDP at {address}");
        assert!(icmp_echo(netns, address, LONG).is_answer(), "ICMP at {address}");
    }
}

#[test]
fn routed_pod_reaches_all_servers() {
    let env = TestEnv::new();
    assert_reaches_everything(&env.add_pod(PodLink::Routed).netns);
}

#[test]
fn bridged_pod_reaches_all_servers() {
    let env = TestEnv::new();
    assert_reaches_everything(&env.add_pod(PodLink::Bridged).netns);
}

#[test]
fn node_reaches_all_servers() {
    assert_reaches_everything(&TestEnv::new().node);
}

#[test]
fn pods_reach_each_other() {
    let env = TestEnv::new();
    let pods =
        [PodLink::Routed, PodLink::Bridged, PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    for from in &pods {
        for to in &pods {
            assert!(
                icmp_echo(&from.netns, to.address, LONG).is_answer(),
                "{} to {}",
                from.address,
                to.address
            );
        }
    }
}

#[test]
fn unused_address_does_not_reply() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let nobody = Ipv4Addr::new(203, 0, 113, 1);
    assert!(!http_get(&pod.netns, nobody, SHORT).is_answer());
    assert!(!udp_echo(&pod.netns, nobody, SHORT).is_answer());
    assert!(!icmp_echo(&pod.netns, nobody, SHORT).is_answer());
}

#[test]
fn arrivals_are_counted_by_source() {
    let env = TestEnv::new();
    let pods = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    assert_eq!(env.received_packets().total(), 0);

    for (pod, pings) in pods.iter().zip([3, 2]) {
        for _ in 0..pings {
            assert!(icmp_echo(&pod.netns, METADATA, LONG).is_answer());
        }
        assert!(icmp_echo(&pod.netns, SERVICE, LONG).is_answer());
    }
    assert!(icmp_echo(&env.node, METADATA, LONG).is_answer());

    let received_packets = env.received_packets();
    assert_eq!(received_packets.from(pods[0].address), 3);
    assert_eq!(received_packets.from(pods[1].address), 2);
    assert_eq!(received_packets.from(env.node_address()), 1);
    assert_eq!(received_packets.total(), 6);
}

#[test]
fn count_includes_all_earlier_packets() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    let flood = Flood::udp(&pod, METADATA);
    poll_until(LONG, "10,000 packets", || (flood.sent() > 10_000).then_some(()));
    let sent = flood.stop();

    let arrived = env.received_packets();
    // A CPU drops packets that do not fit into its backlog.
    assert!(arrived.total() > sent / 2, "{} of {sent} arrived", arrived.total());
    assert_eq!(arrived, env.received_packets());
}

#[test]
fn server_survives_a_syn_flood() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let flood = Flood::syn(&pod, METADATA);
    poll_until(LONG, "10,000 packets to arrive", || (env.received_packets().total() > 10_000).then_some(()));
    assert!(flood.stop() > 0);
    assert!(reachable(&pod.netns, METADATA));
}

#[test]
fn deleted_pod_leaves_nothing() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let path = pod.netns.path();
    let device = env.node.run(|| nix::net::if_::if_nametoindex(pod.host_ifname.as_str())).unwrap();
    assert_eq!(device, pod.host_ifindex);
    let mut process = pod.netns.command("sleep").arg("1000").spawn().unwrap();

    let name = pod.host_ifname.clone();
    pod.delete();

    assert!(!path.exists());
    assert!(env.node.run(|| nix::net::if_::if_nametoindex(name.as_str())).is_err());
    assert!(!process.wait().unwrap().success());
}

fn traces(env: &TestEnv) -> [PathBuf; 4] {
    [env.node.path(), env.fabric.path(), env.pin_dir().into(), env.scratch_dir().into()]
}

#[test]
fn dropped_env_leaves_nothing() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    std::fs::create_dir_all(env.pin_dir().join("links")).unwrap();
    let (traces, pod_path) = (traces(&env), pod.netns.path());
    assert!(traces.iter().all(|path| path.exists()) && pod_path.exists());

    drop(env);
    drop(pod);

    let left: Vec<_> = traces.into_iter().chain([pod_path]).filter(|path| path.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn panicking_test_leaves_nothing() {
    let mut left = Vec::new();
    let result = catch_unwind(AssertUnwindSafe(|| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        left.extend(traces(&env));
        left.push(pod.netns.path());
        // A panic in another namespace must fail the test too.
        pod.netns.run(|| panic!("as a failing test would"));
    }));
    assert_eq!(result.unwrap_err().downcast_ref(), Some(&"as a failing test would"));
    assert!(!left.is_empty() && left.iter().all(|path| !path.exists()));
}

#[test]
fn next_process_cleans_up_after_kill() {
    // No process can have this id, which is above the kernel's PID_MAX_LIMIT of 2^22.
    let name = format!("imds-{}-0-node", (1 << 22) + std::process::id());
    let path = Path::new("/run/netns").join(&name);
    let added = std::process::Command::new("ip").args(["netns", "add", &name]).status().unwrap();
    assert!(added.success());
    let executable = std::env::current_exe().unwrap();
    let swept = std::process::Command::new(executable).arg("node_reaches").output().unwrap();
    assert!(swept.status.success(), "{swept:?}");
    assert!(!path.exists());
}
