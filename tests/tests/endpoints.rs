//! Protected endpoints and their allowed ports.

use std::{
    fs,
    net::{Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use imds_tests::{
    DNS_ALLOWED, DNS_PORT, METADATA, METADATA_V6, PacketSocket, Pod, PodLink, SERVICE_V6, TestEnv, packets,
    poll::poll_until,
    probe::{LONG, SHORT, http_get, http_get_at, reachable, udp_echo, udp_echo_at},
    with_each_backend,
};

const AWS: &str = "provider = 'aws'";

fn assert_v6_blocked(pod: &Pod) {
    assert!(!http_get(&pod.netns, METADATA_V6, SHORT).is_answer(), "TCP");
    assert!(!udp_echo(&pod.netns, METADATA_V6, SHORT).is_answer(), "UDP");
}

fn assert_v6_open(pod: &Pod) {
    assert!(reachable(&pod.netns, METADATA_V6), "TCP");
    assert!(udp_echo(&pod.netns, METADATA_V6, LONG).is_answer(), "UDP");
}

#[test]
fn ipv6_endpoint_is_protected() {
    with_each_backend(|backend| {
        let env = TestEnv::new().with_ipv6();
        let pod = env.add_pod(PodLink::Routed);
        env.add_pod_ipv6(&pod);
        assert_v6_open(&pod);

        let agent = env.agent().backend(backend).config(AWS).spawn_ready();
        // Flushes neighbour entries, so that neighbour discovery runs again from both sides.
        for netns in [&*env.node, &pod.netns, &env.fabric] {
            netns.ip("neigh flush all");
        }
        assert_v6_blocked(&pod);
        env.assert_blocked(&pod);
        assert!(env.status().interface(&pod.host_ifname).counts.denied.packets > 0);
        assert!(reachable(&pod.netns, SERVICE_V6) && udp_echo(&pod.netns, SERVICE_V6, LONG).is_answer());
        assert!(reachable(&env.node, METADATA_V6) && reachable(&env.node, SERVICE_V6));
        env.assert_harmless(&pod);

        agent.kill9();
        assert_v6_blocked(&pod);
        env.unload();
        assert_v6_open(&pod);
        env.assert_open(&pod);
    });
}

#[test]
fn only_allowed_ports_are_reachable() {
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    env.add_pod_ipv6(&pod);
    let addresses = [METADATA.into(), METADATA_V6.into()];
    let dns = addresses.map(|address| SocketAddr::new(address, DNS_PORT));
    let is_dns_open = |dns| {
        http_get_at(&pod.netns, dns, LONG).is_answer() && udp_echo_at(&pod.netns, dns, LONG).is_answer()
    };
    assert!(dns.into_iter().all(is_dns_open));
    env.assert_open(&pod);
    assert_v6_open(&pod);

    let agent = env.agent().config(DNS_ALLOWED).spawn_ready();
    assert!(dns.into_iter().all(is_dns_open));
    assert_v6_blocked(&pod);
    env.assert_blocked(&pod);
    let status = env.status();
    let counts = status.interface(&pod.host_ifname).counts;
    assert!(counts.allowed.packets > 0 && counts.denied.packets > 0, "{counts:?}");
    let shown: Vec<_> =
        status.endpoints.iter().map(|e| (&*e.name, &*e.address, e.allow_ports.join(" "))).collect();
    let kept = || "udp/53 tcp/53".to_owned();
    assert_eq!(shown, [("four", "169.254.169.254", kept()), ("six", "fd00:ec2::254", kept())]);
    assert_eq!(status.provider.unwrap().effective, "none");

    drop(agent);
    env.unload();
    env.assert_open(&pod);
    assert_v6_open(&pod);
}

#[test]
fn preset_allows_configured_ports() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let file = env.scratch_dir().join("imds.toml");
    let write = |ports: &str| {
        let hooks = "[hooks]\nnode_egress = false\nsocket = false\n";
        fs::write(&file, format!("provider = 'gcp'\n{hooks}[preset.imds]\nallow_ports = [{ports}]\n"))
            .unwrap();
    };
    write("");
    let agent = env.imds_agent(&["run"]).config_file(file.to_str().unwrap()).spawn_ready();
    env.assert_blocked(&pod);
    write("'tcp/80'");
    poll_until(LONG, "the port to be allowed", || {
        http_get(&pod.netns, METADATA, SHORT).is_answer().then_some(())
    });
    let status = env.status();
    let imds = status.endpoints.iter().find(|endpoint| endpoint.name == "imds").unwrap();
    assert_eq!(imds.allow_ports, ["tcp/80"]);
    write("");
    // A request without a response in time is denied only if it does not arrive.
    poll_until(LONG, "the port to be denied again", || {
        (!env.arrives(|| drop(http_get(&pod.netns, METADATA, SHORT)))).then_some(())
    });
    env.assert_blocked(&pod);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn addresses_embedding_endpoint_are_denied() {
    with_each_backend(|backend| {
        let env = TestEnv::new().with_ipv6();
        let pod = env.add_pod(PodLink::Routed);
        let address = env.add_pod_ipv6(&pod);
        let forms: [Ipv6Addr; 3] = ["64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "2002:a9fe:a9fe:7::9"]
            .map(|form| form.parse().unwrap());
        let others: [Ipv6Addr; 2] =
            ["64:ff9b::a9fe:a9fd", "2002:a9fe:a9fd::1"].map(|form| form.parse().unwrap());
        let fabric = env.fabric_frames();
        let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
        // Frames are addressed to the gateway directly, so that neighbour entries of the pod do not matter.
        let arrives = |destination: Ipv6Addr, marker: &str, timeout| {
            let packet = packets::udp_v6(address, destination, marker.as_bytes());
            socket.send(&packets::frame(&pod, &packet)).unwrap();
            fabric.sees(marker.as_bytes(), timeout)
        };
        for form in forms.into_iter().chain(others) {
            assert!(arrives(form, &format!("before {form}"), LONG), "{form} without the agent");
        }
        let agent = env.start_agent(backend);
        for form in forms {
            assert!(!arrives(form, &format!("with {form}"), SHORT), "{form}");
        }
        for other in others {
            assert!(arrives(other, &format!("with {other}"), LONG), "{other}");
        }
        assert_eq!(env.status().denied(), 3);
        drop(agent);
        env.unload();
        for form in forms {
            assert!(arrives(form, &format!("after {form}"), LONG), "{form} after unload");
        }
    });
}

#[test]
fn node_without_ipv6_is_enforced() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    for netns in [&*env.node, &pod.netns, &env.fabric] {
        netns.sysctl("ipv6/conf/all/disable_ipv6", "1");
        netns.sysctl("ipv6/conf/default/disable_ipv6", "1");
    }
    env.assert_open(&pod);
    let agent = env.agent().config(AWS).spawn_ready();
    env.assert_blocked(&pod);
    env.assert_harmless(&pod);
    drop(agent);
    env.unload();
    env.assert_open(&pod);
}

/// Creates a directory of DMI files with this vendor.
fn dmi(env: &TestEnv, sys_vendor: &str) -> PathBuf {
    let dir = env.scratch_dir().join("dmi");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("sys_vendor"), format!("{sys_vendor}\n")).unwrap();
    dir
}

#[test]
fn provider_follows_the_firmware() {
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    env.add_pod_ipv6(&pod);
    assert_v6_open(&pod);
    env.assert_open(&pod);
    let start = |vendor| {
        let dir = dmi(&env, vendor);
        let agent = env.agent().args(&["--dmi-dir", dir.to_str().unwrap()]).spawn_ready();
        let provider = env.status().provider.unwrap();
        assert_eq!(provider.configured, "auto");
        (agent, provider.effective)
    };
    let (agent, provider) = start("Amazon EC2");
    assert_eq!(provider, "aws");
    assert_v6_blocked(&pod);
    env.assert_blocked(&pod);
    agent.kill9();

    // Endpoints of both providers stay protected; endpoints of the first one only become reachable.
    let (agent, provider) = start("Unknown");
    assert_eq!(provider, "generic");
    assert_v6_open(&pod);
    env.assert_blocked(&pod);
    agent.kill9();
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn maximum_of_endpoints_comes_and_goes() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.assert_open(&pod);
    let config = |octet: u8| {
        let one = |n| format!("[[endpoint]]\nname = 'n{n}'\naddress = '10.{octet}.0.{n}'\n");
        let own: Vec<_> = (0..255).map(one).collect();
        format!("provider = 'generic'\n{}", own.concat())
    };
    for octet in [77, 78, 79] {
        let agent = env.agent().config(&config(octet)).spawn_ready();
        let status = env.status();
        assert_eq!(status.endpoints.len(), 256);
        assert!(
            status.endpoints[1..]
                .iter()
                .all(|endpoint| endpoint.address.starts_with(&format!("10.{octet}.")))
        );
        env.assert_blocked(&pod);
        env.assert_harmless(&pod);
        agent.kill9();
    }
    env.unload();
    env.assert_open(&pod);
}

#[test]
fn no_endpoint_is_an_error_with_its_line() {
    let env = TestEnv::new();
    let file = env.scratch_dir().join("imds.toml");
    fs::write(&file, "mode = 'enforce'\nprovider = 'none'").unwrap();
    // Does not use the harness's command, which adds a pin directory.
    let program = env.imds_agent(&[]).command().get_program().to_owned();
    let mut command = env.node.command(program);
    command.args(["config", "check", file.to_str().unwrap()]);
    let output = imds_tests::output(command);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains(".toml:2:12: provider"), "{stderr}");
}
