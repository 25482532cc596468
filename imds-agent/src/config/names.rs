//! Validation of Kubernetes names, like `k8s.io/apimachinery/pkg/util/validation`.

/// Reports whether `name` is a valid namespace name (RFC 1123 label).
pub(super) fn is_dns_label(name: &str) -> bool {
    is_delimited(name, 63, |byte| byte.is_ascii_lowercase() || byte.is_ascii_digit(), b"-")
}

/// Reports whether `name` is a valid name of a node or service account (RFC 1123 subdomain).
pub(super) fn is_dns_subdomain(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|label| {
            is_delimited(label, 253, |byte| byte.is_ascii_lowercase() || byte.is_ascii_digit(), b"-")
        })
}

/// Reports whether `key` is a valid label key: a name, optionally with a domain and a slash before it.
pub(super) fn is_label_key(key: &str) -> bool {
    match key.split_once('/') {
        Some((domain, name)) => is_dns_subdomain(domain) && is_qualified(name),
        None => is_qualified(key),
    }
}

/// Reports whether `value` is a valid label value.
pub(super) fn is_label_value(value: &str) -> bool {
    value.is_empty() || is_qualified(value)
}

fn is_qualified(name: &str) -> bool {
    is_delimited(name, 63, |byte| byte.is_ascii_alphanumeric(), b"-_.")
}

/// Reports whether `name` starts and ends with bytes that `ends` accepts, and has only these and `inside` between.
fn is_delimited(name: &str, longest: usize, ends: impl Fn(u8) -> bool, inside: &[u8]) -> bool {
    let bytes = name.as_bytes();
    bytes.len() <= longest
        && bytes.first().is_some_and(|&byte| ends(byte))
        && bytes.last().is_some_and(|&byte| ends(byte))
        && bytes.iter().all(|&byte| ends(byte) || inside.contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubernetes_name_validation() {
        let long = "a".repeat(64);
        for good in ["kube-system", "a", "0-9"] {
            assert!(is_dns_label(good) && is_dns_subdomain(good) && is_label_key(good), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "*", &long] {
            assert!(!is_dns_label(bad), "{bad}");
        }
        assert!(is_dns_subdomain("ip-10-0-0-4.ec2.internal") && !is_dns_subdomain("a..b"));
        for good in ["app", "app.kubernetes.io/name", "A_b.c-D"] {
            assert!(is_label_key(good), "{good}");
        }
        for bad in ["", "/a", "a/", "a/b/c", "a b", "Up.io/a", &long] {
            assert!(!is_label_key(bad), "{bad}");
        }
        assert!(is_label_value("") && is_label_value("v1.2_3-X"));
        assert!(!is_label_value("-") && !is_label_value("a/b") && !is_label_value(&long));
    }
}
