//! Allow list of the node: only listed processes in the node's network namespace reach the endpoints.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    thread,
};

use aya::{
    maps::{HashMap, Map, MapData},
    util::KernelVersion,
};
use imds_ebpf_common::{AllowedKind, AllowedProcess, names::MAP_NODE_ALLOW};
use imds_tests::{
    Agent, Cgroup, METADATA, METADATA_V6, PodLink, SERVICE, TestEnv, foreign_bpf, output,
    poll::poll_until,
    probe::{LONG, SHORT, connect, http_exchange, http_get, icmp_echo, reachable, udp_echo},
    skip, skip_without_netns_cookie,
    status::{NodeAllow, NodeAllowEntry},
};
use serde_json::Value;

const HOOK: &str = "node_allow";
/// A cloud with endpoints of both families.
const AWS: &str = "provider = 'aws'";
const HTTP_PORT: u16 = 80;
const ECHO_PORT: u16 = 7;
/// Users without an account on any machine.
const USER: u32 = 61_184;
const OTHER_USER: u32 = 61_185;

/// The configuration with these entries of the allow list.
fn allow(entries: &[&str]) -> String {
    let quoted: Vec<_> = entries.iter().map(|entry| format!("\"{entry}\"")).collect();
    format!("[node]\nallow = [{}]\n", quoted.join(", "))
}

fn uid(user: u32) -> String {
    format!("uid:{user}")
}

/// The entry for a cgroup, as `/proc/PID/cgroup` shows its path.
fn entry(path: &Path) -> String {
    let root = path.ancestors().filter(|path| path.join("cgroup.controllers").exists()).last().unwrap();
    format!("cgroup:/{}", path.strip_prefix(root).unwrap().display())
}

/// Runs `work` as a process of a user in the node's network namespace and this cgroup.
fn run_as<T: Send>(env: &TestEnv, cgroup: &Cgroup, user: u32, work: impl FnOnce() -> T + Send) -> T {
    cgroup.run(|| {
        env.node.run(|| {
            // The system call itself, which changes only the calling thread. The thread ends with this closure.
            // SAFETY: the call takes three numbers.
            let result = unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
            assert_eq!(result, 0, "{}", io::Error::last_os_error());
            work()
        })
    })
}

fn http(address: impl Into<IpAddr>) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address.into(), HTTP_PORT), SHORT)?;
    http_exchange(&mut stream, SHORT).map(drop)
}

fn udp(any: &str) -> UdpSocket {
    let socket = UdpSocket::bind(any).expect("bind a UDP socket");
    socket.set_read_timeout(Some(SHORT)).expect("set a timeout");
    socket
}

fn echo(any: &str, address: impl Into<IpAddr>) -> io::Result<()> {
    let socket = udp(any);
    socket.send_to(b"echo", (address.into(), ECHO_PORT))?;
    socket.recv(&mut [0; 16]).map(drop)
}

fn connected_echo(any: &str, address: impl Into<IpAddr>) -> io::Result<()> {
    let socket = udp(any);
    socket.connect((address.into(), ECHO_PORT))?;
    socket.send(b"echo")?;
    socket.recv(&mut [0; 16]).map(drop)
}

/// A call that a process without capabilities can make.
type Call = fn() -> io::Result<()>;

/// Calls of both families that name an endpoint.
const CALLS: [(&str, Call); 8] = [
    ("TCP", || http(METADATA)),
    ("TCP to a mapped address", || http(METADATA.to_ipv6_mapped())),
    ("TCP by IPv6", || http(METADATA_V6)),
    ("UDP", || echo("0.0.0.0:0", METADATA)),
    ("UDP to a mapped address", || echo("[::]:0", METADATA.to_ipv6_mapped())),
    ("UDP by IPv6", || echo("[::]:0", METADATA_V6)),
    ("UDP, connected", || connected_echo("0.0.0.0:0", METADATA)),
    ("UDP by IPv6, connected", || connected_echo("[::]:0", METADATA_V6)),
];

#[track_caller]
fn assert_reaches(env: &TestEnv, cgroup: &Cgroup, user: u32) {
    for (name, call) in CALLS {
        poll_until(LONG, &format!("{name} of user {user}"), || run_as(env, cgroup, user, call).ok());
    }
}

