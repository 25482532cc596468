//! The `node_allow` hook: calls of a process of the node that is not in the allow list.

use imds_ebpf_common::{AllowedKind, AllowedProcess, Hook};
use nix::unistd::getuid;

use super::{
    Enforced, VerifyError,
    host_calls::check_calls,
    verify_report::{Skip, VerifyCheck},
};
use crate::{config::NodeProcess, datapath::maps::node_allow_map, node::cgroup};

/// Checks that calls of a process without an entry are refused.
pub(crate) fn check(enforced: &Enforced) -> Result<Vec<VerifyCheck>, VerifyError> {
    let report = enforced.status.node_allow.as_ref();
    let is_attached = report.is_some_and(|report| report.attached);
    let mut checks = vec![VerifyCheck::attached(Hook::NodeAllow, is_attached)];
    if let Some(cgroup) = report.and_then(|report| report.cgroup) {
        checks.extend(check_calls(enforced, Hook::NodeAllow, cgroup, "unlisted process")?);
    }
    Ok(checks)
}

/// Returns why the path of the node can't be tested, if the allow list does not contain this process.
pub(crate) fn restriction(enforced: &Enforced) -> Result<Option<Skip>, VerifyError> {
    if !enforced.hooks.contains(Hook::NodeAllow) {
        return Ok(None);
    }
    let allowed = node_allow_map::read(&enforced.maps)
        .map_err(|source| VerifyError::Map { map: imds_ebpf_common::names::MAP_NODE_ALLOW, source })?;
    let cgroups = cgroup::ids_of_this_process().unwrap_or_default();
    let listed_cgroups = cgroups.into_iter().map(|id| AllowedProcess::new(AllowedKind::Cgroup, id));
    let uid = AllowedProcess::new(AllowedKind::Uid, getuid().as_raw().into());
    let is_listed = listed_cgroups.chain([uid]).any(|process| allowed.contains_key(&process));
    let path = cgroup::path_of_this_process().ok().flatten();
    Ok((!is_listed).then(|| Skip::new(unlisted(getuid().as_raw(), path))))
}

/// Describes that the allow list contains neither the user nor the cgroup of this process, with the entries to add.
fn unlisted(uid: u32, cgroup: Option<String>) -> String {
    // A path that the configuration rejects, such as the root of the hierarchy, is no advice.
    let cgroup = cgroup.and_then(|path| NodeProcess::from_cgroup(path).ok());
    let entries = [Some(NodeProcess::Uid(uid)), cgroup].into_iter().flatten();
    let entries: Vec<_> = entries.map(|entry| format!("{:?}", entry.to_string())).collect();
    format!(
        "not tested: node.allow does not contain the process of this command; add {} to test it",
        entries.join(" or ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unlisted_process_is_named_with_its_entries() {
        let text_for = |cgroup: &str| unlisted(7, Some(cgroup.to_owned()));
        let text = "not tested: node.allow does not contain the process of this command; add ";
        assert_eq!(
            text_for("/user.slice/a"),
            format!("{text}\"uid:7\" or \"cgroup:/user.slice/a\" to test it")
        );
        assert_eq!(text_for("/"), format!("{text}\"uid:7\" to test it"));
        assert_eq!(text_for("/../a"), text_for("/"));
        assert_eq!(unlisted(7, None), text_for("/"));
    }
}
