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
/// Keys of a rule that the agent suggests, beside `name`, `endpoints` and `allow`.
const SELECTORS: [&str; 5] = ["namespace", "service_account", "pod_selector", "cgroup", "interface"];
/// Rules that the set can have. Beyond them, a compromised node could exhaust the memory.
const MAX_RULES: usize = 10_000;
/// Entries of a list `allow`, and the length of one, see docs/configuration.md.
const MAX_REQUESTS: usize = 32;
const MAX_REQUEST: usize = 256;
/// Entry of a list `allow` for the harmless requests of the provider.
const INSTANCE: &str = "instance";

/// A rule that the agent of one node suggests.
#[derive(Clone, Debug)]
pub(super) struct SuggestedRule {
    name: String,
    /// Keys that select the senders, as TOML.
    selector: String,
    /// Endpoints of the rule; `None` for all.
    endpoints: Option<BTreeSet<String>>,
    /// Requests that the rule allows; `None` for all.
    allow: Option<BTreeSet<String>>,
    /// Comments of the agent about senders that the rule also covers, and about requests that it does not allow.
    cautions: BTreeSet<String>,
}

/// Suggestions of one node.
#[derive(Clone, Debug, Default)]
pub(super) struct Suggestions {
    rules: Vec<SuggestedRule>,
    /// Comments about senders without a rule: the first line, and the others.
    notes: Vec<(String, BTreeSet<String>)>,
}

/// Selector of a rule. A rule with a list of requests has its endpoints too, because the list must not apply to others.
type RuleKey = (String, Option<Option<BTreeSet<String>>>);

/// Rules by selector.
#[derive(Debug, Default)]
pub(super) struct MergedRules {
    nodes: usize,
    rules: BTreeMap<RuleKey, (usize, SuggestedRule)>,
    notes: BTreeMap<String, BTreeSet<String>>,
    dropped: usize,
}

/// Parses the rules of one node. Each key is checked: a compromised node must not add other settings to the set.
pub(super) fn parse(text: &str) -> Result<Suggestions, AskError> {
    let mut rules = Vec::<(Vec<String>, String)>::new();
    let mut notes = Vec::new();
    // Comments before a header belong to its rule, and those before an empty line to no rule.
    let mut comments = Vec::new();
    for line in text.lines() {
        if line == HEADER {
            rules.push((std::mem::take(&mut comments), String::new()));
        } else if let Some(comment) = line.strip_prefix('#') {
            comments.push(comment.trim().to_owned());
        } else if line.trim().is_empty() {
            let mut comments = std::mem::take(&mut comments).into_iter();
            notes.extend(comments.next().map(|first| (first, comments.collect())));
        } else if let Some((_, body)) = rules.last_mut() {
            body.push_str(line);
            body.push('\n');
        } else {
            return Err(invalid("text before the first rule"));
        }
    }
    let rules = rules.into_iter().map(|(comments, body)| parse_rule(&body, comments.into_iter().collect()));
    Ok(Suggestions { rules: rules.collect::<Result<_, _>>()?, notes })
}

fn parse_rule(body: &str, cautions: BTreeSet<String>) -> Result<SuggestedRule, AskError> {
    let mut table: Table = body.parse().map_err(|_| invalid("no TOML"))?;
    let Some(Value::String(name)) = table.remove("name") else {
        return Err(invalid("a rule without a name"));
    };
    let endpoints = parse_texts(table.remove("endpoints"), "an endpoint without a name")?;
    let allow = parse_texts(table.remove("allow"), "a list that is no list of requests")?;
    if let Some(request) = allow.iter().flatten().find(|request| !is_request(request)) {
        return Err(invalid(&format!("the request {request:?}")));
    }
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
    Ok(SuggestedRule { name: plain(&name), selector: lines.collect(), endpoints, allow, cautions })
}

/// Returns the texts of a list; `None` if the key is missing.
fn parse_texts(list: Option<Value>, mistake: &str) -> Result<Option<BTreeSet<String>>, AskError> {
    match list {
        Some(Value::Array(texts)) => {
            let texts = texts.into_iter().map(|text| match text {
                Value::String(text) => Ok(text),
                _ => Err(invalid(mistake)),
            });
            texts.collect::<Result<_, _>>().map(Some)
        }
        Some(_) => Err(invalid(mistake)),
        None => Ok(None),
    }
}

