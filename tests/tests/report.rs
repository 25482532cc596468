//! `imds-agent report`: denied senders, and proposed rules that exempt exactly these senders.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write as _},
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData};
use imds_ebpf_common::{
    Address, Hook, IMDS_IPV4, Verdict,
    event_log::{DENIALS, DenialKey, DenialRecord},
    names::MAP_DENIALS,
};
use imds_tests::{
    METADATA, Netns, PodLink, TestCluster, TestEnv,
    api_server::{ApiServer, Fault, pod},
    kubelet::{Driver, Kubelet, new_uid},
    poll::poll_until,
    probe::{LONG, SHORT, connect, http_get},
    skip_without_netns_cookie,
};
use serde_json::Value;

const NODE: &str = "node-0";
const EMPTY: DenialRecord = DenialRecord {
    count: 0,
    bytes: 0,
    first: 0,
    last: 0,
    namespace: [0; _],
    service_account: [0; _],
    label: [0; _],
    pod: [0; _],
    interface: [0; _],
    comm: [0; _],
    cgroup: [0; _],
};

fn report(env: &TestEnv, args: &[&str]) -> String {
    let output = env.imds_agent(&[&["report"], args].concat()).output();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json_report(env: &TestEnv) -> Value {
    serde_json::from_str(&report(env, &["-o", "json"])).unwrap()
}

fn denials(env: &TestEnv) -> Vec<Value> {
    json_report(env)["denials"].as_array().unwrap().clone()
}

fn sum(denials: &[Value]) -> u64 {
    let counts = denials.iter().flat_map(|denial| denial["counts"].as_object().unwrap().values());
    counts.filter_map(Value::as_u64).sum()
}

#[test]
fn oldest_senders_are_evicted() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().spawn_ready();
    let pin = env.pin_dir().join("maps").join(MAP_DENIALS);
    let map = Map::HashMap(MapData::from_pin(pin).unwrap());
    let mut event_log: HashMap<MapData, DenialKey, DenialRecord> = map.try_into().unwrap();
    let (address, hook, verdict) =
        (Address::from_ipv4(IMDS_IPV4), Hook::FromPod as u32, Verdict::Denied as u32);
    for sender in 0..DENIALS as u64 {
        let mut record = EMPTY;
        (record.count, record.first, record.last) = (1, 1, sender + 1);
        record.comm[..8].copy_from_slice(&sender.to_ne_bytes().map(|byte| b'a' + byte % 26));
        event_log.insert(DenialKey { address, sender, hook, verdict }, record, 0).unwrap();
    }
    assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    poll_until(LONG, "the pod's denial", || {
        let denials = denials(&env);
        let known = denials.iter().find(|denial| denial["interface"] == pod.host_ifname.as_str());
        known.is_some().then_some(())
    });
    let left = event_log.keys().map(|key| key.unwrap().sender).collect::<BTreeSet<_>>();
    assert!(left.len() > DENIALS / 2 && left.len() < DENIALS, "{}", left.len());
    assert!(!left.contains(&0) && left.contains(&(DENIALS as u64 - 1)));
    drop(agent);
    env.unload();
}

/// A process can rename its threads freely. The names must not evict records of other senders.
#[test]
fn thread_names_share_a_record() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().hooks(&["socket"]).spawn_ready();
    for number in 0..8 {
        env.in_cgroup(|| {
            let name = std::ffi::CString::new(format!("worker-{number}")).unwrap();
            nix::sys::prctl::set_name(&name).unwrap();
            assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
        });
    }
    let denials = poll_until(LONG, "all denials", || {
        let denials = denials(&env);
        (sum(&denials) >= 8).then_some(denials)
    });
    assert_eq!(denials.len(), 1, "{denials:#?}");
    assert_eq!(denials[0]["comm"], "worker-7", "{denials:#?}");
    drop(agent);
    env.unload();
}

/// A container can create cgroups below its own freely. The cgroups must not evict records of other senders.
#[test]
fn cgroups_of_a_unit_share_a_record() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let names = ["", "/init", "/init/worker", "/payload"].map(|below| format!("machine/web.scope{below}"));
    let cgroups = names.map(|path| env.add_cgroup(&path));
    let agent = env.agent().hooks(&["socket"]).spawn_ready();
    for cgroup in &cgroups {
        assert!(!cgroup.run(|| http_get(&pod.netns, METADATA, SHORT).is_answer()));
    }
    let denials = poll_until(LONG, "all denials", || {
        let denials = denials(&env);
        (sum(&denials) >= cgroups.len() as u64).then_some(denials)
    });
    let found: BTreeSet<_> = denials.iter().map(|denial| denial["cgroup"].as_str().unwrap()).collect();
    assert!(found.len() == 1 && found.iter().all(|path| path.ends_with("machine/web.scope")), "{found:?}");
    drop(agent);
    env.unload();
}

