//! The agent follows changes of the node: pods are added and deleted, and other software detaches programs.

use std::{fs, path::PathBuf};

use imds_tests::{
    AttachMode, Layout, METADATA, Nic, Pod, PodLink, TestEnv, hook, packets,
    poll::poll_until,
    probe::{LONG, send_ipv4},
    with_each_backend,
};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];

fn link_pin(env: &TestEnv, pod: &Pod) -> PathBuf {
    env.pin_dir().join(format!("links/from_pod_{}", pod.host_ifindex))
}

#[test]
fn later_pod_is_enforced() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let _agent = env.start_agent(backend);
        for link in LINKS {
            let pod = env.add_pod(link);
            let status = env.wait_enforced(&pod);
            let interface = status.interface(&pod.host_ifname);
            assert_eq!((interface.role.as_str(), interface.attach_mode()), ("pod", Some(backend.name())));
            assert_eq!((interface.ifindex, interface.is_first()), (pod.host_ifindex, Some(true)));
            env.assert_blocked(&pod);
            env.assert_harmless(&pod);
        }
    });
}

#[test]
fn deleted_pod_keeps_its_counts() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let [gone, stays] = LINKS.map(|link| env.add_pod(link));
        let _agent = env.start_agent(backend);
        for (pod, packets) in [(&gone, 5), (&stays, 3)] {
            let packet = packets::udp(pod.address, METADATA, b"counted");
            send_ipv4(&pod.netns, METADATA, &vec![packet; packets]).unwrap();
        }
        let before = env.status_when("all are counted", |status| status.total.denied.packets == 8);
        let (name, pin) = (gone.host_ifname.clone(), link_pin(&env, &gone));
        let counts = before.interface(&name).counts;
        assert_eq!(counts.denied.packets, 5);

        gone.delete();

        // The status can count the packets twice while the agent moves them to those of deleted interfaces.
        let after = env
            .status_when("the interface is forgotten and its packets are counted once", |status| {
                status.find(&name).is_none() && status.deleted == counts
            });
        assert_eq!(after.total, before.total);
        assert_eq!(after.interface(&stays.host_ifname).counts.denied.packets, 3);
        poll_until(LONG, "the link's pin to go", || (!pin.exists()).then_some(()));
        assert!(after.problems.is_empty());
        env.assert_blocked(&stays);
    });
}

#[test]
fn pod_changes_without_agent_are_noticed() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let agent = env.start_agent(backend);
        let packet = packets::udp(pod.address, METADATA, b"counted");
        send_ipv4(&pod.netns, METADATA, &[packet]).unwrap();
        env.status_when("the packet is counted", |status| status.total.denied.packets == 1);
        agent.kill9();
        let name = pod.host_ifname.clone();
        pod.delete();
        let late = env.add_pod(PodLink::Bridged);

        let _agent = env.start_agent(backend);
        let status = env.status_when("the interface is forgotten", |status| status.find(&name).is_none());
        assert_eq!((status.deleted.denied.packets, status.total.denied.packets), (1, 1));
        env.assert_blocked(&late);
    });
}

#[test]
fn fast_pod_churn_leaves_nothing() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let _agent = env.start_agent(backend);
        for number in 0..20 {
            // The namespace is deleted before or after the agent sees the interface.
            let _pod = env.add_pod(LINKS[number % 2]);
        }
        let stays = env.add_pod(PodLink::Routed);
        env.status_when("only the last pod is there", |status| {
            let mut pods = status.interfaces.iter().filter(|interface| interface.role == "pod");
            let last = pods.next().is_some_and(|pod| pod.name == stays.host_ifname && pod.is_attached());
            last && pods.next().is_none() && status.problems.is_empty()
        });
        let links = fs::read_dir(env.pin_dir().join("links")).unwrap().count();
        assert!(links <= 2, "{links} links pinned");
        env.assert_blocked(&stays);
    });
}

#[test]
fn renamed_interface_keeps_its_counts() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Bridged);
        let _agent = env.start_agent(backend);
        send_ipv4(&pod.netns, METADATA, &[packets::udp(pod.address, METADATA, b"counted")]).unwrap();
        env.status_when("the packet is counted", |status| status.total.denied.packets == 1);

        let old = &pod.host_ifname;
        env.node.ip(&format!("link set {old} down\nlink set {old} name renamed0\nlink set renamed0 up"));

        let status = env.status_when("the new name is there", |status| status.find("renamed0").is_some());
        assert!(status.find(old).is_none());
        let renamed = status.interface("renamed0");
        assert_eq!((renamed.ifindex, renamed.counts.denied.packets), (pod.host_ifindex, 1));
        assert_eq!(renamed.attach_mode(), Some(backend.name()));
        env.assert_blocked(&pod);
    });
}

