//! Rules for processes of the node, compared with `[node] allow`.

use super::*;
use crate::diagnose::doctor::node_allow_coverage::AllowList;

/// The denials of an allow list of the node with these entries.
fn with_list(entries: &[&str], checks_packets: bool) -> Enforcement {
    let entries = entries.iter().map(|entry| entry.parse().unwrap()).collect();
    let hooks = Hooks::from_bits(Hooks::default().bits() | Hook::NodeAllow.bit());
    let node_allow = Some(AllowList { entries, checks_packets, cgroup: None });
    Enforcement { hooks, node_allow, ..enforced() }
}

#[test]
fn rules_for_users_are_compared_with_the_allow_list() {
    let all = "OUTPUT -d 169.254.169.254/32 -j DROP";
    let user = "OUTPUT -d 169.254.169.254/32 -m owner --uid-owner 1000 -j REJECT --reject-with icmp-port-unreachable";
    let others = "OUTPUT -d 169.254.169.254/32 -m owner ! --uid-owner 0 -j DROP";
    let range = "OUTPUT -d 169.254.169.254/32 -m owner --uid-owner 1000-1999 -j DROP";
    let group = "OUTPUT -d 169.254.169.254/32 -m owner --gid-owner 7 -j DROP";
    let requests = "requests of the node's processes in node.allow";
    let passes = "which imds-agent lets pass";
    for (rule, entries, expected) in [
        (all, &[][..], String::new()),
        (all, &["uid:0", "cgroup:/a"], format!("{requests}, {passes}: uid:0 and cgroup:/a")),
        (user, &["uid:0"], String::new()),
        (user, &["uid:1000"], format!("{requests} that the rule matches (uid 1000), {passes}: uid:1000")),
        (user, &["cgroup:/a"], format!("{requests} that the rule matches (uid 1000), {passes}: cgroup:/a")),
        (others, &["uid:0"], String::new()),
        (
            others,
            &["uid:0", "uid:7"],
            format!("{requests} that the rule matches (uid not 0), {passes}: uid:7"),
        ),
        (range, &["uid:999", "uid:2000"], String::new()),
        (
            range,
            &["uid:1999"],
            format!("{requests} that the rule matches (uid 1000-1999), {passes}: uid:1999"),
        ),
        (group, &["uid:0"], format!("{requests} that the rule matches (gid 7), {passes}: uid:0")),
        (group, &[], String::new()),
    ] {
        assert_eq!(opens(iptables(&[rule], &with_list(entries, true))), expected, "{rule} {entries:?}");
    }
    // Before Linux 6.15 the list restricts calls only, by the real user of the caller. Rules match the creator of the socket.
    let of_calls = opens(iptables(&[user], &with_list(&["uid:0", "cgroup:/a"], false)));
    let expected =
        format!("{requests} that the rule matches (uid 1000), {passes}: uid:0 and cgroup:/a; packets");
    assert!(of_calls.starts_with(&expected) && of_calls.contains("from raw and ping sockets"), "{of_calls}");
    // Allowed ports and exemptions are not restricted by the list.
    let wireserver = "OUTPUT -d 168.63.129.16/32 -p udp -m udp --dport 53 -m owner --uid-owner 1000 -j DROP";
    assert_eq!(
        opens(iptables(&[wireserver], &with_list(&["uid:0"], true))),
        "udp/53 of 168.63.129.16 for every process of the node (allowed ports)"
    );
    let imds = IpAddr::from([169, 254, 169, 254]);
    let cgroup_exemptions = BTreeMap::from([(imds, BTreeSet::from(["csi".to_owned()]))]);
    let exempt = Enforcement { cgroup_exemptions, ..with_list(&["uid:0"], true) };
    assert_eq!(
        opens(iptables(&[user], &exempt)),
        "169.254.169.254 for the pods with hostNetwork of the exemption \"csi\""
    );
    // Forwarded packets have no owner.
    assert_eq!(opens(iptables(&[AKS], &with_list(&["uid:0"], true))), "");
}

