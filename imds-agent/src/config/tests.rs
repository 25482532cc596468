use std::collections::BTreeSet;

use imds_ebpf_common::Hook;
use proptest::prelude::*;
use toml::{Table, Value};

use super::*;
use crate::config::{endpoint_set::EndpointSet, provider::Dmi};

mod errors;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("imds.toml")).map_err(|error| error.to_string())
}

fn all_errors(text: &str) -> Vec<String> {
    let config = Config::parse(text, Path::new("f"));
    let resolved = config.and_then(|config| config.endpoints.resolve(&Dmi::default()));
    resolved.unwrap_err().iter().map(ToString::to_string).collect()
}

#[test]
fn empty_file_enforces() {
    let config = parse("").unwrap();
    assert_eq!((config.mode, config.on_deny), (Mode::Enforce, DenyAction::Drop));
    assert!(!config.interfaces.includes("veth0") && !config.interfaces.excludes("veth0"));
}

#[test]
fn mode_and_globs() {
    let config = parse(
        "mode = 'audit'\non_deny = 'reject'\n[interfaces]\ninclude = ['tun*']\nexclude = ['veth[0-3]']",
    )
    .unwrap();
    assert_eq!((config.mode, config.on_deny), (Mode::Audit, DenyAction::Reject));
    assert!(config.interfaces.includes("tun7") && !config.interfaces.includes("xtun7"));
    assert!(config.interfaces.excludes("veth3") && !config.interfaces.excludes("veth4"));
}

#[test]
fn hook_defaults() {
    let hooks = [Hook::FromPod, Hook::NodeEgress, Hook::Socket, Hook::HostNetwork];
    let on = |text: &str| hooks.map(|hook| parse(text).unwrap().hooks.contains(hook));
    assert_eq!(on(""), [true, true, true, false]);
    assert_eq!(on("[hooks]\nnode_egress = false"), [true, false, true, false]);
    assert_eq!(on("[hooks]\nfrom_pod = false\nsocket = false"), [false, true, false, false]);
    assert_eq!(on("[hooks]\nhost_network = true"), [true; 4]);
    let local_service = |text: &str| parse(text).unwrap().hooks.contains(Hook::LocalService);
    assert!(local_service("") && !local_service("[hooks]\nlocal_service = false"));
    let sendmsg = |text: &str| parse(text).unwrap().sendmsg;
    assert_eq!((sendmsg(""), sendmsg("[hooks]\nsendmsg = 'auto'")), (Sendmsg::Auto, Sendmsg::Auto));
    assert_eq!(
        (sendmsg("[hooks]\nsendmsg = true"), sendmsg("[hooks]\nsendmsg = false")),
        (Sendmsg::On, Sendmsg::Off)
    );
    let all_off = "[hooks]\nfrom_pod = false\nsocket = false\nnode_egress = false";
    assert!(parse(all_off).unwrap_err().contains("hooks"));
    assert_eq!(on(&format!("{all_off}\nhost_network = true")), [false, false, false, true]);
}

