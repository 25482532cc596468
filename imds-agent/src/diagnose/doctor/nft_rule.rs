//! Rules of `nft --json`, with the sets and maps that they name.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    address_range::AddressRange,
    number_set::NumberSet,
    traffic::{Action, Branch, Traffic, protocol},
};

/// Maximum number of branches of a rule. Beyond it, the dimensions of a concatenation are read independently, which gives
/// more traffic than the rule matches.
const MAX_BRANCHES: usize = 256;

/// Elements of the named sets and maps, by family, table and name.
#[derive(Debug, Default)]
pub(crate) struct NamedSets(BTreeMap<[String; 3], Vec<Value>>);

#[derive(Clone, Copy, Debug)]
pub(crate) struct TableSets<'a> {
    pub(crate) sets: &'a NamedSets,
    pub(crate) family: &'a str,
    pub(crate) table: &'a str,
}

impl NamedSets {
    pub(crate) fn from_entries<'a>(entries: impl Iterator<Item = &'a Value>) -> Self {
        let named = |entry: &Value| {
            let set = entry.get("set").or_else(|| entry.get("map"))?;
            let name =
                ["family", "table", "name"].map(|key| set[key].as_str().unwrap_or_default().to_owned());
            Some((name, set["elem"].as_array().cloned().unwrap_or_default()))
        };
        Self(entries.filter_map(named).collect())
    }
}

impl TableSets<'_> {
    /// Returns the elements of a value: of a named set, of an anonymous one, or the value alone. `None` if a named set is
    /// not in the list.
    fn elements<'v>(&'v self, value: &'v Value) -> Option<Vec<&'v Value>> {
        if let Some(name) = value.as_str().and_then(|text| text.strip_prefix('@')) {
            let name = [self.family, self.table, name].map(str::to_owned);
            return Some(self.sets.0.get(&name)?.iter().map(element).collect());
        }
        match value.get("set") {
            Some(Value::Array(elements)) => Some(elements.iter().map(element).collect()),
            Some(single) => Some(vec![element(single)]),
            None => Some(vec![element(value)]),
        }
    }

    fn pairs<'v>(&'v self, map: &'v Value) -> Vec<(&'v Value, &'v Value)> {
        let pair = |value: &'v Value| match value.as_array().map(Vec::as_slice) {
            Some([key, value]) => Some((element(key), element(value))),
            _ => None,
        };
        self.elements(map).unwrap_or_default().into_iter().filter_map(pair).collect()
    }
}

/// Returns the value of an element that has a timeout, a counter or a comment.
fn element(value: &Value) -> &Value {
    value.pointer("/elem/val").unwrap_or(value)
}

pub(crate) fn branches(expressions: &[Value], sets: TableSets<'_>) -> Vec<Branch> {
    let mut traffic = vec![Traffic::default()];
    let mut branches = Vec::new();
    for expression in expressions {
        if let Some(condition) = expression.get("match") {
            // A comparison is left out, so that the traffic is more than that of the rule.
            let is_comparison = condition["op"].as_str().is_some_and(|op| op.starts_with(['<', '>']));
            if let Some(values) = sets.elements(&condition["right"]).filter(|_| !is_comparison) {
                traffic = limit(traffic, &condition["left"], condition["op"] == "!=", &values);
            }
        } else if let Some(map) = expression.get("vmap") {
            for (key, verdict) in sets.pairs(&map["data"]) {
                let Some(action) = action(verdict) else { continue };
                let limited = limit(traffic.clone(), &map["key"], false, &[key]);
                branches
                    .extend(limited.into_iter().map(|traffic| Branch { traffic, action: action.clone() }));
            }
        } else if let Some(action) = action(expression) {
            let map =
                expression.pointer("/dnat/addr/map").or_else(|| expression.pointer("/redirect/port/map"));
            let limited = match map {
                Some(map) => {
                    let keys: Vec<_> = sets.pairs(&map["data"]).into_iter().map(|(key, _)| key).collect();
                    limit(traffic.clone(), &map["key"], false, &keys)
                }
                None => traffic.clone(),
            };
            branches.extend(limited.into_iter().map(|traffic| Branch { traffic, action: action.clone() }));
        }
    }
    if branches.is_empty() {
        branches.extend(traffic.into_iter().map(|traffic| Branch { traffic, action: Action::Other }));
    }
    branches
}

/// Reads a verdict or a statement that changes the destination.
fn action(expression: &Value) -> Option<Action> {
    let has = |key: &str| expression.get(key).is_some();
    if has("drop") || has("reject") {
        return Some(Action::Deny);
    }
    if has("accept") || has("return") {
        return Some(Action::Accept);
    }
    if let Some(jump) = expression.get("jump").or_else(|| expression.get("goto")) {
        return Some(Action::Jump(jump["target"].as_str().unwrap_or_default().to_owned()));
    }
    let statement = ["dnat", "redirect", "tproxy"].into_iter().find_map(|key| expression.get(key));
    if let Some(statement) = statement {
        let port = statement.get("port").map(|port| format!(":{port}"));
        return Some(Action::Redirect(port.unwrap_or_default()));
    }
    // A target of iptables that nft can't describe.
    match expression
        .pointer("/xt/name")
        .and_then(Value::as_str)
        .filter(|_| expression.pointer("/xt/type").is_some_and(|kind| kind == "target"))
    {
        Some("DROP" | "REJECT") => Some(Action::Deny),
        Some("DNAT" | "REDIRECT" | "TPROXY") => Some(Action::Redirect(String::new())),
        _ => None,
    }
}

