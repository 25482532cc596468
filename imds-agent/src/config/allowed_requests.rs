//! `exempt.allow`: the requests of a scoped exemption.

use std::collections::BTreeSet;

use imds_broker::allow::{INSTANCE, Rule, instance_rules};
use toml::Spanned;

use super::{
    ConfigError,
    source::{Diagnostics, Location},
    suggest::did_you_mean,
};

/// Largest number of entries in one list, so that the message to the broker stays short.
const MAX_ENTRIES: usize = 32;
/// Largest length of an entry in bytes.
const MAX_LEN: usize = 256;

/// Requests that a rule allows, before keywords are expanded, which depends on the provider.
#[derive(Clone, Debug)]
pub(super) struct AllowedRequests {
    entries: Vec<String>,
    /// Location of the keyword `instance`, if it is in the list.
    instance: Option<Location>,
}

impl AllowedRequests {
    /// Parses the list. Records an error for each invalid entry.
    pub(super) fn parse(list: &Spanned<Vec<Spanned<String>>>, diagnostics: &mut Diagnostics<'_>) -> Self {
        let entries = list.get_ref();
        if entries.is_empty() || entries.len() > MAX_ENTRIES {
            let message = format!("exempt.allow: needs 1 to {MAX_ENTRIES} entries");
            diagnostics.error(list.span(), message);
        }
        let mut seen = BTreeSet::new();
        let mut instance = None;
        for entry in entries {
            let text = entry.get_ref();
            let checked = check(text, seen.insert(text));
            if checked.is_ok() && text == INSTANCE {
                instance = Some(diagnostics.source.location(entry.span()));
            }
            diagnostics.ok(entry.span(), checked);
        }
        Self { entries: entries.iter().map(|entry| entry.get_ref().clone()).collect(), instance }
    }

    /// Returns the list with the keyword replaced by the requests that it stands for.
    pub(super) fn expand(self, provider: &str) -> Result<Vec<String>, ConfigError> {
        let Some(instance) = self.instance else { return Ok(self.entries) };
        let Some(rules) = instance_rules(provider) else {
            let message = format!(
                "exempt.allow: \"{INSTANCE}\" has no meaning for provider {provider:?}: list requests such as \"GET /path\""
            );
            return Err(instance.error(message));
        };
        let rules = rules.iter().map(|&rule| rule.to_owned());
        let others = self.entries.into_iter().filter(|entry| entry != INSTANCE);
        // A set, because the keyword may stand for a request that is listed too.
        Ok(others.chain(rules).collect::<BTreeSet<_>>().into_iter().collect())
    }
}

fn check(text: &str, is_new: bool) -> Result<(), String> {
    if !is_new {
        return Err(format!("exempt.allow: {text:?} is listed twice"));
    }
    if text == INSTANCE {
        return Ok(());
    }
    if text.len() > MAX_LEN {
        return Err(format!("exempt.allow: an entry is longer than {MAX_LEN} bytes"));
    }
    let suggestion = if text.contains(' ') { String::new() } else { did_you_mean(text, [INSTANCE]) };
    Rule::parse(text).map(drop).map_err(|error| format!("exempt.allow: {error}{suggestion}"))
}
