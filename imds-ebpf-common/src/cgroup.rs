//! Record of the desired state of the cgroup hooks.

/// Value of [`CgroupRecord::sendmsg`] if the configuration turns the sendmsg programs off.
pub const SENDMSG_OFF: u32 = u32::MAX;

/// Desired state of the `socket` and `local_service` hooks. The agent writes it for `status`, which knows neither the
/// command line nor the node's routes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CgroupRecord {
    /// Id of the cgroup (its inode number); 0 if neither hook is on.
    pub cgroup: u64,
    /// Number of the reason why the sendmsg programs are attached; 0 if they are not needed, [`SENDMSG_OFF`] if they are
    /// turned off.
    pub sendmsg: u32,
    /// 1 while a protected address is local to the node, else 0.
    pub local_service: u32,
}

const _: () = assert!(size_of::<CgroupRecord>() == 16);

// SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for CgroupRecord {}
