use std::collections::{BTreeMap, BTreeSet};

use imds_ebpf_common::{Hook, Mode};
use serde_json::{Value, json};

use super::*;
use crate::{
    config::Hooks,
    diagnose::doctor::{doctor_report::DoctorCheck, observed_gaps::ObservedGaps},
};

mod allow_list;

const AKS: &str = "FORWARD ! -s 10.224.0.4/32 -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DROP";

fn azure(mode: Option<Mode>) -> Enforcement {
    Enforcement::from_provider(Provider::named("azure").unwrap(), mode)
}

fn enforced() -> Enforcement {
    azure(Some(Mode::Enforce))
}

fn explain(listing: &str, enforcement: &Enforcement) -> Vec<DoctorCheck> {
    let checks = rules(&Rulesets::from_listing(listing), enforcement);
    checks.into_iter().filter(|check| check.rule.is_some()).collect()
}

/// Explains the last of these rules of iptables.
fn iptables(rules: &[&str], enforcement: &Enforcement) -> Option<DoctorCheck> {
    let base = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
    let base = base.map(|chain| format!(":{chain} ACCEPT [0:0]\n")).concat();
    let rules: Vec<_> = rules.iter().map(|rule| format!("-A {rule}\n")).collect();
    let rules = rules.concat();
    explain(&format!("# Generated\n*mangle\n{base}{rules}COMMIT\n"), enforcement).pop()
}

#[track_caller]
fn opens(check: Option<DoctorCheck>) -> String {
    let check = check.expect("a check");
    let rule = check.rule.expect("a rule");
    let remedy = check.remedy.expect("advice");
    assert_eq!(rule.removable, rule.opens.is_empty(), "{remedy}");
    assert_eq!(remedy.contains("it can be removed"), rule.removable, "{remedy}");
    assert!(
        remedy.contains(&rule.remove) && rule.opens.iter().all(|opening| remedy.contains(opening)),
        "{remedy}"
    );
    rule.opens.join("; ")
}

/// Explains rules of a chain of nftables at a hook, with the objects of the table.
fn nft(hook: &str, objects: &[Value], expressions: &Value) -> Option<DoctorCheck> {
    nft_with(hook, objects, expressions, &enforced())
}

fn nft_with(
    hook: &str,
    objects: &[Value],
    expressions: &Value,
    enforcement: &Enforcement,
) -> Option<DoctorCheck> {
    let of_table = |kind: &str, mut object: Value| {
        object["family"] = "inet".into();
        object["table"] = "guard".into();
        json!({ kind: object })
    };
    let mut entries = vec![
        of_table("chain", json!({"name": "base", "hook": hook})),
        of_table("chain", json!({"name": "drops"})),
        of_table("rule", json!({"chain": "drops", "handle": 1, "expr": [{"drop": null}]})),
    ];
    let kind = |object: &Value| if object.get("map").is_some() { "map" } else { "set" };
    entries.extend(objects.iter().map(|object| of_table(kind(object), object.clone())));
    entries.push(of_table("rule", json!({"chain": "base", "handle": 2, "expr": expressions})));
    explain(&json!({ "nftables": entries }).to_string(), enforcement).pop()
}

fn is(left: &Value, right: &Value) -> Value {
    json!({"match": {"op": "==", "left": left, "right": right}})
}

