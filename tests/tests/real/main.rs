//! Pods, rules and traffic control of real software: the reference CNI plugins, `nft`, `iptables`, `tc` and Open
//! vSwitch. A test is skipped if its programs are not installed. `cargo xtask e2e real` runs all of them, including the
//! long ones.

mod bandwidth;
mod nics;
mod ovs;
mod plugin_qdiscs;
mod plugins;
mod rules;

use std::{thread, time::Duration};

use imds_tests::{
    AttachMode, METADATA, Netns, TestEnv, known_here,
    netns::unique,
    poll::{poll_until, try_poll},
    probe::{LONG, SHORT, http_get, udp_echo},
};

const ALL: &[&str] = &["from_pod", "node_egress", "socket"];
/// Time limit until an agent enforces each interface.
const READY: Duration = Duration::from_secs(30);
/// TC hooks, which see packets.
const PACKETS: &[&str] = &["from_pod", "node_egress"];

/// Reports whether any request to the endpoint gets a response: over TCP and UDP, from a process in a container and
/// from one whose sockets no cgroup hook sees.
fn reaches_somehow(env: &TestEnv, netns: &Netns) -> bool {
    let tcp = || http_get(netns, METADATA, SHORT).is_answer();
    let udp = || udp_echo(netns, METADATA, SHORT).is_answer();
    thread::scope(|scope| {
        // Sent concurrently, because each denied request runs into its timeout.
        let probes = [
            scope.spawn(tcp),
            scope.spawn(udp),
            scope.spawn(|| env.in_cgroup(tcp)),
            scope.spawn(|| env.in_cgroup(udp)),
        ];
        probes.map(|probe| probe.join().expect("probes do not panic")).contains(&true)
    })
}

/// Reports whether each of the requests of [`reaches_somehow`] gets a response in time.
fn reaches(env: &TestEnv, netns: &Netns) -> bool {
    let is_reached = |get: &(dyn Fn() -> bool + Sync)| try_poll(LONG, || get().then_some(())).is_some();
    let probes = || {
        is_reached(&|| http_get(netns, METADATA, SHORT).is_answer())
            && is_reached(&|| udp_echo(netns, METADATA, SHORT).is_answer())
    };
    env.in_cgroup(probes) && probes()
}

/// Returns an exemption with one selector, such as `interface = 'veth1'`.
fn exemption(selector: &str) -> String {
    format!("[[exempt]]\nname = 'of-test'\n{selector}\n")
}

/// Asserts that only the node and the exempt pod reach the endpoint while the agent enforces the configuration, with
/// all hooks and with those that see packets, and after the agent was killed. Without the agent each pod reaches the
/// endpoint.
#[track_caller]
fn assert_exempt(env: &TestEnv, config: &str, exempt: Option<&Netns>, others: &[&Netns]) {
    assert_exempt_with(env, config, exempt, others, &[AttachMode::Tcx]);
}

/// Asserts an exemption like [`assert_exempt`], in each of these attach modes that the kernel has.
#[track_caller]
fn assert_exempt_with(
    env: &TestEnv,
    config: &str,
    exempt: Option<&Netns>,
    others: &[&Netns],
    modes: &[AttachMode],
) {
    let assert_all_reach = |when: &str| {
        for netns in exempt.iter().chain(others).chain([&&*env.node]) {
            assert!(reaches(env, netns), "{} does not reach the endpoint {when}", netns.name());
        }
    };
    assert_all_reach("without the agent");
    for (hooks, mode) in
        [ALL, PACKETS].into_iter().flat_map(|hooks| modes.iter().map(move |mode| (hooks, *mode)))
    {
        let mode = if imds_tests::hook::has_tcx() { mode } else { AttachMode::Clsact };
        let case = format!("{hooks:?} with {}", mode.name());
        let agent = env.agent().config(config).hooks(&known_here(hooks)).backend(mode).spawn();
        // The pods of the tests are no ports of a userspace datapath, which the agent reports.
        poll_until(READY, "each interface is enforced", || {
            let status = env.try_status().ok()?;
            let of_ovs = Some(ovs::USERSPACE_PORT);
            let has_others = status.problems.iter().any(|problem| problem.interface.as_deref() != of_ovs);
            (status.agent.ready && status.all_pods_enforced() && !has_others).then_some(())
        });
        let assert_case = |when: &str| {
            for netns in exempt.into_iter().chain([&*env.node]) {
                assert!(reaches(env, netns), "{case}, {when}: {} is denied", netns.name());
            }
            for netns in others {
                env.assert_nothing_arrives(|| {
                    assert!(!reaches_somehow(env, netns), "{case}, {when}: {} is not denied", netns.name());
                });
            }
        };
        assert_case("the agent runs");
        agent.kill9();
        assert_case("the agent was killed");
        env.unload();
        assert_all_reach(&format!("after {case}"));
    }
}

/// Applies rules with `nft` in a network namespace.
#[track_caller]
fn nft(netns: &Netns, rules: &str) {
    // Older versions of `nft` do not accept a newline as a separator in an argument.
    let file = std::env::temp_dir().join(unique("imds-nft-"));
    std::fs::write(&file, rules).expect("write rules");
    let mut command = netns.command("nft");
    command.arg("-f").arg(&file);
    let output = imds_tests::output(command);
    std::fs::remove_file(file).expect("remove rules");
    assert!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a program in a network namespace, which must succeed, and returns its standard output. Spaces separate the
/// arguments.
#[track_caller]
fn run(netns: &Netns, line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut command = netns.command(words.next().expect("a program"));
    command.args(words);
    let output = imds_tests::output(command);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
