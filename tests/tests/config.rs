//! Commands for the configuration and the command line, which need no running agent.

use std::{
    fs,
    io::Write as _,
    process::{Output, Stdio},
};

use imds_tests::{TestEnv, output};

const COMMANDS: [&str; 9] =
    ["run", "status", "events", "verify", "doctor", "config", "unload", "completions", "man"];

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

const EFFECTIVE: &str = "mode = 'audit'
provider = 'azure'
[hooks]
socket = false
[metrics]
listen = '127.0.0.1:9300'
[kubernetes]
enabled = true
node_name = 'node-7'
[preset.wireserver]
allow_ports = ['tcp/80']
[[exempt]]
name = 'backup'
cgroup = 'machine.slice/a.scope'
endpoints = ['wireserver']
[[exempt]]
name = 'web'
namespace = 'tools'
service_account = 'web'
audit = true
";

#[test]
fn check_reads_standard_input() {
    let env = TestEnv::new();
    let check = |text: &str| {
        let mut command = env.node.command(env.imds_agent(&[]).command().get_program());
        command.args(["config", "check", "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    assert!(stdout(&check("mode = 'audit'\n")).contains("mode       audit\n"));
    let refused = check("mode = 'of'\n");
    assert_eq!(refused.status.code(), Some(2));
    assert!(refused.stderr.starts_with(b"-:1:8: mode: "), "{refused:?}");
}

#[test]
fn check_reports_every_error() {
    let env = TestEnv::new();
    let path = env.scratch_dir().join("imds.toml");
    let path_text = path.to_str().unwrap();
    // Does not use the harness's command, which adds a pin directory.
    let check = || {
        let mut command = env.imds_agent(&[]).command();
        let program = command.get_program().to_owned();
        command = env.node.command(program);
        command.args(["config", "check", path_text]);
        output(command)
    };
    fs::write(&path, "mode = 'of'\n[hooks]\npod = true\n").unwrap();
    let refused = check();
    assert_eq!(refused.status.code(), Some(2));
    let text = String::from_utf8(refused.stderr).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let [mode, hook] = lines[..] else { panic!("{text}") };
    assert!(mode.starts_with(&format!("{path_text}:1:8: mode: ")), "{mode}");
    assert!(mode.ends_with("; did you mean \"off\"?"), "{mode}");
    assert!(hook.starts_with(&format!("{path_text}:3:1: hooks.pod: ")), "{hook}");

    fs::write(&path, EFFECTIVE).unwrap();
    let taken = check();
    assert!(taken.stderr.is_empty(), "{taken:?}");
    let text = stdout(&taken);
    for line in [
        "ok",
        "mode       audit",
        "provider   azure",
        "endpoints  169.254.169.254 (imds)",
        "           168.63.129.16 (wireserver), allows tcp/80",
        "hooks      from_pod node_egress local_service",
        "exempt     cgroup machine.slice/a.scope to wireserver (rule backup)",
        "           namespace tools, service account web to all endpoints (rule web), audited",
        "metrics    127.0.0.1:9300",
        "kubernetes service account of the pod, node node-7",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} is not in:\n{text}");
    }
    assert_eq!(text.lines().next(), Some("ok"));
    fs::remove_file(&path).unwrap();
    assert_eq!(check().status.code(), Some(2));
}

#[test]
fn show_prints_effective_config() {
    let env = TestEnv::new();
    let show = |format: &str| env.imds_agent(&["config", "show", "-o", format]).output();
    assert_eq!(show("toml").status.code(), Some(1));
    let config = "on_deny = 'reject'\n[interfaces]\nexclude = ['lxc*']\n[[endpoint]]\nname = 'vault'\naddress = '10.0.0.9'";
    drop(env.agent().config(config).spawn_ready());

    let shown: serde_json::Value = serde_json::from_str(&stdout(&show("json"))).unwrap();
    let expected = serde_json::json!({
        "mode": "enforce",
        "on_deny": "reject",
        "on_deny_errno": "EPERM",
        "provider": "auto",
        "extra_endpoints": [],
        "hooks": { "from_pod": true, "node_egress": false, "socket": false, "host_network": false, "sendmsg": "auto", "local_service": false },
        "interfaces": { "include": [], "exclude": ["lxc*"] },
        "metrics": { "listen": ["127.0.0.1:9254"], "program_run_time": false },
        "events": { "verdicts": ["denied", "audited"], "sinks": [] },
        "preset": {},
        "kubernetes": { "enabled": "auto", "kubeconfig": "", "node_name": "", "events": false, "node_condition": false },
        "endpoint": [{ "name": "vault", "address": "10.0.0.9", "allow_ports": [] }],
        "exempt": [],
    });
    assert_eq!(shown, expected);

    // The TOML output is a configuration file with the same meaning.
    let file = env.scratch_dir().join("shown.toml");
    fs::write(&file, stdout(&show("toml"))).unwrap();
    let once = env.imds_agent(&["run"]).config_file(file.to_str().unwrap()).once();
    assert!(once.status.success(), "{once:?}");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&stdout(&show("json"))).unwrap(), expected);
    env.unload();
}

#[test]
fn completions_and_man_pages_are_complete() {
    let env = TestEnv::new();
    let run = |args: &[&str]| {
        let program = env.imds_agent(&[]).command().get_program().to_owned();
        let mut command = env.node.command(program);
        command.args(args);
        stdout(&output(command))
    };
    let help = run(&["--help"]);
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(&["completions", shell]);
        for command in COMMANDS {
            assert!(script.contains(command) && help.contains(command), "{command} for {shell}");
        }
    }
    let page = run(&["man"]);
    let dir = env.scratch_dir().join("man");
    run(&["man", dir.to_str().unwrap()]);
    for command in COMMANDS {
        assert!(page.contains(&format!("imds\\-agent\\-{command}(1)")), "{command}: {page}");
        let page = fs::read_to_string(dir.join(format!("imds-agent-{command}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{page}");
    }
    assert!(fs::read_to_string(dir.join("imds-agent-config-check.1")).unwrap().contains("FILE"));
}
