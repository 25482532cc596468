//! A node whose address is on an Open vSwitch bridge.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

use imds_tests::{
    METADATA, PodLink, Problem, Status, TestEnv, WHOLE_TEST,
    doctor::{doctor_report, one},
    known_here, lacks_program,
    poll::poll_until,
    probe::{LONG, SHORT, http_get, udp_echo},
};
use tempfile::TempDir;

use crate::{
    ALL,
    nics::{Nic, assert_exempt_pods, lacks_macvlan, set_address},
};

const BRIDGE: &str = "br-ex";
/// Datapath type of a datapath in vswitchd.
const USERSPACE: &str = "netdev";
/// Interface of that datapath, which the agent's reports name.
pub(crate) const USERSPACE_PORT: &str = "ovs-netdev";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const PROGRAMS: [&str; 4] = ["ovs-vsctl", "ovs-vswitchd", "ovsdb-server", "ovsdb-tool"];

/// Open vSwitch on a node with its own database. Dropping it ends its daemons.
struct OpenVSwitch<'w> {
    env: &'w TestEnv,
    dir: TempDir,
    daemons: Vec<Child>,
}

impl<'w> OpenVSwitch<'w> {
    fn start(env: &'w TestEnv) -> Self {
        let mut ovs =
            Self { env, dir: TempDir::with_prefix("imds-ovs-").expect("a directory"), daemons: Vec::new() };
        let database = ovs.path("conf.db");
        Self::run(ovs.command("ovsdb-tool").args(["create", &database, SCHEMA]));
        let remote = format!("--remote=p{}", ovs.socket());
        ovs.spawn(ovs.command("ovsdb-server").args([&database, &remote]));
        poll_until(LONG, "ovsdb-server", || Path::new(&ovs.path("db.sock")).exists().then_some(()));
        Self::run(ovs.vsctl().args(["--no-wait", "init"]));
        let control = format!("--unixctl={}", ovs.path("vswitchd.ctl"));
        ovs.spawn(ovs.command("ovs-vswitchd").args([&ovs.socket(), &control]));
        ovs
    }

    /// Adds a bridge with this port, in a datapath of this type.
    fn add_bridge(&self, bridge: &str, port: &str, datapath: &str) {
        let datapath = format!("datapath_type={datapath}");
        let mut command = self.vsctl();
        command.args(["add-br", bridge, "--", "set", "bridge", bridge, &datapath]);
        Self::run(command.args(["--", "add-port", bridge, port]));
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("a UTF-8 path").to_owned()
    }

    fn socket(&self) -> String {
        format!("unix:{}", self.path("db.sock"))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = self.env.node.command(program);
        for variable in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR"] {
            command.env(variable, self.dir.path());
        }
        command
    }

    fn vsctl(&self) -> Command {
        let mut command = self.command("ovs-vsctl");
        command.arg(format!("--db={}", self.socket())).arg("--timeout=10");
        command
    }

    #[track_caller]
    fn run(command: &mut Command) {
        let output = command.output().expect("start a program of Open vSwitch");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn spawn(&mut self, command: &mut Command) {
        let daemon = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.daemons.push(daemon.expect("start a daemon of Open vSwitch"));
    }
}

impl Drop for OpenVSwitch<'_> {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            // Both calls fail if the daemon has ended.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Returns the datapath type of the kernel module if it is loaded, otherwise that of vswitchd.
fn datapath_type() -> &'static str {
    let has_module = Path::new("/sys/module/openvswitch").exists();
    if has_module { "system" } else { USERSPACE }
}

#[test]
fn ovs_in_front_of_macvlan() {
    if lacks_program(WHOLE_TEST, &PROGRAMS) || lacks_macvlan() {
        return;
    }
    let env = TestEnv::new();
    let nic = Nic::Macvlan.install(&env);
    let ovs = OpenVSwitch::start(&env);
    ovs.add_bridge(BRIDGE, nic, datapath_type());
    set_address(&env, BRIDGE);
    assert_exempt_pods(&env);
}

/// vswitchd reads the packets of pods before `from_pod`, and sends them on sockets of the node. The agent reports that, and
/// attaches the sendmsg programs, so that at least all calls are denied.
#[test]
fn userspace_datapath_is_reported() {
    if lacks_program(WHOLE_TEST, &PROGRAMS) || lacks_macvlan() {
        return;
    }
    let env = TestEnv::new();
    let nic = Nic::Macvlan.install(&env);
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().hooks(&known_here(ALL)).spawn_ready();
    assert_eq!(one(&doctor_report(&env), "open_vswitch")["state"], "ok");

    let ovs = OpenVSwitch::start(&env);
    ovs.add_bridge(BRIDGE, nic, USERSPACE);
    set_address(&env, BRIDGE);
    let is_of_datapath = |problem: &&Problem| problem.interface.as_deref() == Some(USERSPACE_PORT);
    // A bridge that has no program yet is a problem too.
    let status = env.status_when("the datapath is reported", |status| {
        status.state == "degraded" && status.problems.iter().any(|problem| is_of_datapath(&problem))
    });
    let problem = status.problems.iter().find(is_of_datapath).expect("a problem");
    assert!(problem.problem.contains("from_pod does not see"), "{problem:?}");
    assert_eq!(env.imds_agent(&["status"]).output().status.code(), Some(3));
    assert_eq!(one(&doctor_report(&env), "open_vswitch")["state"], "degraded");
    poll_until(LONG, "the sendmsg programs", || {
        env.status().sockets.is_some_and(|sockets| sockets.sendmsg.attached).then_some(())
    });
    env.assert_nothing_arrives(|| {
        let is_answered = env.in_cgroup(|| {
            http_get(&pod.netns, METADATA, SHORT).is_answer()
                || udp_echo(&pod.netns, METADATA, SHORT).is_answer()
        });
        assert!(!is_answered);
    });

    OpenVSwitch::run(ovs.vsctl().args(["del-br", BRIDGE]));
    env.status_when("the datapath is gone", Status::is_ready);
    drop(agent);
    env.unload();
}