#[test]
fn an_allow_list_of_the_node_switches_its_hook_on() {
    let listed = |text: &str| {
        let config = parse(text).unwrap();
        assert_eq!(config.hooks.contains(Hook::NodeAllow), config.node_allow.is_some(), "{text}");
        config.node_allow.map(|processes| processes.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    assert_eq!((listed(""), listed("[node]")), (None, None));
    assert_eq!(listed("[node]\nallow = []"), Some(vec![]));
    let entries = vec!["uid:0".to_owned(), "cgroup:/system.slice/kubelet.service".to_owned()];
    let text = "[node]\nallow = ['uid:0', 'cgroup:/system.slice/kubelet.service']";
    assert_eq!(listed(text), Some(entries.clone()));
    assert_eq!(listed(parse(text).unwrap().to_toml()), Some(entries));
    assert!(!parse("").unwrap().to_toml().contains("node]"));
    assert!(parse(text).unwrap().without_socket().hooks.contains(Hook::NodeAllow));
    let most = |count: usize| {
        let entries: Vec<_> = (0..count).map(|uid| format!("'uid:{uid}'")).collect();
        parse(&format!("[node]\nallow = [{}]", entries.join(", ")))
    };
    assert!(most(64).is_ok());
    let errors = most(65).unwrap_err();
    assert!(errors.starts_with("imds.toml:2:9: node.allow: 65 entries; at most 64"), "{errors}");
}

#[test]
fn systemd_escapes_are_literal_names() {
    const PATH: &str = r"/system.slice/foo\x2dbar.service";
    let list = vec![NodeProcess::Cgroup(PATH.to_owned())];
    for text in [format!("'cgroup:{PATH}'"), format!("\"cgroup:{}\"", PATH.replace('\\', r"\\"))] {
        let config = parse(&format!("[node]\nallow = [{text}]")).unwrap();
        assert_eq!(config.node_allow, Some(list.clone()), "{text}");
        assert_eq!(parse(config.to_toml()).unwrap().node_allow, config.node_allow, "{text}");
    }
    // TOML 1.1 decodes the escape in double quotes, so that the entry would name another cgroup.
    for (text, position) in [
        (format!("[node]\nallow = [\"cgroup:{PATH}\"]"), "2:10: node.allow"),
        (format!("[[exempt]]\nname = 'a'\ncgroup = \"{PATH}\""), "3:10: exempt.cgroup"),
    ] {
        let error = parse(&text).unwrap_err();
        let expected =
            format!(r"imds.toml:{position}: TOML reads \x2d in double quotes as another character");
        assert!(error.starts_with(&expected) && error.contains(&format!("{PATH}'")), "{error}");
    }
    assert!(parse(&format!("[[exempt]]\nname = 'a'\ncgroup = '{PATH}'")).is_ok());
}

#[test]
fn an_allow_list_of_the_node_survives_errors_elsewhere() {
    let fallback = |text: &str| Config::fallback(text, Path::new("imds.toml"));
    let broken = "mode = 'of'\n[hooks]\nsocket = 0\n";
    let config = fallback(&format!("{broken}[node]\nallow = ['uid:0']"));
    assert!(config.hooks.contains(Hook::NodeAllow) && config.hooks.contains(Hook::Socket));
    assert_eq!(config.node_allow, Some(vec![NodeProcess::Uid(0)]));
    assert_eq!(parse(config.to_toml()).unwrap().node_allow, config.node_allow);
    for node in [
        "",
        "[node]",
        "[nodes]",
        "node_name = 'a'",
        "[name]\nallowed = []",
        "[preset.imds]\nallow_ports = []",
    ] {
        let config = fallback(&format!("{broken}{node}"));
        assert!(config.node_allow.is_none() && !config.hooks.contains(Hook::NodeAllow), "{node}");
    }
}

#[test]
fn a_broken_allow_list_of_the_node_opens_nothing() {
    let many: Vec<_> = (0..100).map(|uid| format!("uid:{uid}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    for (text, expected) in [
        ("[node]\nallow = ['uid:0', 'root', 3, 'uid:0', 'cgroup:/a']", &["uid:0", "cgroup:/a"][..]),
        (r#"node.allow = ["cgroup:/a\x2db.slice", "uid:7"]"#, &["uid:7"]),
        (&format!("[node]\nallow = {many:?}"), &many[..64]),
        ("[node]\nallow = ['uid:0']\nother = 1", &["uid:0"]),
        ("[node]\nallow = ['root']", &[]),
        ("[node]\nallow = 'uid:0'", &[]),
        ("[node]\nalow = ['uid:0']", &[]),
        ("node = ['uid:0']", &[]),
        // Misspelt or missing names of the table.
        ("[nodes]\nallow = ['uid:0']", &["uid:0"]),
        ("[NODE]\nalow = ['uid:0']", &[]),
        ("[host]\nallow = ['uid:0', 'root']", &["uid:0"]),
        ("[metrics]\nlisten = []\nallow = ['uid:0']", &["uid:0"]),
        ("node_allow = ['uid:0']", &[]),
        ("allow = ['uid:0']", &[]),
        ("[[node]]\nallow = ['uid:0']", &[]),
        // Syntax errors.
        ("mode = \n[node]\nallow = ['uid:0']", &["uid:0"]),
        ("[node]\nallow = ['uid:0', 'cgroup:/a'\n[metrics]\nlisten = []", &["uid:0", "cgroup:/a"]),
        ("[node]\nallow = ", &[]),
    ] {
        assert!(parse(text).is_err(), "{text}");
        let config = Config::fallback(text, Path::new("imds.toml"));
        let allow: Vec<_> = config.node_allow.iter().flatten().map(ToString::to_string).collect();
        assert_eq!(allow, expected, "{text}");
        assert!(config.node_allow.is_some() && config.hooks.contains(Hook::NodeAllow), "{text}");
        assert_eq!(parse(config.to_toml()).unwrap().node_allow, config.node_allow, "{text}");
    }
}

#[test]
fn preset_ports_can_be_overridden() {
    let ports = |text: &str| {
        let protected = parse(text).unwrap().endpoints.resolve(&Dmi::default()).unwrap();
        let of = |endpoint: &endpoint_set::Endpoint| {
            let ports: Vec<_> = endpoint.allow_ports.iter().map(ToString::to_string).collect();
            format!("{} {}", endpoint.name, ports.join(" "))
        };
        protected.endpoints.iter().map(of).collect::<Vec<_>>()
    };
    let azure = "provider = 'azure'\nextra_endpoints = ['ecs']\n";
    assert_eq!(ports(azure), ["imds ", "wireserver udp/53 tcp/53 udp/67", "ecs "]);
    let changed = format!(
        "{azure}[preset.wireserver]\nallow_ports = []\n[preset.ecs]\nallow_ports = ['tcp/80', 'udp/1']"
    );
    assert_eq!(ports(&changed), ["imds ", "wireserver ", "ecs tcp/80 udp/1"]);
    for (text, expected) in [
        (
            "[preset.wireserver]\nallow_ports = []",
            "f:1:9: preset.wireserver: provider generic has no endpoint",
        ),
        ("[preset.imds]\nallow_ports = ['tcp/0']", "f:2:16: preset.imds.allow_ports: \"tcp/0\""),
        ("[preset.imds]\naddress = '10.0.0.1'", "f:2:1: preset.imds.address: unknown field"),
        (
            "provider = 'none'\n[preset.own]\nallow_ports = []\n[[endpoint]]\nname = 'own'\naddress = '10.0.0.1'",
            "f:2:9: preset.own",
        ),
    ] {
        let errors = all_errors(text);
        assert!(errors.iter().any(|error| error.starts_with(expected)), "{text}: {errors:?}");
    }
}

#[test]
fn metrics_listen_one_or_several() {
    let listen = |text: &str| parse(&format!("[metrics]\nlisten = {text}")).map(|config| config.listen);
    let listen_address = |text: &str| text.parse::<Listen>().unwrap();
    assert_eq!(listen("'127.0.0.1:1'"), Ok(vec![listen_address("127.0.0.1:1")]));
    assert_eq!(
        listen("['127.0.0.1:1', '/run/a']"),
        Ok(vec![listen_address("127.0.0.1:1"), listen_address("/run/a")])
    );
    assert_eq!(listen("[]"), Ok(Vec::new()));
    for wrong in ["'nowhere'", "3", "[3]", "['nowhere']"] {
        let column = if wrong.starts_with('[') { 11 } else { 10 };
        let error = listen(wrong).unwrap_err();
        assert!(error.starts_with(&format!("imds.toml:2:{column}: metrics.listen: ")), "{error}");
    }
}

#[test]
fn shown_config_parses_to_itself() {
    let texts = [
        "",
        "mode = 'audit'\non_deny = 'reject'\nprovider = 'aws'\nextra_endpoints = ['ecs']\n[hooks]\nsocket = false\n\
         [interfaces]\nexclude = ['a*', 'b']\n[[endpoint]]\nname = 'a'\naddress = '10.0.0.1'\n\
         [[endpoint]]\nname = 'b'\naddress = '::ffff:10.0.0.2'\nallow_ports = ['tcp/1', 'udp/2']",
    ];
    for text in texts {
        let config = parse(text).unwrap();
        let again = parse(config.to_toml()).unwrap();
        assert_eq!(config.to_toml(), again.to_toml());
        assert_eq!((config.mode, config.on_deny, config.hooks), (again.mode, again.on_deny, again.hooks));
        let protected = |config: &Config| config.endpoints.resolve(&Dmi::default()).unwrap();
        assert_eq!(protected(&config), protected(&again));
        assert_eq!(config.interfaces.excludes("ab"), again.interfaces.excludes("ab"));
        // Like `config show`, which parses the text and prints it again.
        let table: Table = config.to_toml().parse().unwrap();
        assert_eq!(parse(&toml::to_string(&table).unwrap()).unwrap().to_toml(), config.to_toml());
    }
    assert_eq!(Config::default().to_toml(), parse("").unwrap().to_toml());
}

#[test]
fn unprintable_config_is_rejected() {
    let glob = "x".repeat(1000);
    let globs = format!("'{glob}', ").repeat(66);
    assert!(parse(&format!("[interfaces]\ninclude = [{globs}]")).unwrap_err().contains("bytes"));
}

/// Returns the example file, and the same file with all commented-out keys enabled.
fn example() -> (&'static str, String) {
    let example = include_str!("../../../deploy/imds.toml");
    let uncommented = |line: &str| match line.strip_prefix('#') {
        Some(key) if key.starts_with(|first: char| first.is_ascii_lowercase() || first == '[') => {
            key.to_owned()
        }
        _ => line.to_owned(),
    };
    (example, example.lines().map(uncommented).collect::<Vec<_>>().join("\n"))
}

#[test]
fn example_equals_defaults() {
    let (example, effective) = example();
    assert_eq!(parse(example).unwrap().to_toml(), Config::default().to_toml());
    let mut effective: Table = parse(&effective).unwrap().to_toml().parse().unwrap();
    let mut default: Table = Config::default().to_toml().parse().unwrap();
    for lists in [&mut effective, &mut default] {
        // Tables in lists have no default.
        lists.retain(|_, value| !matches!(value, Value::Array(list) if list.iter().all(Value::is_table)));
        lists.remove("preset");
        lists.remove("node");
        if let Some(Value::Table(events)) = lists.get_mut("events") {
            events.remove("sinks");
        }
    }
    assert_eq!(effective, default);
}

#[test]
fn example_has_every_key() {
    let (_, example) = example();
    let keys: Table = example.parse().unwrap();
    let mut tables = vec![(String::new(), BTreeSet::new())];
    add_keys(&keys, &mut tables[0].1);
    for (name, value) in &keys {
        let mut found = BTreeSet::new();
        match value {
            // The keys of this table are names of endpoints.
            Value::Table(_) if name == "preset" => continue,
            Value::Table(table) => add_keys(table, &mut found),
            Value::Array(list) if list.iter().any(Value::is_table) => {
                list.iter().filter_map(Value::as_table).for_each(|table| add_keys(table, &mut found));
            }
            _ => continue,
        }
        for (inner, value) in value.as_table().into_iter().flatten() {
            let Some(list) = value.as_array().filter(|list| list.iter().any(Value::is_table)) else {
                continue;
            };
            let mut found = BTreeSet::new();
            list.iter().filter_map(Value::as_table).for_each(|table| add_keys(table, &mut found));
            tables.push((format!("[[{name}.{inner}]]"), found));
        }
        let header = if value.is_table() { format!("[{name}]") } else { format!("[[{name}]]") };
        tables.push((header, found));
    }
    for (header, found) in tables {
        // The parser's error message lists the known keys.
        let error = all_errors(&format!("{header}\nno-such-key = 1")).join("; ");
        let (_, expected) = error.split_once("expected ").unwrap();
        let expected: BTreeSet<_> = expected.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        assert!(expected.len() > 1 || found.len() <= 1, "{error}");
        assert!(
            found.is_superset(&expected),
            "{header}: {expected:?} in the schema, {found:?} in the example"
        );
    }
}

fn add_keys(table: &Table, found: &mut BTreeSet<String>) {
    found.extend(table.keys().cloned());
}

fn resolve(text: &str, vendor: &str) -> Result<EndpointSet, String> {
    let dmi = Dmi { sys_vendor: vendor.to_owned(), ..Dmi::default() };
    let config = parse(text)?;
    config.endpoints.resolve(&dmi).map_err(|error| error.to_string())
}

#[test]
fn endpoints_of_provider_and_operator() {
    let protected = resolve("", "").unwrap();
    assert_eq!((protected.configured, protected.provider, protected.endpoints.len()), ("auto", "generic", 1));
    let protected = resolve("", "Amazon EC2").unwrap();
    assert_eq!((protected.configured, protected.provider, protected.endpoints.len()), ("auto", "aws", 2));
    let text = "provider = 'azure'\nextra_endpoints = ['ecs']\n[[endpoint]]\nname = 'vault'\naddress = '::ffff:10.0.0.9'\n\
                allow_ports = ['tcp/443', 'udp/443']";
    let protected = resolve(text, "Amazon EC2").unwrap();
    assert_eq!((protected.configured, protected.provider), ("azure", "azure"));
    let names: Vec<_> = protected.endpoints.iter().map(|endpoint| endpoint.name.as_str()).collect();
    assert_eq!(names, ["imds", "wireserver", "ecs", "vault"]);
    let vault = &protected.endpoints[3];
    assert_eq!(vault.address.to_string(), "10.0.0.9");
    assert_eq!(vault.allow_ports.iter().map(ToString::to_string).collect::<Vec<_>>(), ["tcp/443", "udp/443"]);
    assert!(resolve("provider = 'none'\nmode = 'off'", "").unwrap().endpoints.is_empty());
}

#[test]
fn invalid_endpoints_are_reported() {
    let one =
        |address: &str, rest: &str| format!("\n[[endpoint]]\nname = 'a'\naddress = '{address}'\n{rest}");
    let own = |n| format!("[[endpoint]]\nname = 'n{n}'\naddress = '10.1.0.{n}'\n");
    let many = (0..256).map(own).collect::<Vec<_>>().concat();
    let nine =
        "allow_ports = ['tcp/1', 'tcp/2', 'tcp/3', 'tcp/4', 'tcp/5', 'tcp/6', 'tcp/7', 'tcp/8', 'tcp/9']";
    for (text, position, part) in [
        ("provider = 'gpc'".to_owned(), "1:12", "gcp"),
        ("mode = 'audit'\nprovider = 'none'".to_owned(), "2:12", "protects nothing"),
        ("extra_endpoints = ['eks']".to_owned(), "1:20", "ecs"),
        (one("169.254.169.254", ""), "4:11", "already protected as \"imds\""),
        (one("64:ff9b::169.254.169.254", ""), "4:11", "already protected"),
        (one("10.0.0.1", "[[endpoint]]\nname = 'a'\naddress = '10.0.0.2'"), "7:11", "endpoint.name"),
        (one("10.0.0", ""), "4:11", "not an IPv4 or IPv6 address"),
        (one("10.0.0.0/8", ""), "4:11", "not an IPv4 or IPv6 address"),
        (one("224.0.0.1", ""), "4:11", "multicast"),
        (one("ff02::1", ""), "4:11", "multicast"),
        (one("127.0.0.1", ""), "4:11", "loopback"),
        (one("::1", ""), "4:11", "loopback"),
        (one("::ffff:127.0.0.1", ""), "4:11", "loopback"),
        (one("0.0.0.0", ""), "4:11", "unspecified"),
        (one("::", ""), "4:11", "unspecified"),
        (one("255.255.255.255", ""), "4:11", "broadcast"),
        (one("10.0.0.1", nine), "5:15", "at most 8"),
        (one("10.0.0.1", "allow_ports = ['udp/53', 'sctp/1']"), "5:26", "sctp/1"),
        (one("10.0.0.1", "allow_ports = ['udp/0']"), "5:16", "udp/0"),
        (one("10.0.0.1", "allow_ports = ['udp/+53']"), "5:16", "udp/+53"),
        (one("10.0.0.1", "allow_ports = ['udp/65536']"), "5:16", "udp/65536"),
        (one("10.0.0.1", "allow_ports = ['udp/53', 'udp/53']"), "5:26", "twice"),
        ("[[endpoint]]\nname = 'a-name-too-long-'\naddress = '10.0.0.1'".to_owned(), "2:8", "endpoint.name"),
        ("[[endpoint]]\nname = 'a b'\naddress = '10.0.0.1'".to_owned(), "2:8", "endpoint.name"),
        ("[[endpoint]]\nname = 'a'".to_owned(), "1:1", "address"),
        (many, "768:11", "more than 256"),
    ] {
        let error = resolve(&text, "").unwrap_err();
        assert!(
            error.starts_with(&format!("imds.toml:{position}: ")) && error.contains(part),
            "{text}: {error}"
        );
    }
}

proptest! {
    #[test]
    fn any_text_gives_one_line_errors(text in "(?s).{0,200}") {
        if let Err(error) = parse(&text) {
            prop_assert!(!error.contains('\n'), "{error}");
        }
    }
}
