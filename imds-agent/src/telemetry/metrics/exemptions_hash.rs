//! Hash of the exemptions of the effective configuration. A metric exports it, so that an alert can detect a change.

use toml::{Table, Value};

use crate::{
    checksum::{fnv1a, fold},
    datapath::{maps::config_record, object::Maps, pin::dir::PinDir},
};

/// Returns the hash, or `None` if nothing is loaded.
pub(crate) fn exemptions_hash(pins: &PinDir) -> Option<u64> {
    let record = config_record::read(&Maps::open(pins).ok()?).ok()??;
    Some(hash(&record.text))
}

/// Hashes the exemptions of a configuration in TOML. Other keys do not affect the hash.
fn hash(text: &str) -> u64 {
    let table: Table = text.parse().unwrap_or_default();
    let exemptions = table.get("exempt").map(Value::to_string).unwrap_or_default();
    fold(fnv1a(&exemptions))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exemptions_count() {
        let rule = "[[exempt]]\nname = 'a'\nnetns = '/run/netns/a'\n";
        assert_eq!(hash(""), hash("mode = 'audit'"));
        assert_eq!(hash(rule), hash(&format!("mode = 'audit'\n{rule}")));
        assert_ne!(hash(""), hash(rule));
        assert_ne!(hash(rule), hash(&rule.replace("'a'", "'b'")));
        assert!(hash(rule) < 1 << 48);
    }
}