#[track_caller]
fn assert_denied(env: &TestEnv, cgroup: &Cgroup, user: u32) {
    env.assert_nothing_arrives(|| {
        for (name, call) in CALLS {
            let error = run_as(env, cgroup, user, call).expect_err(name);
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{name} of user {user}: {error}");
        }
    });
}

/// Reports whether the user's call reaches the endpoint. Panics if the call fails with another error than EPERM.
#[track_caller]
fn reaches(env: &TestEnv, cgroup: &Cgroup, user: u32) -> bool {
    match run_as(env, cgroup, user, || http(METADATA)) {
        Ok(()) => true,
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => false,
        Err(error) => panic!("neither reached nor denied: {error}"),
    }
}

#[track_caller]
fn node_allow(env: &TestEnv) -> NodeAllow {
    env.status().node_allow.expect("node_allow is on")
}

/// Reports whether the kernel does not let the packet program know the network namespace, which the skipped part needs.
fn lacks_packets(left_out: &str) -> bool {
    let lacks = KernelVersion::current().unwrap() < KernelVersion::new(6, 15, 0);
    if lacks {
        skip(left_out, "programs of cgroups do not see a socket's network namespace on this kernel");
    }
    lacks
}

#[test]
fn only_listed_users_reach_the_endpoints() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new().with_ipv6();
    let cgroup = env.add_cgroup("user.slice");
    for user in [USER, OTHER_USER] {
        assert_reaches(&env, &cgroup, user);
    }
    let config = AWS.to_owned() + "\n" + &allow(&["uid:0", &uid(USER)]);
    let agent = env.agent().hooks(&["from_pod", "node_egress"]).config(&config).spawn_ready();
    for user in [0, USER] {
        assert_reaches(&env, &cgroup, user);
    }
    assert_denied(&env, &cgroup, OTHER_USER);
    // Other services are not restricted.
    poll_until(LONG, "another service", || {
        run_as(&env, &cgroup, OTHER_USER, || http(SERVICE).and_then(|()| echo("0.0.0.0:0", SERVICE))).ok()
    });
    let status = env.status();
    assert_eq!((status.state.as_str(), status.hooks.contains(&HOOK.to_owned())), ("enforcing", true));
    let NodeAllow { attached, allow, counts, .. } = status.node_allow.expect("node_allow is on");
    let entries = ["uid:0".to_owned(), uid(USER)].map(|process| NodeAllowEntry { process, active: true });
    assert_eq!((attached, allow), (true, entries.to_vec()));
    assert_eq!(counts.denied.packets, CALLS.len() as u64, "{counts:?}");
    assert!(counts.exempt.packets >= 2 * CALLS.len() as u64, "{counts:?}");
    drop(agent);
    assert_denied(&env, &cgroup, OTHER_USER);
    env.status().assert_lacks_only_an_agent();
    env.unload();
    for user in [USER, OTHER_USER] {
        assert_reaches(&env, &cgroup, user);
    }
}

#[test]
fn a_listed_cgroup_covers_its_descendants() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new().with_ipv6();
    let listed = env.add_cgroup("system.slice/kubelet.service");
    let below = env.add_cgroup("system.slice/kubelet.service/a/b/c/d/e/f/g/h/i/j");
    let beside = env.add_cgroup("system.slice/kubelet.servic");
    let above = env.add_cgroup("system.slice");
    let config = AWS.to_owned() + "\n" + &allow(&[&entry(listed.path())]);
    let agent = env.agent().hooks(&["from_pod"]).config(&config).spawn_ready();
    for cgroup in [&listed, &below] {
        assert_reaches(&env, cgroup, USER);
        assert_reaches(&env, cgroup, 0);
    }
    for cgroup in [&beside, &above] {
        assert_denied(&env, cgroup, USER);
        assert_denied(&env, cgroup, 0);
    }
    drop(agent);
    env.unload();
    assert_reaches(&env, &beside, USER);
}

