//! Metrics and labels of a `PromQL` expression. Covers the part of the language that the dashboard and the alerts use.

use std::collections::BTreeSet;

/// Keywords and functions that are not metrics.
const WORDS: [&str; 7] = ["and", "or", "unless", "group_left", "group_right", "bool", "offset"];

/// Metrics of an expression, and the labels by which it selects or groups them.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct PromqlNames {
    /// Names of time series without labels.
    pub metrics: BTreeSet<String>,
    /// Names of labels of all metrics.
    pub labels: BTreeSet<String>,
}

/// Returns the metrics and labels of `expression`.
///
/// # Panics
///
/// Panics if the expression is malformed.
#[must_use]
pub fn names_in(expression: &str) -> PromqlNames {
    let mut names = PromqlNames::default();
    let mut rest = expression;
    while let Some(first) = rest.chars().next() {
        if !is_name(first) || first.is_ascii_digit() {
            rest = match first {
                '{' => {
                    let (inside, after) = until(&rest[1..], '}');
                    names.labels.extend(matchers(inside));
                    after
                }
                '[' => until(&rest[1..], ']').1,
                '"' => until(&rest[1..], '"').1,
                _ if first.is_ascii_digit() => rest.trim_start_matches(|c: char| is_name(c) || c == '.'),
                _ => &rest[first.len_utf8()..],
            };
            continue;
        }
        let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let follows = after.trim_start();
        rest = after;
        if ["by", "without", "on", "ignoring"].contains(&name) {
            let (labels, after) = until(follows.strip_prefix('(').expect("labels in parentheses"), ')');
            names.labels.extend(labels.split(',').map(|label| label.trim().to_owned()));
            rest = after;
        } else if !["(", "by ", "without "].iter().any(|start| follows.starts_with(start))
            && !WORDS.contains(&name)
        {
            names.metrics.insert(name.to_owned());
        }
    }
    names
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// Splits the text at the next `end` outside of strings.
fn until(text: &str, end: char) -> (&str, &str) {
    let mut in_string = false;
    for (at, c) in text.char_indices() {
        if c == end && !in_string {
            return (&text[..at], &text[at + c.len_utf8()..]);
        }
        in_string ^= c == '"';
    }
    panic!("missing {end} after {text}");
}

/// Returns the labels of matchers such as `a="b",c=~"d"`.
fn matchers(inside: &str) -> Vec<String> {
    let mut labels = Vec::new();
    let mut rest = inside;
    while let Some(operator) = rest.find(['=', '!']) {
        labels.push(rest[..operator].trim_matches([',', ' ']).to_owned());
        let value = rest[operator..].find('"').expect("a value in quotes") + operator + 1;
        rest = until(&rest[value..], '"').1;
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_and_labels_are_extracted() {
        let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<BTreeSet<_>>();
        for (expression, metrics, labels) in [
            ("up == 0", &["up"][..], &[][..]),
            (r#"up{job="a}b"} == 0"#, &["up"], &["job"]),
            (
                r#"topk(10, sum by (instance, hook) (rate(a_total{x=~"$y",z!="b"}[5m]))) > 1.5e3"#,
                &["a_total"],
                &["hook", "instance", "x", "z"],
            ),
            ("count(a == 0) or vector(0)", &["a"], &[]),
            ("a / on (b) group_left c", &["a", "c"], &["b"]),
        ] {
            assert_eq!(
                names_in(expression),
                PromqlNames { metrics: set(metrics), labels: set(labels) },
                "{expression}"
            );
        }
    }
}
