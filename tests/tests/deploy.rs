//! Facts that files in deploy repeat are the same in each file.

use std::net::IpAddr;

use imds_agent::config::provider::{EXTRAS, PROVIDERS};

/// Includes a file of deploy at compile time, because the test machines of other kernels have no files.
macro_rules! deploy {
    ($path:literal) => {
        include_str!(concat!("../../deploy/", $path))
    };
}

#[test]
fn copies_are_copies() {
    assert_eq!(deploy!("profiles/aks.toml"), deploy!("kubernetes/overlays/aks/imds.toml"));
    let rules = deploy!("prometheus/rules.yaml");
    assert_eq!(rules, deploy!("helm/imds-agent/files/rules.yaml"));
    let rules = &rules[rules.find("groups:").unwrap()..];
    let indented: Vec<_> = rules.lines().map(|line| format!("  {line}").trim_end().to_owned()).collect();
    assert!(
        deploy!("kubernetes/components/metrics/prometheusrule.yaml")
            .ends_with(&format!("spec:\n{}\n", indented.join("\n")))
    );
}

#[test]
fn policy_rejects_services_to_presets() {
    for (whose, policy) in [
        ("kustomize", deploy!("kubernetes/components/admission/policy.yaml")),
        ("helm", deploy!("helm/imds-agent/templates/admission.yaml")),
    ] {
        let quoted = policy.split(['\'', '"', '\\']);
        let protected: Vec<IpAddr> = quoted.filter_map(|text| text.parse().ok()).collect();
        for provider in PROVIDERS.iter().chain(EXTRAS) {
            for endpoint in provider.endpoints() {
                assert!(protected.contains(&endpoint.address), "{whose}: {}", endpoint.address);
            }
        }
    }
}

#[test]
fn versions_match_the_agent() {
    let version = env!("CARGO_PKG_VERSION");
    let chart = deploy!("helm/imds-agent/Chart.yaml");
    assert!(
        chart.contains(&format!("\nversion: {version}\n"))
            && chart.contains(&format!("\nappVersion: {version}\n"))
    );
    assert!(deploy!("kubernetes/base/kustomization.yaml").contains(&format!("newTag: {version}\n")));
}

#[test]
fn broken_config_does_not_stop_the_start() {
    let unit = deploy!("systemd/imds-agent.service");
    let lines: Vec<_> = unit.lines().collect();
    for line in [
        // With the prefix, a failed check only prints a message.
        "ExecStartPre=-/usr/bin/imds-agent config check /etc/imds-agent/imds.toml",
        "ExecReload=/usr/bin/imds-agent config check /etc/imds-agent/imds.toml",
        "StateDirectory=imds-agent",
        "StateDirectoryMode=0700",
    ] {
        assert!(lines.contains(&line), "{line}");
    }
    for (name, manifest) in [
        ("kustomize", deploy!("kubernetes/base/daemonset.yaml")),
        ("helm", deploy!("helm/imds-agent/templates/daemonset.yaml")),
    ] {
        assert!(manifest.contains("- name: state\n              mountPath: /var/lib/imds-agent\n"), "{name}");
        let volume = "- name: state\n          hostPath:\n            path: /var/lib/imds-agent\n";
        assert!(manifest.contains(volume), "{name}");
    }
}