#[test]
fn an_empty_list_denies_every_process_of_the_node() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("user.slice");
    assert!(reaches(&env, &cgroup, 0));
    let config = format!("on_deny_errno = 'EPERM'\n{}", allow(&[]));
    let agent = env.agent().hooks(&["from_pod"]).config(&config).spawn_ready();
    for user in [0, USER] {
        env.assert_nothing_arrives(|| assert!(!reaches(&env, &cgroup, user)));
    }
    assert_eq!(node_allow(&env).allow, []);
    drop(agent);
    env.unload();
    assert!(reaches(&env, &cgroup, 0));
}

#[test]
fn packets_of_unlisted_sockets_are_denied() {
    if skip_without_netns_cookie() || lacks_packets("the whole test") {
        return;
    }
    let env = TestEnv::new();
    let [listed, unlisted] = ["kubelet.service", "other.service"].map(|path| env.add_cgroup(path));
    let node = &*env.node;
    let open = |cgroup: &Cgroup| cgroup.run(|| node.run(|| connect(METADATA, LONG)).unwrap());
    let ping = |cgroup: &Cgroup| cgroup.run(|| icmp_echo(node, METADATA, SHORT).is_answer());
    let [mut cut, mut spared] = [&unlisted, &listed].map(open);
    assert!(ping(&listed) && ping(&unlisted));

    let config = allow(&[&entry(listed.path())]);
    let agent = env.agent().hooks(&["from_pod"]).config(&config).spawn_ready();
    env.assert_nothing_arrives(|| {
        assert!(http_exchange(&mut cut, SHORT).is_err());
        assert!(!ping(&unlisted));
    });
    assert!(http_exchange(&mut spared, LONG).is_ok() && ping(&listed));
    let counts = node_allow(&env).counts;
    assert!(counts.denied.bytes > 0 && counts.exempt.bytes > 0, "{counts:?}");
    drop(agent);
    env.unload();
    assert!(ping(&unlisted));
}

#[test]
fn pods_keep_their_exemptions() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let [exempt, other] = [PodLink::Routed, PodLink::Bridged].map(|link| env.add_pod(link));
    let cgroup = env.add_cgroup("kubepods.slice/pod7.slice");
    // Pods with hostNetwork.
    let [host, other_host] = ["pod8.slice/a", "pod9.slice/a"].map(|path| env.add_cgroup(path));
    let rule = |name: &str, sender: &str| format!("[[exempt]]\nname = '{name}'\n{sender}\n");
    let config = [
        allow(&[&uid(USER)]),
        rule("pod", &format!("netns = '{}'", exempt.netns.path().display())),
        rule("host", &format!("cgroup = '{}'", host.path().display())),
    ];
    let agent = env.agent().hooks(&["from_pod", "node_egress", "socket"]).config(&config.concat());
    let agent = agent.spawn_ready();
    cgroup.run(|| {
        poll_until(LONG, "the pod to be exempt", || {
            http_get(&exempt.netns, METADATA, SHORT).is_answer().then_some(())
        });
        assert!(udp_echo(&exempt.netns, METADATA, LONG).is_answer());
        assert!(icmp_echo(&exempt.netns, METADATA, LONG).is_answer());
        env.assert_blocked(&other);
    });
    poll_until(LONG, "the pod with hostNetwork to be exempt", || reaches(&env, &host, 0).then_some(()));
    assert!(!reaches(&env, &other_host, 0) && reaches(&env, &other_host, USER));
    // Calls of pods with a network namespace of their own are not those of the node.
    let status = env.status();
    let denied = |counts: imds_tests::status::Counts| counts.denied.packets;
    let of_sockets = denied(status.sockets.as_ref().expect("socket is on").counts);
    let of_node = denied(status.node_allow.as_ref().expect("node_allow is on").counts);
    assert!(of_sockets > 0 && of_node >= 1, "{status:#?}");
    drop(agent);
    env.unload();
    assert!(reaches(&env, &other_host, 0));
}

/// A configuration file that changes.
struct ConfigFile<'w> {
    env: &'w TestEnv,
    path: PathBuf,
}

impl<'w> ConfigFile<'w> {
    const HOOKS: &'static str = "[hooks]\nsocket = false\nnode_egress = false\n";

    fn new(env: &'w TestEnv, text: &str) -> Self {
        let file = Self { env, path: env.scratch_dir().join("imds.toml") };
        file.write(text);
        file
    }

