//! `doctor` explains foreign firewall rules and programs that restrict the metadata service, and changes none of them.

use std::{
    fs, io,
    os::unix::net::UnixListener,
    path::Path,
    process::{Child, Command, Stdio},
};

use imds_tests::{
    PodLink, TestEnv, WHOLE_TEST,
    doctor::{all, assert_has, doctor_report, one},
    foreign_bpf::detach_link,
    output,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    skip, skip_without_netns_cookie,
};
use serde_json::Value;

const WIRESERVER: &str = "198.51.100.32";
/// Hooks that deny all packets of pods that the node forwards.
const HOOKS: [&str; 2] = ["from_pod", "node_egress"];

fn nft(env: &TestEnv, arguments: &[&str]) -> String {
    let mut command = env.node.command("nft");
    command.args(arguments);
    let output = output(command);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs iptables in the node. Returns false if it is not installed.
fn iptables(env: &TestEnv, arguments: &str) -> bool {
    let mut command = env.node.command("iptables");
    command.args(arguments.split(' '));
    match command.output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        output => {
            let output = output.unwrap();
            assert!(output.status.success(), "{arguments}: {output:?}");
            true
        }
    }
}

/// Returns the openings of a rule, which the advice names too.
#[track_caller]
fn opens(check: &Value) -> String {
    let opens = check["rule"]["opens"].as_array().unwrap();
    let opens: Vec<_> = opens.iter().map(|opening| opening.as_str().unwrap()).collect();
    assert_eq!(check["rule"]["removable"].as_bool(), Some(opens.is_empty()), "{check:#}");
    assert_eq!(check["remedy"].as_str().unwrap().contains("can be removed"), opens.is_empty(), "{check:#}");
    for opening in &opens {
        assert_has(check, "remedy", opening);
    }
    opens.join("; ")
}

#[test]
fn rules_are_explained_and_not_changed() {
    let env = TestEnv::new();
    let rules = "add table inet guard
        add chain inet guard forward { type filter hook forward priority 0; }
        add rule inet guard forward ip daddr 169.254.169.254 tcp dport 80 drop
        add rule inet guard forward ip daddr 198.51.100.10 drop
        add chain inet guard prerouting { type nat hook prerouting priority -100; }
        add rule inet guard prerouting ip daddr 169.254.0.0/16 tcp dport 80 dnat ip to 10.0.0.4:8181";
    assert_has(one(&doctor_report(&env), "firewall_rules"), "state", "ok");
    nft(&env, &[rules]);
    let _agent = env.agent().hooks(&HOOKS).spawn_ready();
    let before = nft(&env, &["--handle", "list", "ruleset"]);
    let found = doctor_report(&env);
    let [drops, leads] = all(&found, "firewall_rules")[..] else { panic!("{found:#}") };
    assert_has(drops, "remedy", "no conflict");
    assert_eq!((&drops["rule"]["conflicts"], &drops["rule"]["chain"]), (&false.into(), &"forward".into()));
    assert_has(leads, "remedy", "conflict");
    assert_eq!((&leads["rule"]["conflicts"], &leads["rule"]["origin"]), (&true.into(), &"kube2iam".into()));
    assert_eq!(nft(&env, &["--handle", "list", "ruleset"]), before);
    for rule in [drops, leads] {
        let remove = rule["rule"]["remove"].as_str().unwrap();
        nft(&env, &remove.split(' ').skip(1).collect::<Vec<_>>());
    }
    assert_has(one(&doctor_report(&env), "firewall_rules"), "state", "ok");
}

#[test]
fn aks_rule_is_recognized() {
    let env = TestEnv::new();
    let rule = "FORWARD 1 ! -s 10.0.0.4 -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DROP";
    if !iptables(&env, &format!("-t mangle -I {rule}")) {
        skip(WHOLE_TEST, "there is no iptables on this machine");
        return;
    }
    let found = doctor_report(&env);
    let check = one(&found, "firewall_rules");
    assert!(opens(check).contains("imds-agent is not loaded"), "{check:#}");
    let _agent = env.agent().hooks(&HOOKS).spawn_ready();
    let found = doctor_report(&env);
    let check = one(&found, "firewall_rules");
    assert_eq!((&check["rule"]["origin"], &check["rule"]["table"]), (&"aks".into(), &"mangle".into()));
    assert_eq!(opens(check), "");
    assert_has(check, "remedy", "--disable-imds-restriction");
    let remove = check["rule"]["remove"].as_str().unwrap();
    assert!(iptables(&env, remove.strip_prefix("iptables ").unwrap()));
    assert_has(one(&doctor_report(&env), "firewall_rules"), "state", "ok");
}