/// Keeps the traffic for which the expression `left` has one of the values, or none of them.
fn limit(mut traffic: Vec<Traffic>, left: &Value, is_negated: bool, values: &[&Value]) -> Vec<Traffic> {
    let Some(fields) = left.get("concat").and_then(Value::as_array) else {
        for one in &mut traffic {
            limit_field(one, left, is_negated, values);
        }
        return traffic;
    };
    let tuples: Option<Vec<_>> = values.iter().map(|value| tuple(value, fields.len())).collect();
    let Some(tuples) = tuples.filter(|_| !is_negated) else { return traffic };
    if traffic.len().saturating_mul(tuples.len()) > MAX_BRANCHES {
        for (index, field) in fields.iter().enumerate() {
            let column: Vec<_> = tuples.iter().filter_map(|tuple| tuple.get(index)).collect();
            for one in &mut traffic {
                limit_field(one, field, false, &column);
            }
        }
        return traffic;
    }
    let of_tuple = |traffic: &Traffic, tuple: &&[Value]| {
        let mut one = traffic.clone();
        for (field, value) in fields.iter().zip(*tuple) {
            limit_field(&mut one, field, false, &[element(value)]);
        }
        one
    };
    traffic.iter().flat_map(|one| tuples.iter().map(move |tuple| of_tuple(one, tuple))).collect()
}

fn tuple(value: &Value, len: usize) -> Option<&[Value]> {
    value.get("concat")?.as_array().map(Vec::as_slice).filter(|tuple| tuple.len() == len)
}

/// Keeps the traffic for which a header field or a property of the packet has one of the values, or none of them.
fn limit_field(traffic: &mut Traffic, field: &Value, is_negated: bool, values: &[&Value]) {
    let word = |pointer| field.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let header = word("/payload/protocol");
    match (header, word("/payload/field"), word("/meta/key")) {
        ("ip" | "ip6", "daddr", _) if !is_negated => {
            let ranges = values.iter().map(|value| address_range(value)).collect::<Option<Vec<_>>>();
            if let Some(ranges) = ranges {
                traffic.limit_destinations(ranges);
            }
        }
        ("ip" | "ip6", "saddr", _) => traffic.has_negated_source |= is_negated,
        (header, "dport", _) => {
            if let Some(number) = protocol(header) {
                traffic.protocols.limit(&NumberSet::new(vec![(number, number)]), false);
            }
            if let Some(ports) = numbers(values) {
                traffic.ports.limit(&ports, is_negated);
            }
        }
        ("ip", "protocol", _) | ("ip6", "nexthdr", _) | (_, _, "l4proto") => {
            if let Some(protocols) = numbers(values) {
                traffic.protocols.limit(&protocols, is_negated);
            }
        }
        (_, _, "skuid") => {
            traffic.limit_owners("uid", &listed(values), is_negated);
            if let Some(users) = uids(values) {
                traffic.uids.limit(&users, is_negated);
            }
        }
        (_, _, "skgid") => traffic.limit_owners("gid", &listed(values), is_negated),
        (_, _, "iifname" | "iif") if !is_negated => traffic.interface = listed(values),
        _ => {}
    }
}

fn address_range(value: &Value) -> Option<AddressRange> {
    if let Some(text) = value.as_str() {
        return AddressRange::parse(text);
    }
    if let Some(prefix) = value.get("prefix") {
        let bits = u32::try_from(prefix["len"].as_u64()?).ok()?;
        return AddressRange::from_prefix(prefix["addr"].as_str()?.parse().ok()?, bits);
    }
    let (first, last) = bounds(value)?;
    AddressRange::new(first.as_str()?.parse().ok()?, last.as_str()?.parse().ok()?)
}

/// Reads numbers, names of protocols and ranges; `None` if one can't be read.
fn numbers(values: &[&Value]) -> Option<NumberSet> {
    number_set(values, |value| match value {
        Value::String(name) => protocol(name),
        value => u32::try_from(value.as_u64()?).ok(),
    })
}

/// Reads user IDs and ranges; `None` if one can't be read, such as the name of a user.
fn uids(values: &[&Value]) -> Option<NumberSet> {
    number_set(values, |value| u32::try_from(value.as_u64()?).ok())
}

fn number_set(values: &[&Value], number: impl Fn(&Value) -> Option<u32>) -> Option<NumberSet> {
    let range = |value: &&Value| match bounds(value) {
        Some((first, last)) => Some((number(first)?, number(last)?)),
        None => number(value).map(|number| (number, number)),
    };
    values.iter().map(range).collect::<Option<Vec<_>>>().map(NumberSet::new)
}

fn bounds(value: &Value) -> Option<(&Value, &Value)> {
    match value.get("range")?.as_array()?.as_slice() {
        [first, last] => Some((first, last)),
        _ => None,
    }
}

fn listed(values: &[&Value]) -> String {
    let text = |value: &&Value| match (value, bounds(value)) {
        (Value::String(text), _) => text.clone(),
        (_, Some((first, last))) => format!("{first}-{last}"),
        (value, None) => value.to_string(),
    };
    values.iter().map(text).collect::<Vec<_>>().join(",")
}