    fn write(&self, text: &str) {
        fs::write(&self.path, format!("{}{text}", Self::HOOKS)).unwrap();
    }

    fn start(&self) -> Agent<'w> {
        let cgroup = self.env.cgroup().to_str().unwrap();
        let path = self.path.to_str().unwrap();
        self.env.agent().config_file(path).args(&["--cgroup", cgroup]).spawn_ready()
    }

    #[track_caller]
    fn reload(&self, text: &str) {
        let generation = || self.env.status().configuration.expect("a configuration").generation;
        let before = generation();
        self.write(text);
        poll_until(LONG, "the configuration to be loaded", || (generation() > before).then_some(()));
    }
}

#[test]
fn entries_come_and_go_with_the_configuration() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let [kubelet, session] = ["kubelet.service", "session.scope"].map(|path| env.add_cgroup(path));
    let is_open = || [reaches(&env, &kubelet, 0), reaches(&env, &session, USER), reaches(&env, &session, 0)];
    let file = ConfigFile::new(&env, "");
    let agent = file.start();
    assert_eq!(is_open(), [true; 3]);
    assert!(env.status().node_allow.is_none());
    file.reload(&allow(&[&entry(kubelet.path())]));
    assert_eq!(is_open(), [true, false, false]);
    file.reload(&allow(&[&entry(kubelet.path()), &uid(USER)]));
    assert_eq!(is_open(), [true, true, false]);
    file.reload(&allow(&[&uid(USER)]));
    assert_eq!(is_open(), [false, true, false]);
    // A broken file changes nothing.
    file.write(&allow(&["uid:root"]));
    env.status_when("the file is rejected", |status| {
        status.problems.iter().any(|problem| problem.problem.contains("node.allow: \"uid:root\""))
    });
    assert_eq!(is_open(), [false, true, false]);
    file.reload("");
    assert_eq!(is_open(), [true; 3]);
    assert!(env.status().node_allow.is_none());
    assert!(links(&env).is_empty());

    // Without an agent the list stays, and the next agent takes over.
    file.reload(&allow(&[&uid(USER)]));
    agent.kill9();
    assert_eq!(is_open(), [false, true, false]);
    let agent = file.start();
    assert_eq!(is_open(), [false, true, false]);
    agent.kill9();
    file.write("");
    let agent = file.start();
    assert_eq!(is_open(), [true; 3]);
    assert!(links(&env).is_empty());
    drop(agent);
    env.unload();
    assert_eq!(is_open(), [true; 3]);
}

/// Names of the pinned links of the hook.
fn links(env: &TestEnv) -> Vec<String> {
    let entries = fs::read_dir(env.pin_dir().join("links")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("node_") && !name.starts_with("node_egress_")).collect()
}

#[test]
fn a_listed_process_is_never_denied_while_the_list_changes() {
    const RELOADS: usize = 5;
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("kubelet.service");
    let texts = [allow(&["uid:0", &uid(USER)]), allow(&[&uid(USER), &entry(cgroup.path())])];
    let file = ConfigFile::new(&env, &texts[0]);
    let _agent = file.start();
    let stop = imds_tests::StopFlag::default();
    thread::scope(|scope| {
        let stop_on_drop = stop.set_on_drop();
        let calls = scope.spawn(|| {
            let mut calls = 0;
            while !stop.is_set() {
                let socket = run_as(&env, &cgroup, USER, || udp("0.0.0.0:0"));
                let sent = run_as(&env, &cgroup, USER, || socket.send_to(b"echo", (METADATA, ECHO_PORT)));
                sent.expect("a listed process is not refused");
                calls += 1;
            }
            calls
        });
        for reload in 1..=RELOADS {
            file.reload(&texts[reload % 2]);
        }
        drop(stop_on_drop);
        assert!(calls.join().unwrap() > 0);
    });
}

