//! Commands of other programs, checked against the files and names that this repository ships.

use std::{fs, path::Path, process::Command};

use imds_tests::lacks_program;
use serde_json::Value;

use crate::{agent_cli, artifacts, lacks_repository, markdown::repository, plugin_cli, xtask_cli};

const DAEMON_SET: &str = "deploy/kubernetes/base/daemonset.yaml";

/// Programs whose commands are not checked further, with the reason.
const EXCEPTIONS: [(&str, &str); 11] = [
    ("apparmor_parser", "runs in the test `security_modules`"),
    ("az", "needs an Azure subscription"),
    ("docker", "needs a registry"),
    ("grep", "filters output"),
    ("head", "filters output"),
    ("jq", "filters output"),
    ("promtool", "runs in the test `dashboards`"),
    ("restorecon", "needs SELinux"),
    ("rustup", "installs compilers"),
    ("semodule", "needs SELinux"),
    ("yq", "filters the output of helm"),
];

/// Checks one simple command. A command that fits no rule is an error.
pub(crate) fn check(words: &[String]) -> Result<(), String> {
    let [program, arguments @ ..] = words else { return Err("no program".to_owned()) };
    match program.as_str() {
        "imds-agent" | "/imds-agent" => agent_cli::parse(words).map(drop),
        "apt" | "apt-get" => apt(arguments),
        "curl" | "minisign" | "rpm" | "sh" | "sha256sum" | "skopeo" | "tar" => {
            artifacts::check(program, arguments)
        }
        "cargo" => xtask_cli::check_cargo(arguments),
        "cd" => directory(arguments),
        "helm" => helm(arguments),
        "install" => install(arguments),
        "journalctl" | "systemctl" | "systemd-analyze" => systemd(program, arguments),
        "kubectl" => kubectl(arguments),
        "kustomize" => kustomize(arguments),
        "podman" => podman(arguments),
        "rm" => remove(arguments),
        "sysctl" if words[1..] == ["kernel.bpf_stats_enabled=1"] => {
            exists("/proc/sys/kernel/bpf_stats_enabled".as_ref())
        }
        _ if EXCEPTIONS.iter().any(|(name, _)| name == program) => Ok(()),
        _ => Err("no rule checks this command, and no state of a node is listed in which it runs".to_owned()),
    }
}

pub(crate) fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn exists(path: &Path) -> Result<(), String> {
    let is_there = repository().join(path).exists();
    if is_there { Ok(()) } else { Err(format!("{} does not exist", path.display())) }
}

pub(crate) fn ensure(is_right: bool, problem: impl FnOnce() -> String) -> Result<(), String> {
    if is_right { Ok(()) } else { Err(problem()) }
}

/// Checks that a manifest has an object or a field with this name.
fn has_name(manifest: &str, name: &str) -> Result<(), String> {
    let is_there =
        read(manifest).lines().any(|line| line.trim().trim_start_matches("- ") == format!("name: {name}"));
    ensure(is_there, || format!("{manifest} has no name {name}"))
}

fn apt(arguments: &[String]) -> Result<(), String> {
    let known = ["install", "purge", "remove"];
    ensure(known.contains(&arguments[0].as_str()), || "unknown subcommand".to_owned())?;
    let mut names = arguments.iter().filter_map(|name| name.strip_prefix("./"));
    names.try_for_each(artifacts::check_name)
}

fn directory(arguments: &[String]) -> Result<(), String> {
    let [path] = arguments else { return Err("one directory is needed".to_owned()) };
    exists(path.as_ref())
}

/// Checks that the installed files exist.
fn install(arguments: &[String]) -> Result<(), String> {
    let [.., source, _] = arguments else { return Err("no files".to_owned()) };
    exists(source.as_ref())
}

/// Checks that the removed files are those that the installation creates.
fn remove(arguments: &[String]) -> Result<(), String> {
    let installation = read("docs/install-vm.md");
    let is_installed = |path: &&String| {
        let (directory, name) = path.rsplit_once('/').unwrap_or_default();
        [format!("`{path}`"), format!("{path}/"), format!("/{name} {directory}/")]
            .iter()
            .any(|text| installation.contains(text))
    };
    let paths = arguments.iter().filter(|argument| !argument.starts_with('-'));
    let unknown: Vec<_> = paths.filter(|path| !is_installed(path)).collect();
    ensure(unknown.is_empty(), || format!("docs/install-vm.md does not install {unknown:?}"))
}

fn systemd(program: &str, arguments: &[String]) -> Result<(), String> {
    let unit = read("deploy/systemd/imds-agent.service");
    let (verb, units) = match program {
        "journalctl" => ("-u", &arguments[1..]),
        _ => (arguments[0].as_str(), &arguments[1..]),
    };
    let is_possible = match verb {
        "reload" => unit.contains("\nExecReload="),
        "enable" | "disable" => unit.contains("\n[Install]\n"),
        _ => ["-u", "edit", "restart", "security", "start", "stop"].contains(&verb),
    };
    ensure(is_possible && (program != "journalctl" || arguments[0] == "-u"), || {
        format!("unknown verb {verb}")
    })?;
    let wrong = units.iter().find(|name| !["imds-agent", "--now"].contains(&name.as_str()));
    ensure(wrong.is_none(), || format!("{wrong:?} is not the unit in deploy/systemd"))
}

