//! Documented commands on the files of a release, checked against the names that `cargo xtask release` gives them and the options of the
//! installation script.

use crate::tools::{ensure, read};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Commands whose arguments name no artifact.
const WITHOUT_ARTIFACT: [&str; 6] = [
    "minisign -G -p minisign.pub -s FILE",
    "minisign -V -P KEY -m SHA256SUMS",
    "rpm -U",
    "rpm -e",
    "rpm -e imds-agent",
    "sha256sum --check --ignore-missing SHA256SUMS",
];

/// Checks that a release has a file with this name.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let is_known = |name: &str| {
        let known = ["SHA256SUMS", "imds.yaml", "install.sh", "manifest.json"];
        let versioned =
            name.replace(VERSION, "VERSION").replace("arm64", "amd64").replace("aarch64", "x86_64");
        known.contains(&name)
            || [
                "imds-agent-VERSION-1.x86_64.rpm",
                "imds-agent-VERSION-linux-amd64.tar.gz",
                "imds-agent-VERSION-oci.tar",
                "imds-agent-chart-VERSION-oci.tar",
                "imds-agent_VERSION-1_amd64.deb",
                "kubectl-imds-VERSION-linux-amd64.tar.gz",
            ]
            .contains(&versioned.as_str())
    };
    ensure(is_known(name), || format!("a release of this version has no file {name}"))
}

/// Checks that a version is this one, or its placeholder.
pub(crate) fn check_version(version: &str) -> Result<(), String> {
    ensure([VERSION, "VERSION"].contains(&version), || format!("{version} is another version"))
}

/// Checks the arguments of a program that reads files of a release.
pub(crate) fn check(program: &str, arguments: &[String]) -> Result<(), String> {
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    if WITHOUT_ARTIFACT.contains(&format!("{program} {}", words.join(" ")).as_str()) {
        return Ok(());
    }
    match (program, &words[..]) {
        ("curl", ["-fsSLO", url]) => {
            let path = url.strip_prefix("https://releases.example.com/v").unwrap_or_default();
            let (version, name) = path.split_once('/').unwrap_or_default();
            check_version(version).and_then(|()| check_name(name))
        }
        ("rpm", ["-U", name]) | ("tar", ["-xzf", name, ..]) => check_name(name),
        ("sh", ["install.sh", options @ ..]) => {
            let mut options = options.iter().filter(|option| option.starts_with("--"));
            options.try_for_each(|option| {
                ensure(is_script_option(option), || format!("install.sh has no option {option}"))
            })
        }
        ("skopeo", ["copy", rest @ ..]) => {
            let Some([from, to]) = rest.last_chunk() else { return Err("two images are needed".to_owned()) };
            let is_tagged =
                to.starts_with("docker://registry.example.com/") && to.ends_with(&format!(":{VERSION}"));
            check_name(from.strip_prefix("oci-archive:").unwrap_or_default())
                .and_then(|()| ensure(is_tagged, || format!("{to} has no tag of this version")))
        }
        _ => Err("no rule checks these arguments".to_owned()),
    }
}

/// Reports whether the installation script has this option.
pub(crate) fn is_script_option(option: &str) -> bool {
    read("deploy/install.sh").contains(&format!("\n  {option} "))
}
