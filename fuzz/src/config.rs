//! Configuration parser: any text is rejected with an error, or enforces at least what it says and survives being
//! printed and parsed again.

use std::{collections::BTreeMap, net::IpAddr, path::Path};

use imds_agent::config::{
    Config, ConfigError, ConfigErrors, Enabled, EndpointSelector, Exempt, Hooks, NamespaceSelector,
    NodeIdentity, RuleSubject, endpoint_set::EndpointSet, provider::Dmi,
};
use imds_ebpf_common::{DenyAction, Hook, Mode};
use toml::{Table, Value};

const PATH: &str = "imds.toml";

pub(crate) fn run(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let config = match Config::parse(text, Path::new(PATH)) {
        Ok(config) => config,
        Err(errors) => {
            assert_errors_have_positions(&errors, text);
            return assert_fallback(text);
        }
    };
    let written = Config::parse(config.to_toml(), Path::new(PATH)).expect("a printed configuration is valid");
    assert_eq!(written.to_toml(), config.to_toml());
    assert_same(&config, &written);
    for labels in [None, Some(BTreeMap::new())] {
        let chosen = config.clone().for_node(&NodeIdentity { labels, ..NodeIdentity::default() });
        let written =
            Config::parse(chosen.to_toml(), Path::new(PATH)).expect("the configuration of a pool is valid");
        assert_same(&chosen, &written);
    }
    let table: Table = text.parse().expect("an accepted configuration is TOML");
    assert_no_weaker(&config, &table);
    for dmi in [Dmi::default(), Dmi { sys_vendor: "Amazon EC2".to_owned(), ..Dmi::default() }] {
        match config.resolve(&dmi) {
            Ok((endpoints, exempt)) => {
                assert_eq!(
                    written.resolve(&dmi).expect("a printed configuration is valid"),
                    (endpoints.clone(), exempt.clone())
                );
                assert_protects(&endpoints, &table);
                assert_exempts(&endpoints, &exempt, &table);
            }
            Err(errors) => assert_errors_have_positions(&errors, text),
        }
    }
}

/// Asserts that each error has a position in the text and is reported on one line.
fn assert_errors_have_positions(errors: &ConfigErrors, text: &str) {
    assert!(errors.iter().count() > 0);
    for error in errors.iter() {
        let ConfigError::Parse { line, column, .. } = error else { panic!("{error}: not a parse error") };
        let there =
            text.split('\n').nth(line - 1).unwrap_or_else(|| panic!("{error}: the line does not exist"));
        assert!((1..=there.chars().count() + 1).contains(column), "{error}: the column does not exist");
        assert!(!error.to_string().contains('\n'), "{error:?}");
    }
}

/// Asserts that the fallback is valid and differs from the built-in defaults only in mode, metrics and the allow list of the node.
fn assert_fallback(text: &str) {
    let fallback = Config::fallback(text, Path::new(PATH));
    let written = Config::parse(fallback.to_toml(), Path::new(PATH)).expect("a valid fallback");
    assert_same(&fallback, &written);
    let mut default = Config::default();
    default.mode = fallback.mode;
    default.listen.clone_from(&fallback.listen);
    default.node_allow.clone_from(&fallback.node_allow);
    if fallback.node_allow.is_some() {
        default.hooks = default.hooks.union(Hooks::from_bits(Hook::NodeAllow.bit()));
    }
    assert_same(&default, &fallback);
    let resolved = fallback.resolve(&Dmi::default()).expect("a fallback that can be resolved");
    assert_eq!(resolved, default.resolve(&Dmi::default()).expect("defaults that can be resolved"));
}

fn assert_same(one: &Config, other: &Config) {
    assert_eq!((one.mode, one.on_deny, one.hooks), (other.mode, other.on_deny, other.hooks));
    assert_eq!((&one.listen, &one.kubernetes), (&other.listen, &other.kubernetes));
    for name in ["eth0", "veth1a2b3c4d", "cni0", "lo", "a", ""] {
        assert_eq!(one.interfaces.includes(name), other.interfaces.includes(name));
        assert_eq!(one.interfaces.excludes(name), other.interfaces.excludes(name));
    }
}

