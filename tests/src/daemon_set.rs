//! The container of the `DaemonSet` in deploy.

const MANIFEST: &str = include_str!("../../deploy/kubernetes/base/daemonset.yaml");

/// Returns the names of the capabilities that the container keeps, without the prefix `CAP_`. Panics if it does not drop all
/// others.
#[must_use]
pub fn capabilities() -> Vec<&'static str> {
    assert!(MANIFEST.contains("drop: [ALL]\n"), "the container keeps default capabilities");
    let mut lines = MANIFEST.lines();
    let added = lines.find_map(|line| line.trim().strip_prefix("add: [")?.strip_suffix(']'));
    added.expect("capabilities").split(", ").collect()
}