/// Reports whether a text has the form of an entry of `allow`, whose path is in canonical form.
fn is_request(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._~:@,=+".contains(c);
    let is_segment = |segment: &str| !segment.chars().all(|c| c == '.') && segment.chars().all(is_plain);
    let has_form = |(method, path): (&str, &str)| {
        ["GET", "HEAD", "POST", "PUT", "DELETE"].contains(&method)
            && path.strip_prefix('/').is_some_and(|path| path.split('/').all(is_segment))
    };
    text == INSTANCE || text.len() <= MAX_REQUEST && text.split_once(' ').is_some_and(has_form)
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

impl SuggestedRule {
    fn key(&self) -> RuleKey {
        (self.selector.clone(), self.allow.is_some().then(|| self.endpoints.clone()))
    }

    /// Adds the rule of another node with an equal key.
    fn merge(&mut self, other: Self) {
        self.cautions.extend(other.cautions);
        // No list stands for all endpoints.
        self.endpoints = self.endpoints.take().zip(other.endpoints).map(united);
        self.allow = self.allow.take().zip(other.allow).map(united);
        // Answers arrive in any order, but each run must print the same name.
        self.name = std::cmp::min(other.name, std::mem::take(&mut self.name));
    }

    fn write(&self, text: &mut String, name: &str, nodes: &str) {
        // Writing to a string does not fail.
        let _ok = self.cautions.iter().try_for_each(|caution| writeln!(text, "# {}", escape(caution)));
        let others = self.allow.as_ref().map_or(0, |allow| allow.len().saturating_sub(MAX_REQUESTS));
        if others > 0 {
            let _ok = writeln!(text, "# {others} more requests are left out.");
        }
        let _ok = writeln!(text, "# Suggested by {nodes} nodes.");
        let _ok = write!(text, "{HEADER}\nname = \"{name}\"\n{}", self.selector);
        for (key, list) in [("endpoints", &self.endpoints), ("allow", &self.allow)] {
            if let Some(list) = list {
                let list = list.iter().map(|text| Value::from(&**text));
                let list = if key == "allow" { list.take(MAX_REQUESTS).collect() } else { list.collect() };
                let _ok = writeln!(text, "{key} = {}", Value::Array(list));
            }
        }
        text.push('\n');
    }
}

fn united((mut all, more): (BTreeSet<String>, BTreeSet<String>)) -> BTreeSet<String> {
    all.extend(more);
    all
}

impl MergedRules {
    /// Adds the rules of a node.
    pub(super) fn add(&mut self, Suggestions { rules, notes }: Suggestions) {
        self.nodes += 1;
        for rule in rules {
            let key = rule.key();
            if self.rules.len() >= MAX_RULES && !self.rules.contains_key(&key) {
                self.dropped += 1;
            } else if let Some((nodes, before)) = self.rules.get_mut(&key) {
                *nodes += 1;
                before.merge(rule);
            } else {
                self.rules.insert(key, (1, rule));
            }
        }
        for (first, others) in notes {
            if self.notes.len() >= MAX_RULES && !self.notes.contains_key(&first) {
                self.dropped += 1;
            } else {
                self.notes.entry(first).or_default().extend(others);
            }
        }
    }

    /// Returns the rules as a part of a configuration file.
    pub(super) fn to_toml(&self) -> String {
        let (mut text, mut names) = (String::new(), BTreeSet::new());
        if self.dropped > 0 {
            text = format!("# {} more rules are left out.\n\n", self.dropped);
        }
        let mut rules: Vec<_> =
            self.rules.values().filter_map(|(nodes, rule)| Some((nodes, self.narrowed(rule)?))).collect();
        rules.sort_by(|(_, a), (_, b)| {
            (&a.name, &a.selector, &a.endpoints).cmp(&(&b.name, &b.selector, &b.endpoints))
        });
        for (nodes, rule) in rules {
            let name = &rule.name;
            let numbered = (2..).map(|number| format!("{name}-{number}"));
            let name = std::iter::once(name.clone()).chain(numbered).find(|name| names.insert(name.clone()));
            rule.write(&mut text, &name.unwrap_or_default(), &format!("{nodes} of {}", self.nodes));
        }
        for (first, others) in &self.notes {
            // Writing to a string does not fail.
            let mut lines = std::iter::once(first).chain(others);
            let _ok = lines.try_for_each(|line| writeln!(text, "# {}", escape(line)));
            text.push('\n');
        }
        text
    }

    /// Returns a rule without the endpoints for which another node suggests a list of requests. Returns `None` if it then has none.
    fn narrowed(&self, rule: &SuggestedRule) -> Option<SuggestedRule> {
        let Some(endpoints) = rule.endpoints.as_ref().filter(|_| rule.allow.is_none()) else {
            return Some(rule.clone());
        };
        let of_selector = self.rules.range((rule.selector.clone(), Some(None))..);
        let lists = of_selector.take_while(|((selector, _), _)| *selector == rule.selector);
        let listed: BTreeSet<_> =
            lists.filter_map(|(_, (_, rule))| rule.endpoints.as_ref()).flatten().collect();
        let endpoints: BTreeSet<_> =
            endpoints.iter().filter(|name| !listed.contains(name)).cloned().collect();
        (!endpoints.is_empty()).then(|| SuggestedRule { endpoints: Some(endpoints), ..rule.clone() })
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
            ("[[exempt]]\nname = \"a\"\nnamespace = \"b\"\nallow = 1\n", "no list of requests"),
            ("[[exempt]]\nname = \"a\"\nnamespace = \"b\"\nallow = [\"GET /a/../b\"]\n", "the request"),
            ("[[exempt]]\nname = \"a\"\nnamespace = \"b\"\nallow = [\"GET /\"]\n", "the request"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let escaped = "[[exempt]]\nname = \"a\nb\"\n".replace("a\nb", "a b") + "interface = \"tap[*]0\"\n";
        assert!(merged(&[&escaped]).contains("name = \"a-b\"\ninterface = \"tap[*]0\"\n"));
    }

    #[test]
    fn lists_of_requests_are_united() {
        let scoped = |allow: &str| WEB.replace("[\"imds\"]\n", &format!("[\"imds\"]\nallow = [{allow}]\n"));
        let caution = "# left out, because it may grant credentials or identity: GET /latest/user-data\n";
        let [one, other] = [
            scoped("\"GET /a\", \"GET /b\""),
            scoped("\"GET /b\", \"instance\"").replace("[[", &format!("{caution}[[")),
        ];
        // A node on which the sender made no request suggests an exemption for another endpoint, too.
        let full = WEB.replace("[\"imds\"]", "[\"imds\", \"wireserver\"]");
        let note = "# No rule for a/b at imds, because it makes no request that is known to be harmless:\n# left out, because it may grant credentials or identity: GET /x\n\n";
        let text = merged(&[&one, &format!("{note}{other}"), &full, note]);
        let selector = "namespace = \"tools\"\npod_selector = { match_labels = { app = \"web\" } }\n";
        let exempts = "# This rule exempts every pod of the namespace with the default service account.\n";
        let expected = format!(
            "{exempts}{caution}# Suggested by 2 of 4 nodes.\n[[exempt]]\nname = \"tools-web\"\n{selector}\
             endpoints = [\"imds\"]\nallow = [\"GET /a\", \"GET /b\", \"instance\"]\n\n\
             {exempts}# Suggested by 1 of 4 nodes.\n[[exempt]]\nname = \"tools-web-2\"\n{selector}\
             endpoints = [\"wireserver\"]\n\n{note}"
        );
        assert_eq!(text, expected);
        let many: Vec<_> = (10..50).map(|number| format!("\"GET /{number}\"")).collect();
        let text = merged(&[&scoped(&many.join(", "))]);
        assert!(text.contains("# 8 more requests are left out.\n") && !text.contains("GET /42"), "{text}");
    }

    #[test]
    fn comments_stay_comments() {
        let text = merged(&["# a\r[[exempt]]\n[[exempt]]\nname = \"a\"\nnamespace = \"b\"\n"]);
        assert!(text.starts_with(r"# a\r[[exempt]]"), "{text}");
    }
}