/// An agent starts beside running pods, and sees their requests before the API server has listed the pods.
#[test]
fn senders_denied_before_their_pods_are_known() {
    if skip_without_netns_cookie() {
        return;
    }
    let cluster = TestCluster::new();
    let (env, uid) = (&cluster.env, new_uid());
    let link = env.add_pod(PodLink::Routed);
    let mut cgroup = cluster.kubelet.add_pod(&uid, Driver::Systemd);
    cgroup.start_in(&link.netns);
    // Threads can't enter the cgroup of the pod itself, because that is not a threaded one.
    let of_thread = env.add_cgroup(&format!("kubepods/pod{}", new_uid()));
    let is_answered = || of_thread.run(|| http_get(&link.netns, METADATA, LONG).is_answer());
    let agent = env
        .agent()
        .config(&cluster.config("mode = 'audit'"))
        .hooks(&["from_pod", "node_egress", "socket"])
        .spawn_ready();
    assert!(is_answered());
    let mut last = (0, Instant::now());
    let before = poll_until(LONG, "the records of all hooks", || {
        let found = denials(env);
        let hooks: BTreeSet<_> =
            found.iter().flat_map(|denial| denial["counts"].as_object().unwrap().keys().cloned()).collect();
        if last.0 != sum(&found) {
            last = (sum(&found), Instant::now());
        }
        // The connection's last packets follow its response.
        (hooks.len() == 3 && last.1.elapsed() > Duration::from_millis(300)).then_some(found)
    });
    assert!(before.iter().all(|denial| denial["namespace"].is_null()), "{before:#?}");
    assert!(before.iter().any(|denial| denial["interface"] == link.host_ifname.as_str()), "{before:#?}");
    let is_kubepods =
        |denial: &Value| denial["cgroup"].as_str().is_some_and(|path| path.contains("kubepods"));
    assert!(before.iter().any(is_kubepods), "{before:#?}");
    assert_eq!(report(env, &["--rules"]), "");

    cluster.server.apply(pod(&uid, TestCluster::NODE, "tools", "agent", &[("app", "agent")]));
    let after = poll_until(LONG, "the record of the pod", || {
        let found = denials(env);
        (found.len() == 1 && sum(&found) >= sum(&before)).then_some(found)
    });
    let denial = &after[0];
    assert_eq!((&denial["namespace"], &denial["pod"]), (&"tools".into(), &format!("pod-{uid}").into()));
    assert!(denial["cgroup"].is_null() && denial["interface"].is_null(), "{denial:#}");
    assert!(before.iter().any(|earlier| earlier["first"] == denial["first"]), "{before:#?} {denial:#}");
    assert_eq!(denial["counts"].as_object().map(serde_json::Map::len), Some(3), "{denial:#}");
    assert_eq!(sum(&after), sum(&before), "{before:#?} {denial:#}");
    let rules = report(env, &["--rules"]);
    assert!(rules.matches("[[exempt]]").count() == 1 && rules.contains("namespace = \"tools\""), "{rules}");

    // A request of the known pod adds to the merged record. The sums of the metrics count each request once.
    assert!(is_answered());
    poll_until(LONG, "the second request", || {
        let metrics = env.metrics();
        let values = metrics.lines().filter(|line| line.starts_with("imds_agent_denials_total{"));
        let counted: u64 = values.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum();
        let found = denials(env);
        (sum(&found) > sum(&after) && found.len() == 1 && counted == sum(&found)).then_some(())
    });
    drop(agent);
    drop(cgroup);
    env.unload();
}

/// While no agent runs, another pod gets the interface index of one whose name the maps have.
#[test]
fn successor_of_a_pod_has_no_name() {
    let cluster = TestCluster::new();
    let (env, uid) = (&cluster.env, new_uid());
    let start = || env.agent().config(&cluster.config("")).spawn_ready();
    let agent = start();
    let link = env.add_pod(PodLink::Routed);
    let mut cgroup = cluster.kubelet.add_pod(&uid, Driver::Systemd);
    cgroup.start_in(&link.netns);
    cluster.server.apply(pod(&uid, TestCluster::NODE, "tools", "agent", &[]));
    poll_until(LONG, "a record with the name of the pod", || {
        cluster.assert_denied(&link.netns);
        denials(env).iter().any(|denial| denial["namespace"] == "tools").then_some(())
    });
    agent.kill9();
    assert!(report(env, &["--reset"]).contains("tools"));
    // The next agent gets no pods from the API server.
    for _ in 0..100 {
        cluster.server.fail(Fault::Status(500, "etcdserver: no leader"));
    }
    cluster.server.disconnect();
    cgroup.stop();
    let (index, address) = (link.host_ifindex, link.address);
    link.delete();
    let successor = env.add_successor("guest1", index, address);
    let agent = start();
    let found = poll_until(LONG, "a record of the successor", || {
        cluster.assert_denied(&successor);
        Some(denials(env)).filter(|found| !found.is_empty())
    });
    assert!(found.iter().all(|denial| denial["namespace"].is_null()), "{found:#?}");
    drop(agent);
    env.unload();
}

