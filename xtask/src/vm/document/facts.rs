//! What the kernels have, and what comes of what they lack.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    super::console::Guest,
    Column,
    markdown::{code, table},
    names, of_kernels, tests_told,
};

const UNKNOWN: &str = "?";
/// Checks of `doctor` that are about the kernel.
const CHECKS: [&str; 9] = [
    "kernel",
    "btf",
    "locked_memory",
    "jit",
    "attaching",
    "netns_cookie",
    "netns_cookie_tc",
    "netns_cookie_cgroup_skb",
    "ring_buffer",
];

/// Something that a kernel may lack.
struct Capability {
    name: &'static str,
    /// The first Linux that has it, where it is built so.
    since: &'static str,
    tell: fn(&Guest) -> Option<&str>,
}

const CAPABILITIES: [Capability; 12] = [
    Capability { name: "BTF of its own types", since: "5.4", tell: |guest| yes_no(guest, "btf") },
    Capability { name: "programs compiled (JIT)", since: "3.16", tell: |guest| yes_no(guest, "jit") },
    Capability { name: "ring buffer", since: "5.8", tell: |guest| yes_no(guest, "ring_buffer") },
    Capability { name: "BPF memory is the cgroup's", since: "5.11", tell: is_memory_free },
    Capability {
        name: "netns cookie of sockets",
        since: "5.14",
        tell: |guest| yes_no(guest, "netns_cookie"),
    },
    Capability { name: "TCX", since: "6.6", tell: attaching },
    Capability { name: "netns cookie in TC", since: "6.13", tell: |guest| yes_no(guest, "netns_cookie_tc") },
    Capability {
        name: "netns cookie in `cgroup_skb`",
        since: "6.15",
        tell: |guest| yes_no(guest, "netns_cookie_cgroup_skb"),
    },
    Capability { name: "netkit", since: "6.7", tell: |guest| device(guest, "netkit") },
    Capability { name: "ipvlan", since: "3.19", tell: |guest| device(guest, "ipvlan") },
    Capability { name: "macvlan", since: "2.6.23", tell: |guest| device(guest, "macvlan") },
    Capability { name: "VLAN", since: "2.4", tell: |guest| device(guest, "vlan") },
];

/// What the agent makes use of, by the names of guest.sh.
const TAKES: [(&str, &str); 4] = [
    ("guard", "attaches its programs by"),
    ("node", "knows the node's own sockets by"),
    ("node_egress", "knows a pod's packet at `node_egress` by"),
    ("events", "tells of denials by"),
];

/// Each capability of each kernel, and what came of it.
pub(super) fn capabilities(columns: &[Column], executables: &BTreeSet<String>) -> String {
    let rows = CAPABILITIES.iter().map(|capability| {
        let tell = |column: &Column| (capability.tell)(&column.record.guest).unwrap_or(UNKNOWN).to_owned();
        let heads = [capability.name, capability.since].map(str::to_owned);
        heads.into_iter().chain(columns.iter().map(tell)).collect()
    });
    let row = |head: &str, cell: &dyn Fn(&Column) -> String| {
        [head, ""].map(str::to_owned).into_iter().chain(columns.iter().map(cell)).collect()
    };
    let release = row("release", &|column| column.release().to_owned());
    let result = row("**tests**", &|column| tests_told::summary(&column.record, executables));
    of_kernels(columns, &["", "since"], std::iter::once(release).chain(rows).chain([result]))
}

/// What the agent takes on each kernel where it may choose.
pub(super) fn takes(columns: &[Column]) -> String {
    let columns: Vec<_> = columns.iter().filter(|column| !column.record.guest.took.is_empty()).collect();
    let head = std::iter::once("the agent".to_owned()).chain(columns.iter().map(|column| column.title()));
    let rows = TAKES.map(|(name, what)| {
        let tell = |column: &&Column| match column.record.guest.took.get(name).map(String::as_str) {
            Some("ifindex") => "the interface it came by".to_owned(),
            Some("cookie") if name == "node_egress" => "that, or its socket's netns cookie".to_owned(),
            Some("cookie") => "netns cookie".to_owned(),
            Some("tcx") => "TCX link".to_owned(),
            Some("clsact") => "clsact filter".to_owned(),
            Some("ringbuf") => "ring buffer".to_owned(),
            other => other.unwrap_or(UNKNOWN).to_owned(),
        };
        std::iter::once(what.to_owned()).chain(columns.iter().map(tell)).collect()
    });
    table(head.collect(), rows)
}

/// What `doctor` finds less than good about kernels, in its own words.
pub(super) fn doctor(columns: &[Column]) -> String {
    let mut said: Vec<([String; 2], Vec<&Column>)> = Vec::new();
    for name in CHECKS {
        for column in columns {
            let Some(check) = check(&column.record.guest, name) else { continue };
            let text = |key: &str| check[key].as_str().unwrap_or_default().to_owned();
            if text("state") == "ok" {
                continue;
            }
            let what = [format!("{name}  {}  {}", text("state"), text("found")), text("remedy")];
            match said.iter_mut().find(|(known, _)| *known == what) {
                Some((_, on)) => on.push(column),
                None => said.push((what, vec![column])),
            }
        }
    }
    let rows = said.into_iter().map(|([found, remedy], on)| vec![names(on), code(&found), code(&remedy)]);
    let head = ["kernel", "finds", "says"].map(str::to_owned);
    table(head.to_vec(), rows)
}

/// What `doctor` says of one thing.
fn check<'a>(guest: &'a Guest, name: &str) -> Option<&'a Value> {
    guest.doctor.as_ref()?["checks"].as_array()?.iter().find(|check| check["name"] == name)
}

fn yes_no<'a>(guest: &'a Guest, name: &str) -> Option<&'a str> {
    check(guest, name).map(|check| if check["state"] == "ok" { "yes" } else { "no" })
}

/// Which of the two ways of attaching there are.
fn attaching(guest: &Guest) -> Option<&str> {
    let found = check(guest, "attaching")?["found"].as_str()?;
    Some(match (found.starts_with("TCX"), found.contains("no clsact")) {
        (true, _) => "yes",
        (false, false) => "no: clsact",
        (false, true) => "no, nor clsact",
    })
}

fn is_memory_free(guest: &Guest) -> Option<&str> {
    let found = check(guest, "locked_memory")?["found"].as_str()?;
    Some(if found.contains("cgroup") { "yes" } else { "no: locked memory" })
}

fn device<'a>(guest: &'a Guest, name: &str) -> Option<&'a str> {
    guest.capabilities.get(name).map(|there| if there == "yes" { "yes" } else { "no" })
}
