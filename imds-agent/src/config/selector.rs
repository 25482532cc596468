//! Label selectors with the semantics of Kubernetes.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::{ConfigError, names, source::SourceFile};

/// Label selector of pods. All requirements must hold.
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
    #[must_use]
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

    pub(super) fn parse(table: &Spanned<SelectorTable>, source: SourceFile<'_>) -> Result<Self, ConfigError> {
        let SelectorTable { match_labels, match_expressions } = table.get_ref();
        let mut requirements = BTreeSet::new();
        for (key, value) in match_labels {
            check_key(key, source)?;
            check_value(value, source)?;
            // Kubernetes treats `match_labels` as `In`, too. Equal selectors then compare as equal.
            let condition = Condition::In([value.get_ref().clone()].into());
            requirements.insert(Requirement { key: key.get_ref().clone(), condition });
        }
        for expression in match_expressions {
            requirements.insert(parse_expression(expression, source)?);
        }
        if requirements.is_empty() {
            let message = "exempt.pod_selector: is empty; remove the key to match every pod";
            return Err(source.error(table.span(), message.to_owned()));
        }
        Ok(Self { requirements })
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
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<Spanned<Vec<Spanned<String>>>>,
}

enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

fn parse_expression(table: &ExpressionTable, source: SourceFile<'_>) -> Result<Requirement, ConfigError> {
    let ExpressionTable { key, operator, values } = table;
    check_key(key, source)?;
    let condition = match (parse_operator(operator, source)?, values) {
        (Operator::In, Some(values)) => Condition::In(parse_values(values, source)?),
        (Operator::NotIn, Some(values)) => Condition::NotIn(parse_values(values, source)?),
        (Operator::Exists, None) => Condition::Exists,
        (Operator::DoesNotExist, None) => Condition::DoesNotExist,
        (Operator::In | Operator::NotIn, None) => {
            let message = "exempt.pod_selector.match_expressions.values: In and NotIn require values";
            return Err(source.error(operator.span(), message.to_owned()));
        }
        (Operator::Exists | Operator::DoesNotExist, Some(values)) => {
            let message =
                "exempt.pod_selector.match_expressions.values: Exists and DoesNotExist take no values";
            return Err(source.error(values.span(), message.to_owned()));
        }
    };
    Ok(Requirement { key: key.get_ref().clone(), condition })
}

fn parse_operator(operator: &Spanned<String>, source: SourceFile<'_>) -> Result<Operator, ConfigError> {
    Ok(match operator.as_ref().as_str() {
        "In" => Operator::In,
        "NotIn" => Operator::NotIn,
        "Exists" => Operator::Exists,
        "DoesNotExist" => Operator::DoesNotExist,
        other => {
            let message = format!(
                "exempt.pod_selector.match_expressions.operator: {other:?} is not one of In, NotIn, Exists, DoesNotExist"
            );
            return Err(source.error(operator.span(), message));
        }
    })
}

fn parse_values(
    values: &Spanned<Vec<Spanned<String>>>,
    source: SourceFile<'_>,
) -> Result<BTreeSet<String>, ConfigError> {
    if values.get_ref().is_empty() {
        let message = "exempt.pod_selector.match_expressions.values: must not be empty";
        return Err(source.error(values.span(), message.to_owned()));
    }
    for value in values.get_ref() {
        check_value(value, source)?;
    }
    Ok(values.get_ref().iter().map(|value| value.get_ref().clone()).collect())
}

fn check_key(key: &Spanned<String>, source: SourceFile<'_>) -> Result<(), ConfigError> {
    if names::is_label_key(key.get_ref()) {
        return Ok(());
    }
    let message = format!("exempt.pod_selector: {:?} is not a valid label key", key.get_ref());
    Err(source.error(key.span(), message))
}

fn check_value(value: &Spanned<String>, source: SourceFile<'_>) -> Result<(), ConfigError> {
    if names::is_label_value(value.get_ref()) {
        return Ok(());
    }
    let message = format!("exempt.pod_selector: {:?} is not a valid label value", value.get_ref());
    Err(source.error(value.span(), message))
}