fn field(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

#[test]
fn rules_of_known_owners() {
    for (rule, expected) in [
        (AKS, ("aks", false)),
        ("FORWARD -d 169.254.169.254/32 -i eni+ -j DROP", ("eks", false)),
        ("DOCKER-USER -d 169.254.169.254/32 -i docker+ -j DROP", ("docker", false)),
        (
            "PREROUTING -d 169.254.169.254/32 -i cali+ -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.4:8181",
            ("kube2iam", true),
        ),
        (
            "OUTPUT -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.4:8181",
            ("kube2iam", false),
        ),
        (
            "PREROUTING -d 168.63.129.16/32 -p udp -m udp --dport 53 -j DNAT --to-destination 10.0.0.4:53",
            ("other", false),
        ),
        (
            "PREROUTING -d 169.254.170.2/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 127.0.0.1:51679",
            ("ecs", false),
        ),
        (
            "PREROUTING -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -m comment --comment \"metadata \\\"it\\\" -j\" \
             -j DNAT --to-destination 169.254.169.252:988",
            ("gke", true),
        ),
        ("FORWARD -d 169.254.0.0/16 -j REJECT --reject-with icmp-port-unreachable", ("other", false)),
        ("OUTPUT -d 169.254.169.254/32 -j ACCEPT", ("other", false)),
    ] {
        let observed = iptables(&[rule], &enforced()).and_then(|check| check.rule).expect(rule);
        assert_eq!((observed.origin, observed.conflicts), expected, "{rule}");
        assert_eq!(observed.remove, format!("iptables -t mangle -D {rule}"));
    }
}

#[test]
fn unrelated_rules_are_left_out() {
    for rule in [
        "FORWARD -j ACCEPT",
        "FORWARD -d 10.0.0.0/8 -j DROP",
        "FORWARD ! -d 169.254.169.254/32 -j ACCEPT",
        "FORWARD -d 0.0.0.0/0 -j DROP",
    ] {
        assert!(iptables(&[rule], &enforced()).is_none(), "{rule}");
    }
    for listing in [
        "",
        "{}",
        "[]",
        "-A",
        "-A \n*\n:\n-A ! ! -d",
        "{\"nftables\": [{\"rule\": {\"expr\": [{\"vmap\": 1}]}}]}",
    ] {
        assert!(explain(listing, &enforced()).is_empty(), "{listing}");
    }
}

#[test]
fn contained_rules_can_be_removed() {
    for rule in [
        AKS,
        "FORWARD -d 169.254.169.254/32 -j DROP",
        "PREROUTING -d 169.254.169.254/32 -i cali+ -j DROP",
        "FORWARD -d 168.63.129.16/32 -p tcp -m multiport --dports 80,32526 -j REJECT",
        "FORWARD -d 168.63.129.16/32 -p udp -m udp ! --dport 53:67 -j DROP",
        "FORWARD -m iprange --dst-range 169.254.169.254-169.254.169.254 -j DROP",
    ] {
        assert_eq!(opens(iptables(&[rule], &enforced())), "", "{rule}");
    }
}

#[test]
fn rules_for_node_processes_stay() {
    for (rules, part) in [
        (&["OUTPUT -d 169.254.169.254/32 -j DROP"][..], "the node's own processes and pods with hostNetwork"),
        (
            &["OUTPUT -d 168.63.129.16/32 -p tcp -m owner ! --uid-owner 0 -j DROP"],
            "the node's own processes (uid not 0)",
        ),
        (&["POSTROUTING -d 169.254.169.254/32 -j DROP"], "the node's own processes"),
        (&["INPUT -d 169.254.169.254/32 -j DROP"], "to a service on the node itself"),
        (
            &["OUTPUT -j IMDS", "FORWARD -j IMDS", "IMDS -d 169.254.169.254/32 -j DROP"],
            "the node's own processes",
        ),
        (&["IMDS -p tcp -j DROP", "OUTPUT -d 169.254.169.254/32 -j IMDS"], "the node's own processes"),
        (&["UNUSED -d 169.254.169.254/32 -j DROP"], "unknown traffic: no base chain"),
    ] {
        let opens = opens(iptables(rules, &enforced()));
        assert!(opens.contains(part), "{rules:?}: {opens}");
    }
    assert_eq!(opens(iptables(&["FORWARD -j IMDS", "IMDS -d 169.254.169.254/32 -j DROP"], &enforced())), "");
}

#[test]
fn allowed_ports_and_other_addresses_open() {
    for (rule, expected) in [
        (
            "FORWARD -d 168.63.129.16/32 -j DROP",
            "udp/53 and tcp/53 and udp/67 of 168.63.129.16 for every pod (allowed ports)",
        ),
        (
            "FORWARD -d 168.63.129.16/32 -p udp -m udp --dport 53 -j DROP",
            "udp/53 of 168.63.129.16 for every pod (allowed ports)",
        ),
        (
            "FORWARD -d 169.254.0.0/16 -p tcp -m tcp --dport 80 -j DROP",
            "tcp/80 of 169.254.0.0/16 except 169.254.169.254, not protected by imds-agent",
        ),
        ("FORWARD -d 169.254.170.2/32 -j DROP", "169.254.170.2, not protected by imds-agent"),
    ] {
        assert_eq!(opens(iptables(&[rule], &enforced())), expected, "{rule}");
    }
}

#[test]
fn other_modes_deny_nothing() {
    for (mode, part) in [
        (Some(Mode::Audit), "in the mode audit"),
        (Some(Mode::Off), "in the mode off"),
        (None, "imds-agent is not loaded"),
    ] {
        let opens = opens(iptables(&[AKS], &azure(mode)));
        assert!(opens.contains("everything that the rule denies") && opens.contains(part), "{opens}");
        let redirect = "PREROUTING -d 169.254.169.254/32 -p tcp -j DNAT --to-destination 10.0.0.4:8181";
        assert!(!iptables(&[redirect], &azure(mode)).unwrap().rule.unwrap().conflicts);
        let accept = iptables(&["FORWARD -d 169.254.169.254/32 -j ACCEPT"], &azure(mode)).unwrap();
        assert!(accept.remedy.unwrap().contains(part));
    }
}

#[test]
fn exempt_pods_and_disabled_hooks_open() {
    let imds = IpAddr::from([169, 254, 169, 254]);
    let exemptions = BTreeMap::from([(imds, BTreeSet::from(["csi".to_owned()]))]);
    let exempt = Enforcement { exemptions, ..enforced() };
    assert_eq!(opens(iptables(&[AKS], &exempt)), "169.254.169.254 for the pods of the exemption \"csi\"");
    let without = |hook: Hook| Hooks::from_bits(Hooks::default().bits() & !hook.bit());
    let no_egress = Enforcement { hooks: without(Hook::NodeEgress), ..enforced() };
    assert!(opens(iptables(&[AKS], &no_egress)).contains("hooks.node_egress is off"));
    let no_pods = Enforcement { hooks: without(Hook::FromPod), ..enforced() };
    let raw = "PREROUTING -d 169.254.169.254/32 -j DROP";
    assert!(opens(iptables(&[raw], &no_pods)).contains("hooks.from_pod is off"));
    assert_eq!(opens(iptables(&[AKS], &no_pods)), "");
}

#[test]
fn gaps_open() {
    let forward = "FORWARD -d 169.254.169.254/32 -j DROP";
    let raw = "PREROUTING -d 169.254.169.254/32 -j DROP";
    let with = |gaps: ObservedGaps| Enforcement { gaps, ..enforced() };
    let reasons =
        (1..=5).map(|number| format!("interface nic{number}: node_egress is not enforced")).collect();
    let degraded = with(ObservedGaps { reasons, ..ObservedGaps::default() });
    for rule in [forward, raw] {
        let opens = opens(iptables(&[rule], &degraded));
        assert!(opens.contains("requests of pods: interface nic1: node_egress is not enforced, "), "{opens}");
        assert!(opens.ends_with("interface nic3: node_egress is not enforced, and 2 more"), "{opens}");
    }
    let excluded = with(ObservedGaps { excluded: ["nic0".to_owned()].into(), ..ObservedGaps::default() });
    assert!(opens(iptables(&[forward], &excluded)).contains("through excluded interfaces: nic0"));
    let node_addresses = BTreeSet::from([IpAddr::from([169, 254, 169, 254])]);
    let local = with(ObservedGaps { node_addresses, ..ObservedGaps::default() });
    assert!(opens(iptables(&[raw], &local)).contains("service on the node itself at 169.254.169.254"));
    assert_eq!(opens(iptables(&[forward], &local)), "");
}

#[test]
fn sets_and_maps_of_nftables() {
    let (daddr, dport) = (field("ip", "daddr"), field("tcp", "dport"));
    let tuple = json!({"concat": [daddr, dport]});
    let named = |elements: Value| json!({"name": "s", "elem": elements});
    let verdicts = |elements: Value| json!({"name": "v", "map": "verdict", "elem": elements});
    let (imds, drop) = (json!("169.254.169.254"), json!({"drop": null}));
    let other = "10.0.0.1-10.0.0.9, not protected by imds-agent";
    let range = json!({"range": ["10.0.0.1", "10.0.0.9"]});
    for (objects, expressions, expected) in [
        (vec![], json!([is(&daddr, &json!({"set": [imds, range]})), drop]), other),
        (vec![named(json!([range, imds]))], json!([is(&daddr, &json!("@s")), drop]), other),
        (
            vec![named(json!([{"elem": {"val": "169.254.169.254", "timeout": 86400}}]))],
            json!([is(&daddr, &json!("@s")), {"counter": {"packets": 0}}, drop]),
            "",
        ),
        (
            vec![],
            json!([is(&daddr, &json!({"prefix": {"addr": "169.254.0.0", "len": 16}})), {"reject": null}]),
            "169.254.0.0/16 except 169.254.169.254, not protected by imds-agent",
        ),
        (
            vec![named(
                json!([{"concat": ["169.254.169.254", 80]}, {"concat": ["168.63.129.16", {"range": [80, 90]}]}]),
            )],
            json!([is(&tuple, &json!("@s")), drop]),
            "",
        ),
        (
            vec![named(
                json!([{"concat": ["169.254.169.254", 80]}, {"concat": ["168.63.129.16", {"range": [50, 90]}]}]),
            )],
            json!([is(&tuple, &json!("@s")), drop]),
            "tcp/53 of 168.63.129.16 for every pod (allowed ports)",
        ),
        (
            vec![],
            json!([{"vmap": {"key": daddr, "data": {"set": [["10.0.0.1", {"accept": null}], [imds, drop]]}}}]),
            "",
        ),
        (
            vec![verdicts(json!([["169.254.170.2", {"jump": {"target": "drops"}}], [imds, drop]]))],
            json!([{"vmap": {"key": daddr, "data": "@v"}}]),
            "169.254.170.2, not protected by imds-agent",
        ),
        (
            vec![verdicts(
                json!([[{"concat": ["168.63.129.16", "udp", 53]}, {"goto": {"target": "drops"}}]]),
            )],
            json!([{"vmap": {"key": {"concat": [daddr, {"meta": {"key": "l4proto"}}, field("th", "dport")]}, "data": "@v"}}]),
            "udp/53 of 168.63.129.16 for every pod (allowed ports)",
        ),
    ] {
        assert_eq!(opens(nft("forward", &objects, &expressions)), expected, "{expressions}");
    }
    let owner = is(&json!({"meta": {"key": "skuid"}}), &json!({"set": [{"range": [33, 40]}, 1000]}));
    let opens_of_owner = opens(nft("output", &[], &json!([is(&daddr, &imds), owner, drop])));
    assert!(opens_of_owner.contains("own processes (uid 33-40,1000)"), "{opens_of_owner}");
    let map = json!({"name": "d", "map": "ipv4_addr", "elem": [[imds, "10.0.0.4"]]});
    let translated = json!([{"dnat": {"family": "ip", "addr": {"map": {"key": daddr, "data": "@d"}}}}]);
    assert!(nft("prerouting", &[map], &translated).unwrap().rule.unwrap().conflicts);
}

#[test]
fn large_concatenations_by_column() {
    let tuple = json!({"concat": [field("ip", "daddr"), field("tcp", "dport")]});
    let elements: Vec<_> = (1..=300).map(|port| json!({"concat": ["169.254.169.254", port]})).collect();
    let set = json!({"name": "s", "elem": elements});
    let check = nft("forward", &[set], &json!([is(&tuple, &json!("@s")), {"drop": null}]));
    assert_eq!(opens(check), "");
}