/// A hook that is enabled but not attached denies nothing that the rule denies.
#[test]
fn rule_is_kept_beside_gaps() {
    let forward = "add table inet guard
        add chain inet guard forward { type filter hook forward priority 0; }
        add rule inet guard forward ip daddr 169.254.169.254 drop";
    let uplink = TestEnv::UPLINK;
    let excluded = format!("[interfaces]\nexclude = ['{uplink}']");
    let env = TestEnv::new();
    nft(&env, &[forward]);
    let agent = env.agent().hooks(&["node_egress"]).config(&excluded).spawn();
    poll_until(LONG, "the excluded interface in the advice", || {
        opens(one(&doctor_report(&env), "firewall_rules"))
            .contains(&format!("{uplink} (interfaces.exclude)"))
            .then_some(())
    });
    agent.kill9();
    env.unload();

    // An ingress qdisc of another owner leaves no place for clsact.
    let mut qdisc = env.node.command("tc");
    qdisc.args(["qdisc", "add", "dev", uplink, "ingress"]);
    assert!(output(qdisc).status.success());
    let agent = env.agent().hooks(&["node_egress"]).args(&["--tc-backend", "clsact"]).spawn();
    poll_until(LONG, "the interface without its program in the advice", || {
        opens(one(&doctor_report(&env), "firewall_rules"))
            .contains(&format!("interface {uplink}: "))
            .then_some(())
    });
    drop(agent);
    env.unload();
}

#[test]
fn rule_for_a_service_of_the_node_is_kept() {
    let env = TestEnv::new();
    nft(
        &env,
        &["add table inet guard
        add chain inet guard raw { type filter hook prerouting priority -300; }
        add rule inet guard raw ip daddr 169.254.169.254 drop"],
    );
    let _agent = env.agent().hooks(&HOOKS).spawn_ready();
    assert_eq!(opens(one(&doctor_report(&env), "firewall_rules")), "");
    env.node.ip("address add 169.254.169.254/32 dev lo");
    assert_eq!(
        opens(one(&doctor_report(&env), "firewall_rules")),
        "requests to the service on the node itself at 169.254.169.254, from its own processes and from other machines"
    );
}

/// Regression test: each of these rules was once reported as removable, although its removal opened access.
#[test]
fn broader_rules_are_kept() {
    let env = TestEnv::new();
    let allowed =
        format!("[[endpoint]]\nname = 'wire'\naddress = '{WIRESERVER}'\nallow_ports = ['udp/53']\n");
    let rules = format!(
        "add table inet guard
        add set inet guard imds {{ type ipv4_addr; flags interval; elements = {{ 169.254.169.254, 10.9.0.0/24 }}; }}
        add map inet guard verdicts {{ type ipv4_addr : verdict; elements = {{ {WIRESERVER} : drop }}; }}
        add chain inet guard output {{ type filter hook output priority 0; }}
        add rule inet guard output ip daddr 169.254.169.254 tcp dport 80 drop
        add rule inet guard output ip daddr {WIRESERVER} meta skuid != 0 drop
        add chain inet guard forward {{ type filter hook forward priority 0; }}
        add rule inet guard forward ip daddr 169.254.0.0/16 drop
        add rule inet guard forward ip daddr {WIRESERVER} udp dport {{ 53, 67 }} drop
        add rule inet guard forward ip daddr @imds drop
        add rule inet guard forward ip daddr vmap @verdicts
        add rule inet guard forward ip daddr . tcp dport {{ 169.254.169.254 . 80, {WIRESERVER} . 80 }} drop"
    );
    nft(&env, &[&rules]);
    let agent = env.agent().hooks(&HOOKS).config(&allowed).spawn_ready();
    let found = doctor_report(&env);
    let found: Vec<_> = all(&found, "firewall_rules").into_iter().map(opens).collect();
    let expected = [
        "the node's own processes and pods with hostNetwork",
        "the node's own processes (uid not 0)",
        "169.254.0.0/16 except 169.254.169.254",
        "udp/53 of 198.51.100.32",
        "10.9.0.0/24, not protected",
        "udp/53 of 198.51.100.32",
        "",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (opens, part) in found.iter().zip(expected) {
        assert!(opens.contains(part) && opens.is_empty() == part.is_empty(), "{part}: {opens}");
    }
    drop(agent);
    for mode in ["audit", "off"] {
        let agent = env.agent().hooks(&HOOKS).config(&format!("mode = '{mode}'\n{allowed}")).spawn_ready();
        let found = doctor_report(&env);
        for check in all(&found, "firewall_rules") {
            assert!(opens(check).contains(&format!("in the mode {mode}")), "{check:#}");
        }
        drop(agent);
    }
    env.unload();
}

/// The tests attach the programs to a cgroup below the root, so that they restrict only the processes in that cgroup.
#[test]
fn allow_list_covers_the_cgroup_of_its_programs() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let rules = "add table inet guard
        add chain inet guard output { type filter hook output priority 0; }
        add rule inet guard output ip daddr 169.254.169.254 meta skuid 1000 drop";
    nft(&env, &[rules]);
    let agent = env.agent().hooks(&HOOKS).config("[node]\nallow = []\n").spawn_ready();
    let opened = || opens(one(&doctor_report(&env), "firewall_rules"));
    let cgroup = env.cgroup().file_name().unwrap().to_str().unwrap().to_owned();
    let outside = format!("{cgroup}, to which node_allow is attached");
    assert!(
        opened().contains("(uid 1000) outside of the cgroup /") && opened().contains(&outside),
        "{}",
        opened()
    );
    drop(agent);
    detach_link(&env.pin_dir().join("links/node_connect4"));
    assert!(opened().ends_with("lets pass: imds_node_conn4 of node_allow is not attached"), "{}", opened());
    env.unload();
}

/// Following the advice opens nothing: the pod stays denied after every removable rule is removed.
#[test]
fn removing_a_removable_rule_opens_nothing() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let rules = "add table inet guard
        add chain inet guard forward { type filter hook forward priority 0; }
        add rule inet guard forward ip daddr 169.254.169.254 drop";
    nft(&env, &[rules]);
    assert!(!http_get(&pod.netns, imds_tests::METADATA, SHORT).is_answer());
    let _agent = env.agent().hooks(&HOOKS).spawn_ready();
    env.wait_enforced(&pod);
    let found = doctor_report(&env);
    let check = one(&found, "firewall_rules");
    assert_eq!(opens(check), "");
    let remove = check["rule"]["remove"].as_str().unwrap();
    nft(&env, &remove.split(' ').skip(1).collect::<Vec<_>>());
    env.assert_blocked(&pod);
}