/// Checks a command that runs in a container of the image.
fn in_container(words: &[String]) -> Result<(), String> {
    let entry = words.first().map(String::as_str).unwrap_or_default();
    let is_entry = read("deploy/image/Containerfile").contains(&format!("ENTRYPOINT [\"{entry}\"]"));
    ensure(is_entry, || format!("{entry} is not the program of the image"))?;
    agent_cli::parse(words).map(drop)
}

fn kubectl(arguments: &[String]) -> Result<(), String> {
    const CONFIG_CHECK: &str = "deploy/helm/imds-agent/templates/config-check.yaml";
    const VALUES: &str = "deploy/helm/imds-agent/values.yaml";
    const NAMESPACE: &str = "deploy/kubernetes/base/namespace.yaml";
    const NODE_REPORT: &str = "imds-agent/src/controller/node_report.rs";
    match arguments.first().map(String::as_str) {
        Some("imds") => return plugin_cli::check(arguments).map(drop),
        Some("krew") => return plugin_cli::check_krew(&arguments[1..]),
        _ => {}
    }
    let own = arguments.iter().position(|word| word == "--").unwrap_or(arguments.len());
    if let Some(inner) = arguments.get(own + 1..) {
        // `kubectl run` starts the entry point of the image.
        let entry = arguments.first().filter(|verb| *verb == "run").map(|_| "/imds-agent".to_owned());
        in_container(&entry.iter().chain(inner).cloned().collect::<Vec<_>>())?;
    }
    let mut words = arguments[..own].iter().map(String::as_str);
    let mut verb = vec![words.next().unwrap_or_default()];
    if verb == ["rollout"] {
        verb.extend(words.next());
    }
    let known =
        ["apply", "create", "delete", "describe", "exec", "get", "label", "logs", "rollout", "run", "wait"];
    ensure(known.contains(&verb[0]), || format!("unknown verb {verb:?}"))?;
    let mut options = Vec::new();
    while let Some(word) = words.next() {
        match word {
            "--namespace" | "-n" | "namespace" => has_name(NAMESPACE, words.next().unwrap_or_default())?,
            "--kustomize" => exists(&Path::new(words.next().unwrap_or_default()).join("kustomization.yaml"))
                .or_else(|error| {
                    if arguments.last().is_some_and(|last| last == ".") { Ok(()) } else { Err(error) }
                })?,
            "--label-columns" => {
                let keys = format!("keys: [{}]", words.next().unwrap_or_default());
                ensure(read(VALUES).contains(&keys), || format!("{VALUES} has no {keys}"))?;
            }
            "POD" | "pod" | "config-check" | "--overwrite" | "--quiet" | "--rm" | "--stdin" | "node"
            | "namespaces" | "--all" | "--timeout=5m" => {}
            _ if word.starts_with("--for=condition=") => {
                let condition = word.trim_start_matches("--for=condition=");
                let is_known = read(NODE_REPORT).contains(&format!("\"{condition}\""));
                ensure(is_known, || format!("the agent sets no condition {condition}"))?;
            }
            "--image" | "--restart" => drop(words.next()),
            "job/imds-agent-config-check" => {
                ensure(read(CONFIG_CHECK).contains("kind: Job\n"), || format!("{CONFIG_CHECK} has no Job"))?;
            }
            _ if word.starts_with("pod-security.kubernetes.io/") => {
                let label = word.replace('=', ": ");
                ensure(read(NAMESPACE).contains(&label), || format!("{NAMESPACE} has no label {label}"))?;
            }
            _ => {
                let object = word.strip_prefix("daemonset/").or_else(|| word.strip_prefix("ds/"));
                has_name(DAEMON_SET, object.ok_or_else(|| format!("unknown argument {word}"))?)?;
            }
        }
        if word.starts_with("--") {
            options.push(word.split('=').next().unwrap_or(word));
        }
    }
    if options.is_empty() || lacks_program("options of kubectl", &["kubectl"]) {
        return Ok(());
    }
    let help =
        |arguments: &[&str]| Command::new("kubectl").args(arguments).output().expect("run kubectl").stdout;
    let help = [help(&[&verb[..], &["--help"]].concat()), help(&["options"])].concat();
    let help = String::from_utf8_lossy(&help).into_owned();
    let unknown = options.iter().find(|option| !help.contains(&format!("{option}=")));
    ensure(unknown.is_none(), || format!("kubectl {} has no option {unknown:?}", verb.join(" ")))
}

fn kustomize(arguments: &[String]) -> Result<(), String> {
    let [edit, set, image, images @ ..] = arguments else { return Err("unknown subcommand".to_owned()) };
    ensure([edit, set, image] == ["edit", "set", "image"], || "unknown subcommand".to_owned())?;
    let mut names = images.iter().map(|image| image.split('=').next().unwrap_or_default());
    names.try_for_each(|name| {
        let is_used = read(DAEMON_SET).lines().any(|line| line.trim() == format!("image: {name}"));
        // An overlay does not find an image that the base has renamed.
        let is_kept = !read("deploy/kubernetes/base/kustomization.yaml").contains("newName:");
        ensure(is_used && is_kept, || format!("the edit of {name} in an overlay has no effect"))
    })
}

