//! Features of the running kernel that the programs use, as variables of the BPF object.

use aya::{programs::ProgramType, sys::is_helper_supported};
use aya_obj::generated::bpf_func_id;
use imds_ebpf_common::names::{GLOBAL_CGROUP_HAS_COOKIE, GLOBAL_HAS_SET_RETVAL, GLOBAL_TC_HAS_COOKIE};

/// Reports whether TC programs can read the network namespace cookie of a packet's socket.
pub(super) fn tc_has_cookie() -> bool {
    has_cookie(ProgramType::SchedClassifier)
}

/// Returns name and value of the variables of the object that depend on the features of the running kernel.
pub fn kernel_features() -> [(&'static str, u8); 3] {
    [
        (GLOBAL_TC_HAS_COOKIE, has_cookie(ProgramType::SchedClassifier).into()),
        (GLOBAL_CGROUP_HAS_COOKIE, cgroup_has_cookie().into()),
        (GLOBAL_HAS_SET_RETVAL, can_choose_errno().into()),
    ]
}

/// Reports whether programs of this type can read the network namespace cookie of a packet's socket (Linux 6.13 for TC,
/// 6.15 for cgroups).
///
/// Without the cookie, `node_egress` can't distinguish packets of macvlan and ipvlan pods from the node's own,
/// `host_network` gives verdicts on the packets of all pods, and `node_allow` gives none on packets.
fn has_cookie(program_type: ProgramType) -> bool {
    is_helper_supported(program_type, bpf_func_id::BPF_FUNC_get_netns_cookie).unwrap_or(false)
}

/// Reports whether `cgroup_skb` programs can read the network namespace cookie of a packet's socket (Linux 6.15).
pub fn cgroup_has_cookie() -> bool {
    has_cookie(ProgramType::CgroupSkb)
}

/// Reports whether connect and sendmsg programs can set the error of a denied call (`bpf_set_retval`, Linux 6.1).
pub fn can_choose_errno() -> bool {
    is_helper_supported(ProgramType::CgroupSockAddr, bpf_func_id::BPF_FUNC_set_retval).unwrap_or(false)
}
