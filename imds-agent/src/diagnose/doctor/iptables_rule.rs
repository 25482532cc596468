//! Parser of rules in the output of `iptables-save`.

use super::{
    address_range::AddressRange,
    number_set::NumberSet,
    traffic::{Action, Branch, Traffic, protocol},
};

/// Parses the words of a rule, which begin with the name of its chain.
pub(crate) fn branch(words: &[String]) -> Branch {
    let (mut traffic, mut target, mut to) = (Traffic::default(), String::new(), String::new());
    let mut is_negated = false;
    let mut left = words.iter().skip(1);
    while let Some(option) = left.next() {
        if option == "!" {
            is_negated = true;
            continue;
        }
        let mut value = || left.next().map(String::as_str).unwrap_or_default();
        match &**option {
            "-d" | "--dst-range" => {
                if let Some(range) = AddressRange::parse(value()).filter(|_| !is_negated) {
                    traffic.limit_destinations(vec![range]);
                }
            }
            "-s" => traffic.has_negated_source = is_negated,
            "-i" if !is_negated => value().clone_into(&mut traffic.interface),
            "-p" => {
                if let Some(number) = protocol(value()) {
                    traffic.protocols.limit(&NumberSet::new(vec![(number, number)]), is_negated);
                }
            }
            "--dport" | "--dports" => {
                if let Some(ports) = ports(value()) {
                    traffic.ports.limit(&ports, is_negated);
                }
            }
            "--uid-owner" => {
                let users = value();
                traffic.limit_owners("uid", users, is_negated);
                if let Some(users) = uids(users) {
                    traffic.uids.limit(&users, is_negated);
                }
            }
            "--gid-owner" => traffic.limit_owners("gid", value(), is_negated),
            "-j" | "-g" => value().clone_into(&mut target),
            "--to-destination" | "--to-ports" | "--on-port" => to = format!(":{}", value()),
            _ => {}
        }
        is_negated = false;
    }
    let action = match &*target {
        "DROP" | "REJECT" => Action::Deny,
        "DNAT" | "REDIRECT" | "TPROXY" => Action::Redirect(to),
        "ACCEPT" | "RETURN" => Action::Accept,
        "" => Action::Other,
        // A target of an extension, such as LOG, is not a chain either, but a chain of that name has no rules.
        chain => Action::Jump(chain.to_owned()),
    };
    Branch { traffic, action }
}

/// Reads a user ID, or a range such as `1000-1999`.
fn uids(text: &str) -> Option<NumberSet> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some(NumberSet::new(vec![(first.parse().ok()?, last.parse().ok()?)]))
}

/// Reads ports and ranges such as `80,1000:2000`.
fn ports(text: &str) -> Option<NumberSet> {
    let range = |part: &str| {
        let (first, last) = part.split_once(':').unwrap_or((part, part));
        let number =
            |text: &str, default| if text.is_empty() { Some(default) } else { text.parse::<u16>().ok() };
        Some((number(first, 0)?.into(), number(last, u16::MAX)?.into()))
    };
    text.split(',').map(range).collect::<Option<Vec<_>>>().map(NumberSet::new)
}
