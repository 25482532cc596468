//! Suggested rules of all nodes as one set, without duplicates.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use toml::{Table, Value};

use crate::{escape::escape, fleet::AskError};

/// Line that begins a rule.
const HEADER: &str = "[[exempt]]";
/// Longest name of a rule, see docs/configuration.md, less a number at its end.
const MAX_NAME: usize = 58;
/// Keys of a rule that the agent suggests.
const SELECTORS: [&str; 5] = ["namespace", "service_account", "pod_selector", "cgroup", "interface"];
/// Rules that the set can have. Beyond them, a compromised node could exhaust the memory.
const MAX_RULES: usize = 10_000;

/// A rule that the agent of one node suggests.
#[derive(Clone, Debug)]
pub(super) struct SuggestedRule {
    name: String,
    /// Keys that select the senders, as TOML.
    selector: String,
    /// Endpoints of the rule; `None` for all.
    endpoints: Option<BTreeSet<String>>,
    /// Comments of the agent about senders that the rule also covers.
    cautions: BTreeSet<String>,
}

/// Rules by selector.
#[derive(Debug, Default)]
pub(super) struct MergedRules {
    nodes: usize,
    rules: BTreeMap<String, (usize, SuggestedRule)>,
    dropped: usize,
}

/// Parses the rules of one node. Each key is checked: a compromised node must not add other settings to the set.
pub(super) fn parse(text: &str) -> Result<Vec<SuggestedRule>, AskError> {
    let mut rules = Vec::<(BTreeSet<String>, String)>::new();
    // Comments before the header belong to its rule.
    let mut cautions = BTreeSet::new();
    for line in text.lines() {
        if line == HEADER {
            rules.push((std::mem::take(&mut cautions), String::new()));
        } else if let Some(comment) = line.strip_prefix('#') {
            cautions.insert(comment.trim().to_owned());
        } else if let Some((_, body)) = rules.last_mut() {
            body.push_str(line);
            body.push('\n');
        } else if !line.trim().is_empty() {
            return Err(invalid("text before the first rule"));
        }
    }
    rules.into_iter().map(|(cautions, body)| parse_rule(&body, cautions)).collect()
}

fn parse_rule(body: &str, cautions: BTreeSet<String>) -> Result<SuggestedRule, AskError> {
    let mut table: Table = body.parse().map_err(|_| invalid("no TOML"))?;
    let Some(Value::String(name)) = table.remove("name") else {
        return Err(invalid("a rule without a name"));
    };
    let endpoints = match table.remove("endpoints") {
        Some(Value::Array(names)) => {
            let names = names.into_iter().map(|name| match name {
                Value::String(name) => Ok(name),
                _ => Err(invalid("an endpoint without a name")),
            });
            Some(names.collect::<Result<_, _>>()?)
        }
        Some(_) => return Err(invalid("endpoints without names")),
        None => None,
    };
    let selectors = ["namespace", "cgroup", "interface"].iter().filter(|key| table.contains_key(**key));
    if selectors.count() != 1 {
        return Err(invalid("a rule without a selector"));
    }
    if let Some(key) = table.keys().find(|key| !SELECTORS.contains(&key.as_str())) {
        return Err(invalid(&format!("the key {key:?}")));
    }
    if let Some(Value::String(glob)) = table.get("interface")
        && has_wildcard(glob)
    {
        return Err(invalid("an interface with wildcards"));
    }
    let lines = table.iter().map(|(key, value)| format!("{key} = {value}\n"));
    Ok(SuggestedRule { name: plain(&name), selector: lines.collect(), endpoints, cautions })
}

fn invalid(found: &str) -> AskError {
    AskError::Content(format!("the suggested rules contain {found}"))
}

/// Reports whether a glob matches more than one name. The agent writes a special character as `[*]`.
fn has_wildcard(glob: &str) -> bool {
    let mut chars = glob.chars();
    while let Some(char) = chars.next() {
        match char {
            '[' if chars.next().is_some_and(|escaped| !"!^".contains(escaped))
                && chars.next() == Some(']') => {}
            '*' | '?' | '[' | ']' | '{' | '}' | '\\' => return true,
            _ => {}
        }
    }
    false
}

/// Returns a name with only the characters that a rule's name may have.
fn plain(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let name: String = name.chars().map(|c| if is_plain(c) { c } else { '-' }).take(MAX_NAME).collect();
    if name.is_empty() { "sender".to_owned() } else { name }
}

impl MergedRules {
    /// Adds the rules of a node.
    pub(super) fn add(&mut self, rules: Vec<SuggestedRule>) {
        self.nodes += 1;
        for SuggestedRule { name, selector, endpoints, cautions } in rules {
            if self.rules.len() >= MAX_RULES && !self.rules.contains_key(&selector) {
                self.dropped += 1;
                continue;
            }
            if let Some((nodes, rule)) = self.rules.get_mut(&selector) {
                *nodes += 1;
                rule.cautions.extend(cautions);
                // No list stands for all endpoints.
                rule.endpoints = rule.endpoints.take().zip(endpoints).map(|(mut all, more)| {
                    all.extend(more);
                    all
                });
                // Answers arrive in any order, but each run must print the same name.
                rule.name = std::cmp::min(name, std::mem::take(&mut rule.name));
            } else {
                let rule = SuggestedRule { name, selector: selector.clone(), endpoints, cautions };
                self.rules.insert(selector, (1, rule));
            }
        }
    }

