//! Requests that a scoped exemption allows.
//!
//! A rule is a method and a path: `GET /metadata/instance/compute` allows that path and all paths below it, compared by whole
//! segments. The keyword `instance` stands for the harmless paths of a provider: region, zone, instance type, maintenance, tags.

use std::fmt;

/// Keyword for the harmless paths of a provider.
pub const INSTANCE: &str = "instance";

/// Error in the text of a rule.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RuleError(String);

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for RuleError {}

/// Request that is allowed: a method, and a path with all paths below it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rule {
    method: String,
    path: String,
}

impl Rule {
    /// Parses a rule such as `GET /metadata/instance/compute`.
    ///
    /// # Errors
    ///
    /// Returns an error if the text is not a known method, one space and an absolute path in canonical form.
    pub fn parse(text: &str) -> Result<Self, RuleError> {
        let (method, path) = text.split_once(' ').ok_or_else(|| {
            RuleError(format!("{text:?} is not METHOD PATH, e.g. \"GET /metadata/instance\""))
        })?;
        if !["GET", "HEAD", "POST", "PUT", "DELETE"].contains(&method) {
            return Err(RuleError(format!("method {method:?} is not GET, HEAD, POST, PUT or DELETE")));
        }
        if !path.starts_with('/') {
            return Err(RuleError(format!("path {path:?} does not start with /")));
        }
        Ok(Self { method: method.to_owned(), path: path.to_owned() })
    }
}

/// Returns the rules that the keyword [`INSTANCE`] stands for, or `None` if the provider is unknown or has no harmless paths.
#[must_use]
pub fn instance_rules(provider: &str) -> Option<&'static [&'static str]> {
    match provider {
        "azure" => Some(&["GET /metadata/instance/compute/location"]),
        _ => None,
    }
}