fn helm(arguments: &[String]) -> Result<(), String> {
    const CHART: &str = "deploy/helm/imds-agent";
    let schema: Value = serde_json::from_str(&read("deploy/helm/imds-agent/values.schema.json")).unwrap();
    let mut words = arguments.iter().map(String::as_str);
    let verb = words.next().unwrap_or_default();
    let known = ["install", "rollback", "template", "uninstall", "upgrade"];
    ensure(known.contains(&verb), || format!("unknown verb {verb}"))?;
    while let Some(word) = words.next() {
        match word {
            "imds-agent" | CHART | "oci://registry.example.com/charts/imds-agent" | "--reuse-values" => {}
            "--version" => artifacts::check_version(words.next().unwrap_or_default())?,
            "--namespace" => {
                has_name("deploy/kubernetes/base/namespace.yaml", words.next().unwrap_or_default())?;
            }
            "--values" => drop(words.next()),
            "--show-only" => exists(&Path::new(CHART).join(words.next().unwrap_or_default()))?,
            "--set" => {
                let key = words.next().and_then(|value| value.split('=').next()).unwrap_or_default();
                let pointer = format!("/properties/{}", key.replace('.', "/properties/"));
                ensure(schema.pointer(&pointer).is_some(), || format!("the chart has no value {key}"))?;
            }
            _ => return Err(format!("unknown argument {word}")),
        }
    }
    Ok(())
}

fn podman(arguments: &[String]) -> Result<(), String> {
    let Some(verb) = arguments.first() else { return Err("no verb".to_owned()) };
    ensure(["exec", "pull", "push", "rm", "run", "volume"].contains(&verb.as_str()), || {
        format!("unknown verb {verb}")
    })?;
    for name in arguments.iter().filter_map(|word| word.strip_prefix("oci-archive:")) {
        artifacts::check_name(name)?;
    }
    if let Some(entry) = arguments.iter().position(|word| word == "/imds-agent") {
        in_container(&arguments[entry..])?;
    }
    let Some(flag) = arguments.iter().position(|word| word == "--cap-add") else { return Ok(()) };
    let added: Vec<_> = arguments[flag + 1].split(',').map(|name| format!("CAP_{name}")).collect();
    let line = format!("\nCapabilityBoundingSet={}\n", added.join(" "));
    ensure(read("deploy/systemd/imds-agent.service").contains(&line), || {
        "unlike the capabilities of the unit".to_owned()
    })
}

#[test]
fn wrong_names_are_found() {
    if lacks_repository() {
        return;
    }
    for right in [
        "helm upgrade imds-agent deploy/helm/imds-agent --set config.mode=off",
        "systemctl reload imds-agent",
        "kustomize edit set image imds-agent=x",
        "kubectl run config-check --image x --rm --stdin -- config check -",
        "kubectl wait --for=condition=MetadataProtected node --all --timeout=5m",
    ] {
        assert_eq!(check(&right.split(' ').map(str::to_owned).collect::<Vec<_>>()), Ok(()), "{right}");
    }
    for wrong in [
        "helm upgrade imds-agent deploy/helm/imds-agent --set config.modus=off",
        "helm install imds-agent deploy/helm/imds",
        "kubectl rollout status --namespace imds-agent daemonset/imds",
        "kubectl rollout status --namespace imds daemonset/imds-agent",
        "kubectl exec --namespace imds-agent POD -- /imds-agent uninstall",
        "kubectl wait --for=condition=MetadataProtect node --all",
        "kubectl exec --namespace imds-agent POD -- imds-agent unload",
        "kubectl apply --kustomize deploy/kubernetes/overlays/none",
        "kustomize edit set image imds=x",
        "kustomize edit set image localhost/imds-agent=x",
        "kubectl run config-check --image x -- config test -",
        "podman exec imds-agent /imds-agent stop",
        "install -m 644 deploy/imds.conf /etc/imds-agent/imds.toml",
        "rm /usr/bin/imds",
        "apt install ./imds-agent_0.0.9-1_amd64.deb",
        "helm install imds-agent oci://registry.example.com/charts/imds-agent --version 0.0.9",
        "rpm -U imds-agent_0.1.0-1.x86_64.rpm",
        "sh install.sh --offline",
        "curl -fsSLO https://releases.example.com/v0.0.9/install.sh",
        "skopeo copy --all oci-archive:imds-agent-oci.tar docker://registry.example.com/imds-agent:0.1.0",
        "systemctl start imds",
        "cargo xtask bench --documents",
        "cargo xtask benchmark",
        "cargo test -p imds-tests --test verified",
        "frobnicate imds-agent",
    ] {
        assert!(check(&wrong.split(' ').map(str::to_owned).collect::<Vec<_>>()).is_err(), "{wrong}");
    }
}
