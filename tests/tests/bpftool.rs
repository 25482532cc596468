//! The commands in docs/maps.md print what the document shows.

use std::{fs, path::Path, process::Command};

use imds_tests::{
    AttachMode, METADATA, PodLink, TestEnv, WHOLE_TEST,
    api_server::{self, ApiServer},
    kubelet::{Driver, Kubelet, new_uid},
    lacks_program, output, packets,
    poll::poll_until,
    probe::{LONG, SHORT, http_get, send_ipv4},
    skip_without_netns_cookie, skip_without_tcx,
};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/maps.md");
/// Pin directory in the document.
const PIN_DIR: &str = "/sys/fs/bpf/imds";
/// Configuration file in the document.
const CONFIG_FILE: &str = "/etc/imds-agent/imds.toml";
const NODE: &str = "node-0";
const CONFIG: &str = "provider = 'azure'
[[exempt]]
name = 'agents'
namespace = 'kube-system'
service_account = 'agent'
";

/// A command of the document, and the output that the document shows.
#[derive(Debug)]
struct Example {
    command: String,
    output: Vec<String>,
}

/// Returns the examples of the document. A command starts with `# ` and ends where its quotes are closed.
fn examples() -> Vec<Example> {
    let document = fs::read_to_string(DOCUMENT).unwrap();
    let mut examples = Vec::<Example>::new();
    let mut in_output = false;
    for line in document.lines() {
        let Some(line) = line.strip_prefix("    ") else {
            in_output = false;
            continue;
        };
        if let Some(command) = line.strip_prefix("# ") {
            examples.push(Example { command: command.to_owned(), output: Vec::new() });
            in_output = true;
        } else if let Some(example) = examples.last_mut().filter(|_| in_output) {
            let is_open = example.command.matches('\'').count() % 2 == 1 || example.command.ends_with('\\');
            if is_open {
                example.command.push('\n');
                example.command.push_str(line);
            } else {
                example.output.push(line.to_owned());
            }
        }
    }
    examples
}

/// Returns the different lines in an order that does not depend on hashes, with `#` for each word that contains a digit: indices,
/// numbers and names of interfaces differ between nodes.
fn without_numbers<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let without = |line: &str| {
        let mut words = String::new();
        for word in line.split_inclusive(|char: char| !char.is_alphanumeric() && char != '_') {
            let end = word.trim_start_matches(|char: char| char.is_alphanumeric() || char == '_');
            let is_number = word.contains(|char: char| char.is_ascii_digit());
            words.push_str(if is_number { "#" } else { &word[..word.len() - end.len()] });
            words.push_str(end);
        }
        words
    };
    let mut lines: Vec<_> = lines.into_iter().map(without).collect();
    lines.sort();
    lines.dedup();
    lines
}

fn run(command: &str, maps: &Path) -> String {
    let mut bash = Command::new("bash");
    bash.args(["-o", "pipefail", "-c", command]).current_dir(maps);
    let output = output(bash);
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Reports whether the values of a map contain all of these words.
fn has(map: &str, words: &[&str], maps: &Path) -> bool {
    let printed = run(&format!("bpftool -j map dump pinned {map} | jq -c '.[].formatted'"), maps);
    words.iter().all(|word| printed.contains(&format!("\"{word}\"")))
}

#[test]
fn documented_commands_print_names() {
    if lacks_program(WHOLE_TEST, &["bpftool", "jq", "bash"])
        || skip_without_tcx()
        || skip_without_netns_cookie()
    {
        return;
    }
    let env = TestEnv::new();
    let (server, kubelet) = (ApiServer::start_in(&env.node), Kubelet::new());
    let [denied, exempt] = [("shop", "web-0", "default"), ("kube-system", "agent-0", "agent")].map(
        |(namespace, name, account)| {
            let uid = new_uid();
            let pod = env.add_pod(PodLink::Routed);
            let mut cgroup = kubelet.add_pod(&uid, Driver::Cgroupfs);
            cgroup.start_in(&pod.netns);
            let mut object = api_server::pod(&uid, NODE, namespace, account, &[]);
            object["metadata"]["name"] = name.into();
            server.apply(object);
            (pod, cgroup)
        },
    );
    let [config, kubeconfig] = ["imds.toml", "kubeconfig"].map(|name| env.scratch_dir().join(name));
    server.write_kubeconfig(&kubeconfig);
    let kubernetes = format!("kubeconfig = '{}'\nnode_name = '{NODE}'\n", kubeconfig.display());
    fs::write(&config, format!("{CONFIG}[kubernetes]\n{kubernetes}")).unwrap();
    let (config, cgroup) = (config.to_str().unwrap(), env.cgroup().to_str().unwrap());
    let agent = env.agent().backend(AttachMode::Tcx).config_file(config).args(&["--cgroup", cgroup]);
    let _agent = agent.spawn_ready();
    let maps = env.pin_dir().join("maps");
    poll_until(LONG, "the exemption", || has("imds_exempt", &["interface", "netns"], &maps).then_some(()));
    for pod in [&exempt.0, &denied.0] {
        let packet = packets::udp(pod.address, METADATA, b"x");
        send_ipv4(&pod.netns, METADATA, &[packet]).unwrap();
    }
    assert!(!env.in_cgroup(|| http_get(&denied.0.netns, METADATA, SHORT)).is_answer());
    poll_until(LONG, "the events to be recorded", || {
        let recorded = has("imds_recent", &["from_pod", "node_egress", "socket", "denied", "exempt"], &maps)
            && has("imds_denials", &["from_pod", "socket"], &maps)
            && has("imds_pods", &["web-0", "agent-0"], &maps);
        recorded.then_some(())
    });
    let examples = examples();
    assert!(examples.len() > 15, "{examples:?}");
    let mut different = Vec::new();
    for Example { command, output } in &examples {
        let command = command.replace(PIN_DIR, env.pin_dir().to_str().unwrap());
        let printed = run(&command, &maps).replace(config, CONFIG_FILE);
        eprintln!("# {command}\n{printed}");
        if !output.is_empty() && command.contains("map dump") {
            let documented = output.iter().map(String::as_str);
            if without_numbers(printed.lines()) != without_numbers(documented) {
                different.push(command);
            }
        }
    }
    assert!(different.is_empty(), "docs/maps.md shows other output: {different:#?}");
    // The last command of the document changes the mode.
    assert_eq!(env.status().mode.as_deref(), Some("audit"));
}