/// Asserts that a hook is off or traffic is allowed only if the text says so explicitly.
fn assert_no_weaker(config: &Config, table: &Table) {
    let word = |key: &str| table.get(key).and_then(Value::as_str);
    assert_eq!(config.mode.name(), word("mode").unwrap_or(Mode::Enforce.name()));
    assert_eq!(config.on_deny.name(), word("on_deny").unwrap_or(DenyAction::Drop.name()));
    let hooks = table.get("hooks").and_then(Value::as_table);
    for (hook, by_default) in
        [(Hook::FromPod, true), (Hook::NodeEgress, true), (Hook::Socket, true), (Hook::HostNetwork, false)]
    {
        let is_on = hooks.and_then(|hooks| hooks.get(hook.name())?.as_bool()).unwrap_or(by_default);
        assert_eq!(config.hooks.contains(hook), is_on, "{}", hook.name());
    }
    let names_pods = tables(table, "exempt")
        .any(|rule| rule.contains_key("namespace") || rule.contains_key("namespace_selector"));
    assert!(!names_pods || config.kubernetes.enabled != Enabled::No);
    let globs =
        |key: &str| table.get("interfaces").and_then(|all| Some(all.get(key)?.as_array()?.is_empty()));
    assert!(globs("exclude") == Some(false) || !config.interfaces.excludes("eth0"));
}

fn tables<'t>(table: &'t Table, key: &str) -> impl Iterator<Item = &'t Table> {
    table.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_table)
}

/// Asserts that each endpoint of the text is protected and allows only the ports of the text.
fn assert_protects(endpoints: &EndpointSet, table: &Table) {
    for expected in tables(table, "endpoint") {
        let name = expected["name"].as_str().expect("a name");
        let endpoint =
            endpoints.endpoints.iter().find(|endpoint| endpoint.name == name).expect("a protected endpoint");
        let allow_ports = expected.get("allow_ports").and_then(Value::as_array);
        let allow_ports: Vec<_> = allow_ports.into_iter().flatten().filter_map(Value::as_str).collect();
        assert_eq!(endpoint.allow_ports.len(), allow_ports.len());
        for port in &endpoint.allow_ports {
            // The text may have leading zeros in a port number.
            let (protocol, number) = (port.to_string(), port.0.port.to_string());
            let matches_port = |text: &&str| text.ends_with(&number) && protocol.starts_with(&text[..4]);
            assert!(allow_ports.iter().any(matches_port), "{port} is not in {allow_ports:?}");
        }
    }
    if table.get("provider").is_none_or(|provider| provider.as_str() != Some("none")) {
        let imds = IpAddr::from([169, 254, 169, 254]);
        assert!(endpoints.endpoints.iter().any(|endpoint| endpoint.address == imds));
    }
}

/// Asserts that there are only the rules of the text, each with its subject and no additional endpoints.
fn assert_exempts(endpoints: &EndpointSet, exempt: &[Exempt], table: &Table) {
    let rules: Vec<_> = tables(table, "exempt").collect();
    assert_eq!(exempt.len(), rules.len());
    for (exempt, rule) in exempt.iter().zip(rules) {
        let word = |key: &str| rule.get(key).and_then(Value::as_str);
        assert_eq!(Some(&*exempt.name), word("name"));
        assert_eq!(exempt.is_audited, rule.get("audit").and_then(Value::as_bool).unwrap_or_default());
        match &exempt.sender {
            RuleSubject::Pods(pods) => {
                match &pods.namespace {
                    NamespaceSelector::Name(name) => assert_eq!(Some(&**name), word("namespace")),
                    NamespaceSelector::Labels(labels) => {
                        assert!(rule.contains_key("namespace_selector") && labels.keys().next().is_some());
                    }
                }
                assert_eq!(pods.service_account.as_deref(), word("service_account"));
                assert_eq!(pods.selector.is_some(), rule.contains_key("pod_selector"));
            }
            RuleSubject::Interface(_) => assert!(word("interface").is_some_and(|glob| !glob.is_empty())),
            RuleSubject::Netns(path) => {
                assert!(path.is_absolute() && path.to_str() == word("netns"));
            }
            RuleSubject::Cgroup(path) => {
                assert!(path.file_name().is_some() && path.to_str() == word("cgroup"));
            }
        }
        match (&exempt.scope, rule.get("endpoints").and_then(Value::as_array)) {
            (EndpointSelector::All, None) => {}
            (EndpointSelector::Only(addresses), Some(names)) => {
                assert_eq!(addresses.len(), names.len());
                let is_named = |name: &str| names.iter().any(|named| named.as_str() == Some(name));
                let of_address = |address| endpoints.endpoints.iter().find(|one| one.address == address);
                assert!(
                    addresses
                        .iter()
                        .all(|&address| is_named(&of_address(address).expect("a protected endpoint").name))
                );
            }
            (scope, names) => panic!("{scope:?} of {names:?}"),
        }
    }
}