#[test]
fn advice_compares_users_with_the_allow_list() {
    let advice = |rule: &str, entries: &[&str]| {
        let check = iptables(&[rule], &with_list(entries, true)).unwrap();
        (check.rule.unwrap().conflicts, check.remedy.unwrap())
    };
    let rule =
        |rest: &str| format!("OUTPUT -d 169.254.169.254/32 -p tcp -m owner --uid-owner 1000 -j {rest}");
    let none = "the node's processes (uid 1000) that the rule matches (node.allow contains none of them)";
    let denies = format!("imds-agent denies {none}");
    let (_, drop) = advice(&rule("DROP"), &["uid:0"]);
    assert!(
        drop.contains(&format!(
            "no conflict: imds-agent denies everything that the rule denies, also {none}"
        )),
        "{drop}"
    );
    let (_, accept) = advice(&rule("ACCEPT"), &["uid:0"]);
    assert!(accept.starts_with(&format!("{denies}, although this rule accepts")), "{accept}");
    let (_, accept) = advice(&rule("ACCEPT"), &["cgroup:/a"]);
    assert!(accept.contains("matches (except those in node.allow: cgroup:/a), although"), "{accept}");
    let (_, accept) = advice(&rule("ACCEPT"), &["uid:1000"]);
    assert!(accept.starts_with("no conflict: imds-agent decides independently"), "{accept}");
    let redirect = rule("DNAT --to-destination 10.0.0.4:8181");
    let (conflicts, text) = advice(&redirect, &["uid:0"]);
    assert!(
        conflicts && text.starts_with(&format!("conflict: {denies} before this rule redirects")),
        "{text}"
    );
    let (conflicts, text) = advice(&redirect, &["uid:1000"]);
    assert!(!conflicts && text.starts_with("no conflict."), "{text}");
    let without_list = iptables(&[&redirect], &enforced()).unwrap();
    assert!(!without_list.rule.unwrap().conflicts);
}

#[test]
fn users_of_nftables_are_compared_with_the_allow_list() {
    let is_imds = is(&field("ip", "daddr"), &json!("169.254.169.254"));
    let owner = |op: &str, right: Value| json!({"match": {"op": op, "left": {"meta": {"key": "skuid"}}, "right": right}});
    let opens_of = |owner: Value| {
        let rule = json!([is_imds, owner, {"drop": null}]);
        opens(nft_with("output", &[], &rule, &with_list(&["uid:0", "uid:40"], true)))
    };
    assert_eq!(opens_of(owner("==", json!({"set": [{"range": [33, 39]}, 1000]}))), "");
    assert!(opens_of(owner("==", json!({"set": [{"range": [33, 40]}, 1000]}))).ends_with(": uid:40"));
    assert!(opens_of(owner("!=", json!(0))).ends_with(": uid:40"));
    // Names of users and comparisons are not resolved: each entry may match.
    assert!(opens_of(owner("==", json!("postgres"))).ends_with(": uid:0 and uid:40"));
    assert!(opens_of(owner(">", json!(1000))).ends_with(": uid:0 and uid:40"));
}

/// The advice never relies on programs that are not attached, or that restrict a part of the node.
#[test]
fn rules_for_processes_that_the_list_does_not_restrict() {
    let rule = "OUTPUT -d 169.254.169.254/32 -m owner --uid-owner 1000 -j DROP";
    let redirect = "OUTPUT -d 169.254.169.254/32 -p tcp -m owner --uid-owner 1000 -j DNAT --to-destination 10.0.0.4:8181";
    let complete = with_list(&["uid:0"], true);
    assert_eq!(opens(iptables(&[rule], &complete)), "");

    let mut partial = complete.clone();
    partial.node_allow.as_mut().unwrap().cgroup = Some("/sys/fs/cgroup/a".to_owned());
    assert_eq!(
        opens(iptables(&[rule], &partial)),
        "requests of the node's processes (uid 1000) outside of the cgroup /sys/fs/cgroup/a, to which node_allow is attached"
    );
    let remedy = iptables(&[redirect], &partial).unwrap().remedy.unwrap();
    assert!(
        remedy.contains("denies the node's processes in the cgroup /sys/fs/cgroup/a (uid 1000)"),
        "{remedy}"
    );

    let detached =
        Enforcement { node_allow: None, missing_node_program: Some("imds_node_conn4"), ..complete };
    assert_eq!(
        opens(iptables(&[rule], &detached)),
        "requests of the node's own processes (uid 1000) and pods with hostNetwork, which imds-agent lets pass: imds_node_conn4 of \
         node_allow is not attached"
    );
    assert!(!iptables(&[redirect], &detached).unwrap().rule.unwrap().conflicts);
}
