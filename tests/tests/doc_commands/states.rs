//! Runs documented commands in the states in which they are documented.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process::Output};

use imds_tests::{
    AttachMode, METADATA, Pod, PodLink, TestEnv, WHOLE_TEST, lacks_program,
    poll::poll_until,
    probe::{LONG, SHORT, http_get, http_get_at},
    skip_without_netns_cookie, skip_without_tcx,
};

use crate::{
    commands::{self, documents},
    documented_node::{CONFIG_FILE, DocumentedNode, PIN_DIR, bash},
    every_command, lacks_repository,
    runs::{RUNS, Run, State},
    shown_output::missing,
};

/// Address that a rule of the node translates to the metadata service.
const TRANSLATED: &str = "198.51.100.77";

/// Commands of [`State::Enforcing`] whose output docs/commands.md shows, with the section.
const SECTIONS: [(&str, &str); 2] = [("imds-agent verify", "verify"), ("imds-agent doctor", "doctor")];

/// A place in which documented commands run: a node with its pin directory, and values of placeholders.
struct Shell<'e> {
    env: &'e TestEnv,
    /// Contains a program `imds-agent` that adds the pin directory.
    bin: PathBuf,
    /// Placeholders and constants of the documents, with their values here.
    values: Vec<(&'static str, String)>,
}

impl<'e> Shell<'e> {
    fn new(env: &'e TestEnv, config: &str, pod: &Pod) -> Self {
        let bin = env.scratch_dir().join("bin");
        fs::create_dir(&bin).unwrap();
        let agent = env.imds_agent(&[]).command().get_program().to_owned();
        let (agent, pin_dir) = (agent.to_str().unwrap(), env.pin_dir().to_str().unwrap().to_owned());
        let script = format!(
            "#!/bin/sh\ncase \" $* \" in\n\
             *--pin-dir* | *--help* | *--version* | *\" config check \"* | *\" completions \"* | *\" man \"*) exec {agent} \"$@\" ;;\n\
             *\" unload \"*) exec {agent} \"$@\" --pin-dir {pin_dir} --state-dir {} ;;\n\
             *) exec {agent} \"$@\" --pin-dir {pin_dir} ;;\nesac\n",
            env.state_dir().display()
        );
        let wrapper = bin.join("imds-agent");
        fs::write(&wrapper, script).unwrap();
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
        let values = vec![
            (CONFIG_FILE, config.to_owned()),
            (PIN_DIR, pin_dir.clone()),
            ("MAP", format!("{pin_dir}/maps/imds_policy")),
            ("PROG", format!("pinned {pin_dir}/progs/imds_connect4")),
            ("HOOK", "connect4".to_owned()),
            ("FILE", config.to_owned()),
            ("DIR", pin_dir),
            ("/sys/fs/cgroup", env.cgroup().to_str().unwrap().to_owned()),
            ("IFACE", pod.host_ifname.clone()),
            ("INTERFACE", pod.host_ifname.clone()),
            ("VETH", pod.host_ifname.clone()),
            ("NODE", env.node_address().to_string()),
        ];
        Self { env, bin, values }
    }

    fn run(&self, text: &str) -> Output {
        let mut text = text.to_owned();
        for (name, value) in &self.values {
            text = replace_word(&text, name, value);
        }
        let mut command = self.env.node.command("bash");
        command.env("PATH", format!("{}:{}", self.bin.display(), std::env::var("PATH").unwrap()));
        // A mount of the examples must not stay.
        if text.starts_with("mount ") {
            text = format!("unshare --mount {text}");
        }
        let output = self.env.in_cgroup(|| bash(command, &text, self.env.scratch_dir()));
        eprintln!("$ {text}\n{}", String::from_utf8_lossy(&output.stdout));
        output
    }

