//! The allow list of the node: processes outside of pods that may reach protected endpoints.

/// Largest number of entries of the allow list.
pub const MAX_ALLOWED: usize = 64;

/// Deepest level in the cgroup hierarchy at which a cgroup of the allow list can be; the root has level 0. The programs compare
/// the ancestors of a process down to this level.
pub const MAX_CGROUP_LEVEL: i32 = 12;

/// Key of the map of allowed processes. The value is the number of the entry in the configuration, from 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct AllowedProcess {
    /// User ID in the initial user namespace, or id of a cgroup v2.
    pub id: u64,
    /// An [`AllowedKind`].
    pub kind: u64,
}

/// Kind of an entry of the allow list.
#[repr(u64)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AllowedKind {
    /// Processes of a user.
    Uid = 1,
    /// Processes in a cgroup and below.
    Cgroup = 2,
}

impl AllowedProcess {
    /// Creates the key of this kind with this number.
    #[inline(always)]
    #[must_use]
    pub const fn new(kind: AllowedKind, id: u64) -> Self {
        Self { id, kind: kind as u64 }
    }
}

const _: () = assert!(size_of::<AllowedProcess>() == 16);

// SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for AllowedProcess {}
