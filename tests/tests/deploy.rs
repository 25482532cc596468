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
    assert_eq!(deploy!("grafana/imds-agent.json"), deploy!("helm/imds-agent/files/dashboard.json"));
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
fn policies_cover_service_status() {
    for policy in [
        deploy!("kubernetes/components/admission/policy.yaml"),
        deploy!("helm/imds-agent/templates/admission.yaml"),
    ] {
        assert!(policy.contains("resources: [services, services/status, endpoints]"));
    }
}

#[test]
fn label_policies_are_equal() {
    let validations = |policy: &'static str| {
        let (_, rest) = policy.split_once("    - name: before\n").unwrap();
        rest.split_once("\n---\n").unwrap().0
    };
    let policies = [
        deploy!("kubernetes/components/namespace-selector/policy.yaml"),
        deploy!("helm/imds-agent/templates/admission-namespaces.yaml"),
    ];
    assert_eq!(validations(policies[0]), validations(policies[1]));
    for policy in policies {
        assert!(policy.contains("resources: [namespaces, namespaces/status, namespaces/finalize]"));
    }
}

/// Nodes that run no daemons of the cluster would keep a pod pending, which blocks each rollout.
#[test]
fn agents_avoid_virtual_nodes() {
    for set in [deploy!("kubernetes/base/daemonset.yaml"), deploy!("helm/imds-agent/values.yaml")] {
        let affinity = &set[set.find("affinity:").unwrap()..];
        let lines: Vec<_> = affinity.lines().map(|line| line.trim().trim_start_matches("- ")).collect();
        for expression in [
            ["key: type", "operator: NotIn", "values: [virtual-kubelet]"],
            ["key: eks.amazonaws.com/compute-type", "operator: NotIn", "values: [fargate]"],
        ] {
            assert!(lines.windows(3).any(|found| found == expression), "{affinity}");
        }
        assert!(
            lines
                .windows(2)
                .any(|found| { found == ["key: virtual-kubelet.io/provider", "operator: DoesNotExist"] })
        );
    }
}

#[test]
fn first_boot_holds_back_the_same_services() {
    let before = |text: &'static str| {
        text.lines().find_map(|line| line.trim().strip_prefix("Before=")).expect("an order of the unit")
    };
    assert_eq!(before(deploy!("cloud-init/user-data.yaml")), before(deploy!("systemd/imds-agent.service")));
}

#[test]
fn versions_match_the_agent() {
    let version = env!("CARGO_PKG_VERSION");
    assert!(deploy!("cloud-init/user-data.yaml").contains(&format!("/v{version}/install.sh;")));
    let chart = deploy!("helm/imds-agent/Chart.yaml");
    assert!(
        chart.contains(&format!("\nversion: {version}\n"))
            && chart.contains(&format!("\nappVersion: {version}\n"))
    );
    assert!(deploy!("kubernetes/base/kustomization.yaml").contains(&format!("newTag: {version}\n")));
    assert!(deploy!("deb/changelog").starts_with(&format!("imds-agent ({version}-1) ")));
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
        "LogsDirectory=imds-agent",
    ] {
        assert!(lines.contains(&line), "{line}");
    }
    let values = deploy!("helm/imds-agent/values.yaml");
    assert!(values.contains("  state: /var/lib/imds-agent\n"));
    for (name, manifest, path) in [
        ("kustomize", deploy!("kubernetes/base/daemonset.yaml"), "/var/lib/imds-agent"),
        ("helm", deploy!("helm/imds-agent/templates/daemonset.yaml"), "{{ .Values.hostPaths.state }}"),
    ] {
        assert!(manifest.contains("- name: state\n              mountPath: /var/lib/imds-agent\n"), "{name}");
        let volume = format!("- name: state\n          hostPath:\n            path: {path}\n");
        assert!(manifest.contains(&volume), "{name}");
    }
}
