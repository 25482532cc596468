//! Firewall listings: any listing is explained, and a rule is called removable only if its removal opens nothing.

use imds_agent::{
    config::provider::Provider,
    diagnose::doctor::{DoctorCheck, explain_rules},
};
use imds_ebpf_common::Mode;

pub(crate) fn run(bytes: &[u8]) {
    let listing = String::from_utf8_lossy(bytes);
    let azure = Provider::named("azure").expect("a provider");
    let explain = |mode| explain_rules(&listing, azure, mode);
    let enforced = explain(Mode::Enforce);
    for rule in enforced.iter().filter_map(|check| check.rule.as_ref()) {
        assert!(!rule.removable || rule.opens.is_empty(), "{rule:?}");
        assert!(
            !rule.removable || azure.endpoints().any(|endpoint| endpoint.address == rule.address),
            "{rule:?}"
        );
    }
    for mode in [Mode::Audit, Mode::Off] {
        let is_removable =
            |check: &DoctorCheck| check.rule.as_ref().is_some_and(|rule| rule.removable || rule.conflicts);
        assert!(!explain(mode).iter().any(is_removable), "{mode:?}");
    }
}