    /// Returns the rules as a part of a configuration file.
    pub(super) fn to_toml(&self) -> String {
        let (mut text, mut names) = (String::new(), BTreeSet::new());
        if self.dropped > 0 {
            text = format!("# {} more rules are left out.\n\n", self.dropped);
        }
        let mut rules: Vec<_> = self.rules.values().collect();
        rules.sort_by(|(_, a), (_, b)| (&a.name, &a.selector).cmp(&(&b.name, &b.selector)));
        for (nodes, SuggestedRule { name, selector, endpoints, cautions }) in rules {
            let numbered = (2..).map(|number| format!("{name}-{number}"));
            let name = std::iter::once(name.clone()).chain(numbered).find(|name| names.insert(name.clone()));
            // Writing to a string does not fail.
            let _ok = cautions.iter().try_for_each(|caution| writeln!(text, "# {}", escape(caution)));
            let _ok = writeln!(text, "# Suggested by {nodes} of {} nodes.", self.nodes);
            let _ok = write!(text, "{HEADER}\nname = \"{}\"\n{selector}", name.unwrap_or_default());
            if let Some(endpoints) = endpoints {
                let names =
                    Value::from(endpoints.iter().map(|name| Value::from(&**name)).collect::<Vec<_>>());
                let _ok = writeln!(text, "endpoints = {names}");
            }
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "# This rule exempts every pod of the namespace with the default service account.
[[exempt]]
name = \"tools-web\"
namespace = \"tools\"
pod_selector = { match_labels = { \"app\" = \"web\" } }
endpoints = [\"imds\"]

";

    fn merged(texts: &[&str]) -> String {
        let mut rules = MergedRules::default();
        for text in texts {
            rules.add(parse(text).unwrap());
        }
        rules.to_toml()
    }

    #[test]
    fn endpoints_of_equal_selectors_are_united() {
        let other = WEB.replace("[\"imds\"]", "[\"wireserver\", \"imds\"]").replace("# This", "# Also this");
        let text = merged(&[WEB, &other, WEB]);
        let expected = "# Also this rule exempts every pod of the namespace with the default service account.
# This rule exempts every pod of the namespace with the default service account.
# Suggested by 3 of 3 nodes.
[[exempt]]
name = \"tools-web\"
namespace = \"tools\"
pod_selector = { match_labels = { app = \"web\" } }
endpoints = [\"imds\", \"wireserver\"]

";
        assert_eq!(text, expected);
        assert_eq!(merged(&[&other, WEB, WEB]), text);
        let all = WEB.replace("endpoints = [\"imds\"]\n", "");
        assert!(!merged(&[WEB, &all, WEB]).contains("endpoints"));
    }

    #[test]
    fn names_of_different_rules_differ() {
        let other = WEB.replace("\"tools\"", "\"other\"");
        let text = merged(&[WEB, &other]);
        assert!(
            text.contains("name = \"tools-web\"\n") && text.contains("name = \"tools-web-2\"\n"),
            "{text}"
        );
        assert_eq!(text.matches("# Suggested by 1 of 2 nodes.").count(), 2);
        assert_eq!(merged(&[""]), "");
    }

    #[test]
    fn foreign_settings_are_rejected() {
        for (text, expected) in [
            ("mode = \"off\"\n", "text before"),
            ("[[exempt]]\nname = \"a\"\nnamespace = \"b\"\n[node]\nallow = []\n", "the key"),
            ("[[exempt]]\nname = \"a\"\nnamespace = \"b\"\naudit = true\n", "the key"),
            ("[[exempt]]\nname = \"a\"\n", "without a selector"),
            ("[[exempt]]\nnamespace = \"a\"\n", "without a name"),
            ("[[exempt]]\nname = \"a\"\ninterface = \"*\"\n", "wildcards"),
            ("[[exempt]]\nname = \"a\"\ninterface = \"[!x]\"\n", "wildcards"),
            ("[[exempt]]\nname = \n", "no TOML"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let escaped = "[[exempt]]\nname = \"a\nb\"\n".replace("a\nb", "a b") + "interface = \"tap[*]0\"\n";
        assert!(merged(&[&escaped]).contains("name = \"a-b\"\ninterface = \"tap[*]0\"\n"));
    }

    #[test]
    fn comments_stay_comments() {
        let text = merged(&["# a\r[[exempt]]\n[[exempt]]\nname = \"a\"\nnamespace = \"b\"\n"]);
        assert!(text.starts_with(r"# a\r[[exempt]]"), "{text}");
    }
}