    /// Runs the commands of a state, in the order of the list. Returns the commands that exit with another code than the
    /// list has, or that lack documented output.
    fn run_state(&self, state: State) -> Vec<String> {
        let documented = every_command();
        let mut failures = Vec::new();
        for Run { text, exit, prints, .. } in RUNS.iter().filter(|run| run.state == state) {
            let output = self.run(text);
            let printed = String::from_utf8_lossy(&output.stdout);
            let mut problems: Vec<_> = prints
                .iter()
                .filter(|part| !printed.contains(**part))
                .map(|part| format!("no {part:?}"))
                .collect();
            let shown = documented.iter().filter(|command| command.text == *text);
            problems.extend(shown.flat_map(|command| missing(&command.output, &printed)));
            let section = SECTIONS.iter().find(|(shown, _)| state == State::Enforcing && shown == text);
            problems.extend(section.and_then(|(_, section)| unlike_shown(section, &output.stdout)));
            if output.status.code() != Some(*exit) || !problems.is_empty() {
                failures.push(format!("{text}: {problems:?}, {output:?}"));
            }
        }
        failures
    }
}

/// Replaces a placeholder where it is not part of a longer word.
fn replace_word(text: &str, name: &str, value: &str) -> String {
    let is_part = |char: char| char.is_ascii_alphanumeric() || char == '_';
    let (mut replaced, mut rest) = (String::new(), text);
    while let Some(start) = rest.find(name) {
        let (before, after) = (&rest[..start], &rest[start + name.len()..]);
        let is_word = !before.ends_with(is_part) && !after.starts_with(is_part);
        replaced.extend([before, if is_word { value } else { name }]);
        rest = after;
    }
    replaced + rest
}

/// Returns the lines of the output that docs/commands.md shows in a section, from its blocks without commands.
fn shown(section: &str) -> Vec<String> {
    let documents = documents();
    let page = documents.iter().find(|page| page.path.ends_with("commands.md")).unwrap();
    let blocks = page.blocks.iter().filter(|block| {
        block.section == section && matches!(commands::content(block), Ok(commands::Content::Data))
    });
    let lines: Vec<_> = blocks.flat_map(|block| block.lines.clone()).collect();
    assert!(!lines.is_empty(), "docs/commands.md shows no output in section {section}");
    lines
}

/// Returns the parts that docs/commands.md shows in a section, and that the output lacks.
fn unlike_shown(section: &str, printed: &[u8]) -> Option<String> {
    let missing = missing(&shown(section), &String::from_utf8_lossy(printed));
    (!missing.is_empty())
        .then(|| format!("docs/commands.md, section {section}: {missing:?} is not in the output"))
}