#[test]
fn cgroups_that_are_created_later_are_found() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let path = env.cgroup().join("kubelet.service");
    let config = allow(&["uid:1", &entry(&path)]);
    // Nothing is resynced.
    let agent = env.agent().hooks(&["from_pod"]).config(&config).resync(3600).spawn_ready();
    let active = || node_allow(&env).allow.into_iter().map(|entry| entry.active).collect::<Vec<_>>();
    assert_eq!(active(), [true, false]);
    assert_eq!(env.status().state, "enforcing");
    // Twice, as when the unit is restarted.
    for _ in 0..2 {
        let kubelet = env.add_cgroup("kubelet.service");
        poll_until(LONG, "the cgroup to be found", || reaches(&env, &kubelet, 0).then_some(()));
        assert_eq!(active(), [true, true]);
        drop(kubelet);
        poll_until(LONG, "the cgroup to be missed", || (active() == [true, false]).then_some(()));
    }
    let status = String::from_utf8(env.imds_agent(&["status"]).output().stdout).unwrap();
    assert!(status.contains(&format!("node allow uid:1 {} (not found)", entry(&path))), "{status}");
    drop(agent);
    env.unload();
}

#[test]
fn denials_name_the_process_and_its_cgroup() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("session.scope");
    let agent = env.agent().hooks(&["from_pod"]).config(&allow(&["uid:0"])).spawn_ready();
    assert!(!reaches(&env, &cgroup, USER));
    let report = poll_until(LONG, "the denial to be reported", || {
        let output = env.imds_agent(&["report", "-o", "json"]).output();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (!report["denials"].as_array().unwrap().is_empty()).then_some(report)
    });
    let denial = &report["denials"][0];
    assert_eq!((&denial["counts"][HOOK], &denial["verdict"]), (&1.into(), &"denied".into()), "{report}");
    assert_eq!(denial["cgroup"], entry(cgroup.path())["cgroup:/".len()..], "{report}");
    assert!(denial["comm"].is_string() && denial["namespace"].is_null(), "{report}");
    assert_eq!(node_allow(&env).counts.denied.packets, 1);
    drop(agent);
    env.unload();
}

#[test]
fn audit_lets_unlisted_processes_pass_and_counts_them() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("session.scope");
    let config = format!("mode = 'audit'\n{}", allow(&["uid:0"]));
    let _agent = env.agent().hooks(&["from_pod"]).config(&config).spawn_ready();
    poll_until(LONG, "a response", || reaches(&env, &cgroup, USER).then_some(()));
    poll_until(LONG, "a response", || reaches(&env, &cgroup, 0).then_some(()));
    let counts = node_allow(&env).counts;
    assert!(counts.audited.packets > 0 && counts.exempt.packets > 0, "{counts:?}");
    assert_eq!(counts.denied.packets, 0);
}

#[test]
fn detached_programs_and_removed_entries_are_restored() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("session.scope");
    let agent = env.agent().hooks(&["from_pod"]).config(&allow(&["uid:0"])).resync(1).spawn_ready();
    assert!(!reaches(&env, &cgroup, USER) && reaches(&env, &cgroup, 0));
    foreign_bpf::detach_link(&env.pin_dir().join("links/node_connect4"));
    poll_until(LONG, "calls to be denied again", || {
        let error = run_as(&env, &cgroup, USER, || http(METADATA)).expect_err("an unlisted process");
        (error.raw_os_error() == Some(libc::EPERM)).then_some(())
    });
    let map = MapData::from_pin(env.pin_dir().join("maps").join(MAP_NODE_ALLOW)).unwrap();
    let mut map: HashMap<_, AllowedProcess, u32> = Map::HashMap(map).try_into().unwrap();
    map.remove(&AllowedProcess::new(AllowedKind::Uid, 0)).unwrap();
    map.insert(AllowedProcess::new(AllowedKind::Uid, USER.into()), 9, 0).unwrap();
    poll_until(LONG, "the list to be restored", || {
        (reaches(&env, &cgroup, 0) && !reaches(&env, &cgroup, USER)).then_some(())
    });
    agent.wait_for_log("updated the allow list of the node", LONG);
    env.status_when("all is well", |status| status.is_ready() && status.state == "enforcing");
}