/// A background process that ends with the test.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn metadata_programs_are_reported() {
    let env = TestEnv::new();
    assert_has(one(&doctor_report(&env), "metadata_programs"), "state", "ok");
    // /proc/net/unix shows the path that bind(2) received, whatever directory it is in.
    let root = env.scratch_dir().join("root");
    fs::create_dir_all(root.join("run/systemd")).unwrap();
    let socket = Path::new("/run/systemd/io.systemd.InstanceMetadata");
    let _socket = env.node.run(|| bind_below(&root, socket));
    env.node.ip("rule add fwmark 0x7fff0815 table 2147420181");
    let sleep = env.scratch_dir().join("azure-proxy-agent");
    fs::copy("/bin/sleep", &sleep).unwrap();
    let _agent = Background(Command::new(&sleep).arg("1000").stdin(Stdio::null()).spawn().unwrap());
    let found = doctor_report(&env);
    let [imdsd, gpa] = all(&found, "metadata_programs")[..] else { panic!("{found:#}") };
    assert_has(imdsd, "observed", "systemd-imdsd.socket serves metadata");
    assert_has(imdsd, "observed", "network locked");
    assert_has(imdsd, "remedy", "exempt pods");
    assert_has(gpa, "observed", "azure-proxy-agent.service");
    assert_has(gpa, "observed", "168.63.129.16:32526");
    env.node.ip("rule del fwmark 0x7fff0815");
    assert_has(all(&doctor_report(&env), "metadata_programs")[0], "observed", "network unlocked");
}

/// Binds a Unix socket to an absolute path below another root directory, on a separate thread.
fn bind_below(root: &Path, path: &Path) -> UnixListener {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
    nix::unistd::chroot(root).unwrap();
    UnixListener::bind(path).unwrap()
}
