//! `from_pod`: no packet of a pod reaches the metadata service, and other traffic is not affected.

use imds_tests::{
    METADATA, Pod, PodLink, SERVICE, Status, TestEnv, packets,
    probe::{LONG, SHORT, connect, http_exchange, reachable, send_ipv4},
    with_each_backend,
};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];

fn denied(status: &Status, pod: &Pod) -> u64 {
    status.interface(&pod.host_ifname).counts.denied.packets
}

#[test]
fn only_pods_are_denied_until_unload() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        for pod in &pods {
            env.assert_open(pod);
        }

        let agent = env.start_agent(backend);
        for pod in &pods {
            env.assert_blocked(pod);
            env.assert_harmless(pod);
        }
        let status = env.status();
        assert_eq!((status.state.as_str(), status.mode.as_deref()), ("enforcing", Some("enforce")));
        let [endpoint] = &status.endpoints[..] else { panic!("{:?}", status.endpoints) };
        assert_eq!((endpoint.name.as_str(), endpoint.address.as_str()), ("imds", "169.254.169.254"));
        for pod in &pods {
            let interface = status.interface(&pod.host_ifname);
            assert_eq!(interface.ifindex, pod.host_ifindex);
            assert_eq!(interface.attach_mode(), Some(backend.name()));
            assert_eq!(interface.is_first(), Some(true));
            assert!(interface.counts.denied.packets > 0);
        }

        assert!(agent.terminate().success());
        for pod in &pods {
            env.assert_blocked(pod);
        }
        env.unload();
        for pod in &pods {
            env.assert_open(pod);
        }
    });
}

#[test]
fn denied_packet_is_counted_once() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        let _agent = env.start_agent(backend);

        let packet = packets::udp(pods[0].address, METADATA, b"five!");
        let frame_length = u64::try_from(packets::frame(&pods[0], &packet).len()).unwrap();
        env.assert_nothing_arrives(|| send_ipv4(&pods[0].netns, METADATA, &vec![packet; 7]).unwrap());
        send_ipv4(&pods[1].netns, SERVICE, &[packets::udp(pods[1].address, SERVICE, b"five!")]).unwrap();

        let status = env.status();
        let counts = status.interface(&pods[0].host_ifname).counts;
        assert_eq!((counts.denied.packets, counts.denied.bytes), (7, 7 * frame_length));
        assert_eq!((counts.audited.packets, counts.allowed.packets), (0, 0));
        assert_eq!(status.interface(&pods[1].host_ifname).counts, imds_tests::status::Counts::default());
        assert_eq!(status.total, counts);
    });
}

#[test]
fn audit_mode_counts_and_passes() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        let _agent = env.agent().backend(backend).config("mode = \"audit\"").spawn_ready();
        for pod in &pods {
            env.assert_open(pod);
        }

        let status = env.status();
        assert_eq!((status.state.as_str(), status.mode.as_deref()), ("auditing", Some("audit")));
        for pod in &pods {
            let counts = status.interface(&pod.host_ifname).counts;
            assert!(counts.audited.packets > 0 && counts.audited.bytes > 0);
            assert_eq!((counts.denied.packets, counts.allowed.packets), (0, 0));
        }
    });
}

#[test]
fn off_mode_passes() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        let _agent = env.agent().backend(backend).config("mode = \"off\"").spawn_ready();
        for pod in &pods {
            env.assert_open(pod);
        }

        let status = env.status();
        assert_eq!((status.state.as_str(), status.mode.as_deref()), ("off", Some("off")));
        for pod in &pods {
            let counts = status.interface(&pod.host_ifname).counts;
            assert!(counts.allowed.packets > 0);
            assert_eq!((counts.denied.packets, counts.audited.packets), (0, 0));
        }
    });
}

#[test]
fn next_agent_changes_the_mode() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    for (mode, is_blocked) in [("audit", false), ("enforce", true), ("off", false), ("enforce", true)] {
        let agent = env.agent().config(&format!("mode = \"{mode}\"")).spawn_ready();
        assert_eq!(env.status().mode.as_deref(), Some(mode));
        if is_blocked {
            env.assert_blocked(&pod);
        } else {
            env.assert_open(&pod);
        }
        assert!(agent.terminate().success());
    }
}

#[test]
fn connection_from_before_agent_is_cut() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        let streams = pods.each_ref().map(|pod| {
            assert!(reachable(&pod.netns, METADATA));
            pod.netns.run(|| connect(METADATA, LONG)).unwrap()
        });
        let mut of_node = env.node.run(|| connect(METADATA, LONG)).unwrap();
        let mut elsewhere = pods[0].netns.run(|| connect(SERVICE, LONG)).unwrap();

        let _agent = env.start_agent(backend);
        for mut stream in streams {
            env.assert_nothing_arrives(|| http_exchange(&mut stream, SHORT).unwrap_err());
        }
        assert!(pods.iter().all(|pod| denied(&env.status(), pod) > 0));
        http_exchange(&mut of_node, LONG).unwrap();
        http_exchange(&mut elsewhere, LONG).unwrap();
    });
}

#[test]
fn once_protects_without_a_process() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pods = LINKS.map(|link| env.add_pod(link));
        let output = env.agent().backend(backend).once();
        assert!(output.status.success(), "{output:?}");

        let status = env.status();
        status.assert_lacks_only_an_agent();
        for pod in &pods {
            env.assert_blocked(pod);
            env.assert_harmless(pod);
        }
    });
}

#[test]
fn status_exit_code_reports_enforcement() {
    let env = TestEnv::new();
    let _pod = env.add_pod(PodLink::Routed);
    let code = || env.imds_agent(&["status"]).output().status.code();
    assert_eq!((code(), env.status().state.as_str()), (Some(3), "unloaded"));
    let agent = env.agent().spawn_ready();
    assert_eq!((code(), env.status().state.as_str()), (Some(0), "enforcing"));

    agent.kill9();
    let late = env.add_pod(PodLink::Routed);
    assert_eq!((code(), env.status().state.as_str()), (Some(3), "degraded"));
    let problems = env.status().problems;
    let problem = problems.iter().find(|problem| problem.interface.as_ref() == Some(&late.host_ifname));
    let problem = problem.unwrap_or_else(|| panic!("{problems:#?}"));
    assert!(!problem.problem.is_empty() && !problem.remedy.is_empty());

    let _agent = env.agent().spawn_ready();
    assert_eq!((code(), env.status().state.as_str()), (Some(0), "enforcing"));
    env.assert_blocked(&late);
}
