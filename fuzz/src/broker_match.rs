//! Rules of the broker: the first line is a rule, and each further line the path of a request. A rule allows only the paths whose
//! first segments are its own, however a server writes them.

use imds_broker::{
    allow::Rule,
    canonical::{canonical_query, check_path},
    provider::Provider,
};

pub(crate) fn run(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.split('\n');
    let first = lines.next().unwrap_or_default();
    let Ok(rule) = Rule::parse(first) else { return };
    let written = rule.to_string();
    assert_eq!(Rule::parse(&written).expect("a written rule is valid"), rule);
    let (method, target) = written.split_once(' ').expect("a method and a path");
    let (prefix, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    if let Some(query) = query {
        assert!(!rule.allows(method, prefix, None) && !rule.allows(method, prefix, Some("")));
        assert_eq!(canonical_query(query).as_deref(), Ok(query));
    } else {
        assert_eq!(written, first.strip_suffix('/').unwrap_or(first));
    }
    assert!(prefix.len() > 1 && !prefix.ends_with('/'));
    assert!(rule.allows(method, prefix, query) && rule.allows(method, &format!("{prefix}/"), query));
    assert!(!rule.allows("TRACE", prefix, query) && !rule.allows(method, "/", query));
    for path in lines.filter(|path| check_path(path).is_ok()) {
        let (of_rule, of_path) = (segments(prefix), segments(path));
        assert_eq!(rule.allows(method, path, query), of_path.starts_with(&of_rule), "{written} {path}");
        // Servers that decode or normalise leave a canonical path unchanged.
        assert!(!path.contains(['%', '\\', ';', '\0']) && path.is_ascii());
        assert!(of_path.iter().all(|segment| !segment.is_empty() && *segment != "." && *segment != ".."));
    }
    for provider in ["azure", "gcp", "unknown"] {
        let unknown = Provider::named(provider).unknown_parameter(Some(&text));
        assert!(unknown.is_none_or(|parameter| text.contains(parameter)));
    }
}

/// Returns the segments of a canonical path without that of a trailing slash.
fn segments(path: &str) -> Vec<&str> {
    let path = path.strip_suffix('/').unwrap_or(path);
    path.split('/').skip(1).collect()
}
