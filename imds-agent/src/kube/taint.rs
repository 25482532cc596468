//! Patch that removes a taint from a node.

use serde_json::{Value, json};

/// Returns the patch (RFC 6902) that removes the taints with `key`, or `None` if there is none. The patch fails if the
/// taints changed in the meantime.
pub(super) fn removal(taints: &Value, key: &str) -> Option<Value> {
    let all = taints.as_array()?;
    let left: Vec<_> = all.iter().filter(|taint| taint.get("key").is_none_or(|its| its != key)).collect();
    (left.len() < all.len()).then(|| {
        json!([
            { "op": "test", "path": "/spec/taints", "value": taints },
            { "op": "replace", "path": "/spec/taints", "value": left },
        ])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_matching_taint_is_removed() {
        let taints = json!([{ "key": "a", "effect": "NoSchedule" }, { "key": "b", "effect": "NoExecute" }]);
        let patch = removal(&taints, "a").unwrap();
        assert_eq!(patch[0]["value"], taints);
        assert_eq!(patch[1]["value"], json!([{ "key": "b", "effect": "NoExecute" }]));
        assert_eq!(removal(&taints, "c"), None);
        assert_eq!(removal(&Value::Null, "a"), None);
    }
}