#[test]
fn verify_proves_it_and_root_keeps_its_access() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let verify = || {
        let output = env.in_cgroup(|| env.imds_agent(&["verify", "-o", "json"]).output());
        let report: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        let checks = report["checks"].as_array().unwrap().clone();
        let of = move |hook: &str, sender: &str| {
            let mut found = checks.iter().filter(|check| check["hook"] == hook && check["sender"] == sender);
            found.next().map(|check| (check["outcome"].clone(), check["observed"].to_string()))
        };
        (output.status.code(), report["passed"].clone(), of)
    };
    let agent = env.agent().hooks(&["from_pod"]).config(&allow(&["uid:0"])).spawn_ready();
    let (code, passed, of) = verify();
    assert_eq!((code, passed), (Some(0), true.into()));
    let (result, observed) = of(HOOK, "unlisted process").expect("a check of the hook");
    assert!(result == "passed" && observed.contains("refused"), "{result} {observed}");
    assert_eq!(of("path", "node").expect("a check of the node").0, "passed");
    assert!(reachable(&env.node, METADATA) && env.in_cgroup(|| reachable(&env.node, METADATA)));
    drop(agent);

    let _agent = env.agent().hooks(&["from_pod"]).config(&allow(&[&uid(USER)])).spawn_ready();
    let (_, _, of) = verify();
    assert_eq!(of(HOOK, "unlisted process").expect("a check of the hook").0, "passed");
    let (result, observed) = of("path", "node").expect("a check of the node");
    assert!(result == "skipped" && observed.contains("node.allow"), "{result} {observed}");
}

/// Runs pasta as a user that may open /dev/net/tun, as on machines with udev. Arguments: the user, and a shell command
/// for the container.
const PASTA: &str = "mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && \
     exec timeout 20 setpriv --reuid $0 --regid $0 --clear-groups pasta --config-net --quiet -- bash -c \"$1\"";

/// Reports whether a rootless container of the user with pasta(1) gets a response. The container has a network
/// namespace of its own; pasta sends the requests on sockets of the node.
fn pasta_reaches(env: &TestEnv, cgroup: &Cgroup, user: u32, to: Ipv4Addr) -> Result<bool, String> {
    let request = format!(
        "timeout 3 bash -c 'exec 3<>/dev/tcp/{to}/80; \
         printf \"GET / HTTP/1.1\\r\\nHost: m\\r\\nMetadata: true\\r\\n\\r\\n\" >&3; head -n 1 <&3'; echo ran"
    );
    let mut command = env.node.command("unshare");
    command.args(["--mount", "sh", "-c", PASTA, &user.to_string(), &request]);
    let output = cgroup.run(|| output(command));
    let stdout = String::from_utf8_lossy(&output.stdout);
    if !stdout.contains("ran") {
        return Err(String::from_utf8_lossy(&output.stderr).trim().replace('\n', " "));
    }
    Ok(stdout.contains("HTTP/1.1 200"))
}

#[test]
fn rootless_containers_with_pasta() {
    // `socket` would deny the call of the container, so that pasta gets none.
    const PACKETS: [&str; 2] = ["from_pod", "node_egress"];
    if skip_without_netns_cookie()
        || imds_tests::lacks_program("the whole test", &["pasta", "setpriv", "unshare", "bash", "timeout"])
    {
        return;
    }
    let env = TestEnv::new();
    let cgroup = env.add_cgroup("user.slice");
    let reaches = |user| pasta_reaches(&env, &cgroup, user, METADATA);
    match reaches(USER) {
        Ok(is_answered) => assert!(is_answered, "pasta does not reach the endpoint without the agent"),
        Err(error) => return skip("the whole test", &format!("pasta does not run here: {error}")),
    }
    let agent = env.agent().hooks(&PACKETS);
    let agent = agent.config(&allow(&["uid:0"])).spawn_ready();
    env.assert_nothing_arrives(|| assert_eq!(reaches(USER), Ok(false)));
    assert_eq!(pasta_reaches(&env, &cgroup, USER, SERVICE), Ok(true));
    let status = env.status();
    let counts = status.node_allow.as_ref().expect("node_allow is on").counts;
    assert!(counts.denied.packets > 0, "{status:#?}");
    drop(agent);
    let agent = env.agent().hooks(&PACKETS);
    let agent = agent.config(&allow(&["uid:0", &uid(USER)])).spawn_ready();
    assert_eq!(reaches(USER), Ok(true));
    drop(agent);
    env.unload();
    assert_eq!(reaches(USER), Ok(true));
}
