//! Label selectors with the semantics of Kubernetes.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::{names, source::Diagnostics};

/// Key of the selector of pods in a rule.
pub(super) const POD_SELECTOR: &str = "exempt.pod_selector";
/// Key of the selector of namespaces in a rule.
pub(super) const NAMESPACE_SELECTOR: &str = "exempt.namespace_selector";
/// Key of the selector of nodes in a node pool.
pub(super) const NODE_SELECTOR: &str = "node_pool.node_selector";

/// Label selector of pods, namespaces or nodes. All requirements must hold.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Selector {
    requirements: BTreeSet<Requirement>,
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Requirement {
    key: String,
    condition: Condition,
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Condition {
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
}

impl Selector {
    /// Reports whether labels satisfy all requirements. `label` returns the value of a label. `NotIn` also holds if the label is
    /// missing.
    pub fn matches<'l>(&self, label: impl Fn(&str) -> Option<&'l str>) -> bool {
        self.requirements.iter().all(|Requirement { key, condition }| {
            let value = label(key);
            match condition {
                Condition::In(values) => value.is_some_and(|value| values.contains(value)),
                Condition::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
                Condition::Exists => value.is_some(),
                Condition::DoesNotExist => value.is_none(),
            }
        })
    }

    /// Returns the keys of the labels that decide.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.requirements.iter().map(|requirement| requirement.key.as_str())
    }

    /// Parses the selector at the key `of`. Records the error of each requirement.
    pub(super) fn parse(
        table: &Spanned<SelectorTable>,
        of: &'static str,
        diagnostics: &mut Diagnostics<'_>,
    ) -> Option<Self> {
        let SelectorTable { match_labels, match_expressions } = table.get_ref();
        let before = diagnostics.count();
        if match_labels.is_empty() && match_expressions.is_empty() {
            let remedy = match of {
                POD_SELECTOR => "remove the key to match every pod",
                NODE_SELECTOR => "remove the key to match every node",
                _ => "set match_labels or match_expressions",
            };
            diagnostics.error(table.span(), format!("{of}: is empty; {remedy}"));
        }
        let mut requirements = BTreeSet::new();
        for (key, value) in match_labels {
            check_key(key, of, diagnostics);
            check_value(value, of, diagnostics);
            // Kubernetes treats `match_labels` as `In`, too. Equal selectors then compare as equal.
            let condition = Condition::In([value.get_ref().clone()].into());
            requirements.insert(Requirement { key: key.get_ref().clone(), condition });
        }
        for expression in match_expressions {
            requirements.extend(parse_expression(expression, of, diagnostics));
        }
        (diagnostics.count() == before).then_some(Self { requirements })
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SelectorTable {
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    match_labels: BTreeMap<Spanned<String>, Spanned<String>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    match_expressions: Vec<ExpressionTable>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct ExpressionTable {
    key: Spanned<String>,
    operator: Spanned<String>,
    values: Option<Spanned<Vec<Spanned<String>>>>,
}

fn parse_expression(
    table: &ExpressionTable,
    of: &str,
    diagnostics: &mut Diagnostics<'_>,
) -> Option<Requirement> {
    let ExpressionTable { key, operator, values } = table;
    check_key(key, of, diagnostics);
    let condition = match (operator.as_ref().as_str(), values) {
        ("In", Some(values)) => Condition::In(parse_values(values, of, diagnostics)),
        ("NotIn", Some(values)) => Condition::NotIn(parse_values(values, of, diagnostics)),
        ("Exists", None) => Condition::Exists,
        ("DoesNotExist", None) => Condition::DoesNotExist,
        ("In" | "NotIn", None) => {
            let message = format!("{of}.match_expressions.values: In and NotIn require values");
            diagnostics.error(operator.span(), message);
            return None;
        }
        ("Exists" | "DoesNotExist", Some(values)) => {
            let message = format!("{of}.match_expressions.values: Exists and DoesNotExist take no values");
            diagnostics.error(values.span(), message);
            return None;
        }
        (other, _) => {
            let message = format!(
                "{of}.match_expressions.operator: {other:?} is not one of In, NotIn, Exists, DoesNotExist"
            );
            diagnostics.error(operator.span(), message);
            return None;
        }
    };
    Some(Requirement { key: key.get_ref().clone(), condition })
}

/// Parses the values of an expression. Records an error for an empty list and for each invalid value.
fn parse_values(
    values: &Spanned<Vec<Spanned<String>>>,
    of: &str,
    diagnostics: &mut Diagnostics<'_>,
) -> BTreeSet<String> {
    if values.get_ref().is_empty() {
        let message = format!(
            "{of}.match_expressions.values: an empty list has no value to compare with; list at least one value, or use the \
             operator Exists or DoesNotExist without values"
        );
        diagnostics.error(values.span(), message);
    }
    for value in values.get_ref() {
        check_value(value, of, diagnostics);
    }
    values.get_ref().iter().map(|value| value.get_ref().clone()).collect()
}

fn check_key(key: &Spanned<String>, of: &str, diagnostics: &mut Diagnostics<'_>) {
    if !names::is_label_key(key.get_ref()) {
        let message = format!("{of}: {:?} is not a valid label key", key.get_ref());
        diagnostics.error(key.span(), message);
    }
}

fn check_value(value: &Spanned<String>, of: &str, diagnostics: &mut Diagnostics<'_>) {
    if !names::is_label_value(value.get_ref()) {
        let message = format!("{of}: {:?} is not a valid label value", value.get_ref());
        diagnostics.error(value.span(), message);
    }
}
