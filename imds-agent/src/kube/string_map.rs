//! Map of strings for the metadata of pods.

use std::collections::BTreeMap;

/// Map of strings in a sorted slice. The smallest `BTreeMap` of strings takes 544 bytes, and the agent keeps two maps for
/// each pod.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct StringMap(Box<[(String, String)]>);

impl StringMap {
    /// Returns the value of `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        let index = self.0.binary_search_by(|(other, _)| other.as_str().cmp(key)).ok()?;
        self.0.get(index).map(|(_, value)| value.as_str())
    }
}

impl FromIterator<(String, String)> for StringMap {
    /// Keeps the last value of a duplicate key.
    fn from_iter<I: IntoIterator<Item = (String, String)>>(pairs: I) -> Self {
        let sorted: BTreeMap<_, _> = pairs.into_iter().collect();
        Self(sorted.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_in_any_order() {
        let pairs = [("b", "1"), ("a", "2"), ("c", "3"), ("b", "4")];
        let map: StringMap =
            pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into_iter().collect();
        let found = ["a", "b", "c", "d", ""].map(|key| map.get(key));
        assert_eq!(found, [Some("2"), Some("4"), Some("3"), None, None]);
        assert_eq!(StringMap::default().get("a"), None);
    }
}