#[test]
fn audit_to_rules_to_enforcement() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let server = ApiServer::start_in(&env.node);
    let kubelet = Kubelet::new();
    let kubeconfig = env.scratch_dir().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig);
    let config = env.scratch_dir().join("imds.toml");
    let write = |mode: &str, rules: &str| {
        let kubernetes =
            format!("[kubernetes]\nkubeconfig = '{}'\nnode_name = '{NODE}'\n", kubeconfig.display());
        fs::write(&config, format!("mode = '{mode}'\n{kubernetes}\n{rules}")).unwrap();
    };
    write("audit", "");
    let cgroup = env.cgroup().to_str().unwrap();
    let agent = env.agent().config_file(config.to_str().unwrap()).args(&["--cgroup", cgroup]).spawn_ready();
    let uids = [new_uid(), new_uid()];
    let pods = [env.add_pod(PodLink::Routed), env.add_pod(PodLink::Bridged)];
    let cgroups: Vec<_> = uids
        .iter()
        .zip(&pods)
        .zip(["agent", "web"])
        .map(|((uid, pod_of), account)| {
            let mut cgroup = kubelet.add_pod(uid, Driver::Systemd);
            cgroup.start_in(&pod_of.netns);
            server.apply(pod(uid, NODE, "tools", account, &[("app", account)]));
            cgroup
        })
        .collect();
    env.status_when("both pods are known", |status| {
        status
            .kubernetes
            .as_ref()
            .is_some_and(|kubernetes| kubernetes.pods == 2 && kubernetes.unresolved == 0)
    });
    assert!(denials(&env).is_empty() && report(&env, &[]).starts_with("no denials"));
    let is_answered = |netns: &Netns| env.in_cgroup(|| http_get(netns, METADATA, LONG).is_answer());
    assert!(is_answered(&pods[0].netns));

    // The agent can read the packet with the request later than those that open the connection.
    let found = poll_until(LONG, "the audited pod and its request in the report", || {
        let report = json_report(&env);
        let found = report["denials"].as_array().unwrap();
        let hooks = |denial: &Value| denial["counts"].as_object().map(serde_json::Map::len);
        let has_request = !report["requests"].as_array().unwrap().is_empty();
        (found.first().and_then(hooks) == Some(3) && has_request).then(|| found.clone())
    });
    let [denial] = &found[..] else { panic!("{found:?}") };
    for (field, expected) in [
        ("namespace", "tools"),
        ("service_account", "agent"),
        ("label", "app=agent"),
        ("pod", &format!("pod-{}", uids[0])),
        ("endpoint", "imds"),
        ("verdict", "audited"),
    ] {
        assert_eq!(denial[field], expected, "{field}: {denial}");
    }
    let table = report(&env, &[]);
    assert!(table.contains("tools/agent app=agent") && table.contains("[[exempt]]"), "{table}");

    // The proposed rules, used unmodified, allow exactly the requests of the denied senders.
    let rules = report(&env, &["--rules", "--reset"]);
    assert!(rules.contains("allow = [\"GET /metadata/instance\"]"), "{rules}");
    write("enforce", &rules);
    env.status_when("the mode has changed", |status| status.mode.as_deref() == Some("enforce"));
    env.assert_nothing_arrives(|| assert!(!env.reaches(&pods[1].netns)));
    // The broker opens its listener after the change of the mode. Until then, the pod is denied.
    poll_until(LONG, "an answer of the broker", || {
        let answer = env.in_cgroup(|| -> io::Result<String> {
            let mut stream = pods[0].netns.run(|| connect(METADATA, SHORT))?;
            stream.set_read_timeout(Some(LONG))?;
            stream.write_all(b"GET /metadata/instance HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
            io::read_to_string(stream)
        });
        answer.is_ok_and(|answer| answer.starts_with("HTTP/1.1 200 ")).then_some(())
    });
    let denied = || {
        let denials = denials(&env);
        denials.into_iter().filter(|denial| denial["verdict"] == "denied").collect::<Vec<_>>()
    };
    let is_web = |denial: &Value| denial["service_account"] == "web";
    let report_denial = || {
        report(&env, &["--reset"]);
        poll_until(LONG, "the denied pod in the report", || {
            assert!(!env.reaches(&pods[1].netns));
            Some(denied()).filter(|found| found.iter().any(is_web))
        })
    };
    // The first report can have denials of the pod that waited for its listener: the agent reads them together with later ones.
    report_denial();
    let found = report_denial();
    assert!(found.iter().all(is_web), "{found:?}");

    // The report is available without an agent, and includes later denials.
    agent.kill9();
    let before = sum(&denied());
    poll_until(LONG, "a later denial in the report", || {
        assert!(!env.reaches(&pods[1].netns));
        (sum(&denied()) > before).then_some(())
    });
    drop(cgroups);
    env.unload();
    assert!(is_answered(&pods[1].netns));
}