#[test]
fn only_pod_interfaces_are_enforced() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        // Both ends are in the node's own namespace, so that the link belongs to no pod.
        env.node.ip("link add inner0 type veth peer name inner1\nlink set inner0 up\nlink set inner1 up");
        let pods = LINKS.map(|link| env.add_pod(link));
        let _agent = env.start_agent(backend);

        let status = env.status();
        for pod in &pods {
            assert_eq!(status.interface(&pod.host_ifname).role, "pod");
        }
        let others = [
            ("lo", "loopback"),
            (TestEnv::UPLINK, "uplink"),
            (TestEnv::BRIDGE, "bridge"),
            ("inner0", "other"),
            ("inner1", "other"),
        ];
        for (name, role) in others {
            let interface = status.interface(name);
            assert_eq!(interface.role, role, "{name}");
            // The uplink's peer is in another network namespace, like that of a pod interface.
            let is_uncertain = name == TestEnv::UPLINK;
            assert_eq!(interface.attachment("from_pod").is_some(), is_uncertain, "{name}");
            let ours = hook::programs(&env.node, name).iter().any(hook::Attached::is_ours);
            assert_eq!(ours, is_uncertain, "{name}");
            assert_eq!(
                hook::has_clsact(&env.node, name),
                is_uncertain && backend == AttachMode::Clsact,
                "{name}"
            );
        }
    });
}

#[test]
fn excluded_interface_is_not_attached() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let [excluded, included] = LINKS.map(|link| env.add_pod(link));
        let glob = format!("{}*", &excluded.host_ifname[..8]);
        assert!(!included.host_ifname.starts_with(&glob[..8]));
        let config = format!("[interfaces]\nexclude = [\"{glob}\"]");
        let _agent = env.agent().backend(backend).config(&config).spawn_ready();

        env.assert_open(&excluded);
        env.assert_blocked(&included);
        let status = env.status();
        let interface = status.interface(&excluded.host_ifname);
        assert_eq!((interface.role.as_str(), interface.attach_mode()), ("excluded", None));
        assert_eq!(hook::programs(&env.node, &excluded.host_ifname), []);
        assert_eq!(status.state, "enforcing");
    });
}

#[test]
fn newly_excluded_interface_is_detached() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let [excluded, included] = LINKS.map(|link| env.add_pod(link));
        let agent = env.start_agent(backend);
        env.assert_blocked(&excluded);
        assert!(agent.terminate().success());

        let config = format!("[interfaces]\nexclude = [\"{}\"]", excluded.host_ifname);
        let _agent = env.agent().backend(backend).config(&config).spawn_ready();
        env.assert_open(&excluded);
        env.assert_blocked(&included);
        assert_eq!(hook::programs(&env.node, &excluded.host_ifname), []);
        assert!(!link_pin(&env, &excluded).exists());
    });
}

#[test]
fn included_interface_is_always_enforced() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        env.node.ip("link add inner0 type veth peer name inner1\nlink set inner0 up\nlink set inner1 up");
        let config = "[interfaces]\ninclude = [\"inner?\"]\nexclude = [\"inner1\"]";
        let _agent = env.agent().backend(backend).config(config).spawn_ready();

        let status = env.status();
        let (included, excluded) = (status.interface("inner0"), status.interface("inner1"));
        assert_eq!((included.role.as_str(), included.attach_mode()), ("pod", Some(backend.name())));
        assert_eq!((excluded.role.as_str(), excluded.attach_mode()), ("excluded", None));
        assert!(hook::programs(&env.node, "inner0").iter().all(hook::Attached::is_ours));
        assert_eq!(hook::programs(&env.node, "inner1"), []);
    });
}

/// In clsact mode the link waits for its CNI plugins.
#[test]
fn deleted_pod_does_not_delay_readiness() {
    let env = TestEnv::with_layout(Layout::new(Nic::Macvlan));
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().args(&["--tc-backend", "clsact", "--clsact-delay", "600"]).spawn();
    env.status_when("the agent waits for the pod", |status| status.agent.running && status.mode.is_some());
    assert!(!env.status().agent.ready);
    pod.delete();
    env.status_when("the agent is ready", |status| status.agent.ready);
    drop(agent);
}