#[test]
fn commands_run_in_their_documented_states() {
    let programs = ["bash", "bpftool", "findmnt", "iptables", "jq", "nft", "nsenter", "ss", "tc", "unshare"];
    if lacks_repository()
        || lacks_program(WHOLE_TEST, &programs)
        || skip_without_tcx()
        || skip_without_netns_cookie()
    {
        return;
    }
    let node = DocumentedNode::new();
    let env = &node.env;
    let web = node.add_pod("tools", "web-7d4b9", "web");
    let mut agent = node.agent().spawn_ready();
    let cgroup = env.add_cgroup("example");
    let mut shell = Shell::new(env, node.config.to_str().unwrap(), &node.denied.pod);
    shell.values.push(("PID", node.denied.process.to_string()));
    shell.values.push(("CGROUP", cgroup.path().to_str().unwrap().to_owned()));
    node.send_requests();
    let mut nft = node.env.node.command("nft");
    nft.arg(format!(
        "table ip nat {{ chain prerouting {{ type nat hook prerouting priority -100; \
         ip daddr {TRANSLATED} dnat to {METADATA}; }}; }}"
    ));
    assert!(nft.status().unwrap().success());
    let translated = format!("{TRANSLATED}:80").parse().unwrap();
    assert!(!env.in_cgroup(|| http_get_at(&web.pod.netns, translated, SHORT)).is_answer());
    // Requests of a pod behind a bridge are denied before the agent knows the pod, and afterwards.
    poll_until(LONG, "the pods", || env.status().has_resolved(3).then_some(()));

    let mut failures = shell.run_state(State::Enforcing);
    failures.extend(unlike_shown("events", &shell.run("imds-agent events --no-follow --since 10m").stdout));
    let rule =
        "iptables -t mangle -A FORWARD ! -s NODE -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DROP";
    assert!(shell.run(rule).status.success());
    failures.extend(unlike_shown("Firewall rules", &shell.run("imds-agent doctor").stdout));
    assert!(shell.run("iptables -t mangle -F").status.success());
    let example = env.scratch_dir().join("example.toml");
    let text = "provider = 'azure'\n[preset.wireserver]\nallow_ports = ['udp/53']\n[[exempt]]\nname = 'backup'\n\
                cgroup = 'machine.slice/backup.scope'\nendpoints = ['imds']\n";
    fs::write(&example, text).unwrap();
    failures.extend(unlike_shown(
        "config",
        &shell.run(&format!("imds-agent config check {}", example.display())).stdout,
    ));
    let _late = node.add_pod("tools", "web-5c6d7", "web");
    agent.wait_for_log("attached from_pod to ", LONG);
    failures.extend(unlike_shown("Log", agent.log().as_bytes()));

    node.configure("audit");
    poll_until(LONG, "audit mode", || (env.status().mode.as_deref() == Some("audit")).then_some(()));
    assert!(env.in_cgroup(|| http_get(&web.pod.netns, METADATA, SHORT)).is_answer());
    poll_until(LONG, "the report", || {
        let printed = shell.run("imds-agent report").stdout;
        missing(&shown("report"), &String::from_utf8_lossy(&printed)).is_empty().then_some(())
    });
    failures.extend(shell.run_state(State::Auditing));

    agent.wait_ready();
    agent.kill9();
    failures.extend(shell.run_state(State::Stopped));
    failures.extend(shell.run_state(State::Unloaded));
    assert!(!env.pin_dir().exists());
    assert!(failures.is_empty(), "{failures:#?}");
}

/// The node of the example has no pods of Kubernetes.
#[test]
fn status_without_kubernetes() {
    if lacks_repository() || lacks_program(WHOLE_TEST, &["bash"]) || skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pods = [env.add_pod(PodLink::Routed), env.add_pod(PodLink::Routed)];
    let hooks = ["from_pod", "node_egress", "socket", "local_service"];
    let _agent = env.agent().hooks(&hooks).spawn_ready();
    let printed = Shell::new(&env, "", &pods[0]).run("imds-agent status").stdout;
    assert_eq!(unlike_shown("status", &printed), None);
}

/// The steps for a node whose binary is lost, which docs/troubleshooting.md lists.
#[test]
fn manual_unload_with_clsact() {
    if lacks_repository() || lacks_program(WHOLE_TEST, &["bash", "tc"]) {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    env.start_agent(AttachMode::Clsact).kill9();
    let mut shell = Shell::new(&env, "", &pod);
    let reaches = || http_get(&pod.netns, METADATA, SHORT).is_answer();
    assert!(!reaches());
    let [show, delete] =
        ["tc filter show dev IFACE ingress", "tc filter del dev IFACE ingress prio PRIO handle HANDLE bpf"];
    let printed = shell.run(show).stdout;
    let printed = String::from_utf8(printed).unwrap();
    let line =
        printed.lines().find(|line| line.contains("imds_from_pod")).unwrap_or_else(|| panic!("{printed}"));
    let word_after =
        |name: &str| line.split_whitespace().skip_while(|word| *word != name).nth(1).unwrap().to_owned();
    shell.values.extend([("PRIO", word_after("pref")), ("HANDLE", word_after("handle"))]);
    let failures = shell.run_state(State::LostBinary);
    assert!(failures.is_empty(), "{failures:#?}");
    let text = |command: &str| RUNS.iter().any(|run| run.state == State::LostBinary && run.text == command);
    assert!(text(show) && text(delete));
    assert!(reaches() && !String::from_utf8_lossy(&shell.run(show).stdout).contains("imds_"));
}
