//! Queries of the programs that are attached to a hook of a cgroup.

use std::{io, os::fd::AsFd};

use aya_obj::generated::{BPF_F_ALLOW_MULTI, BPF_F_ALLOW_OVERRIDE, BPF_F_QUERY_EFFECTIVE, bpf_attach_type};

use super::{query, raw_fd};

/// Programs of one hook of a cgroup.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct CgroupPrograms {
    /// Ids of the programs, in the order of the query.
    pub ids: Vec<u32>,
    /// Attach flags, which all programs of a hook share.
    pub flags: u32,
}

impl CgroupPrograms {
    /// Returns the program that prevents others from being attached: the kernel rejects another program beside one that was
    /// attached without `BPF_F_ALLOW_MULTI` (`__cgroup_bpf_attach`, kernel/bpf/cgroup.c).
    pub fn exclusive(&self) -> Option<u32> {
        self.ids.first().copied().filter(|_| self.flags & BPF_F_ALLOW_MULTI == 0)
    }

    /// Reports whether a program on a descendant of the cgroup replaces this one (`BPF_F_ALLOW_OVERRIDE`).
    pub fn allows_override(&self) -> bool {
        self.flags & BPF_F_ALLOW_OVERRIDE != 0
    }
}

/// Lists the programs that are attached to the cgroup itself, in the order in which they were attached.
pub fn cgroup_programs(cgroup: impl AsFd, attach_type: bpf_attach_type) -> io::Result<CgroupPrograms> {
    let (ids, flags) = query(raw_fd(&cgroup), attach_type, 0, None)?;
    Ok(CgroupPrograms { ids, flags })
}

/// Lists the programs that run for sockets in the cgroup, including those of its ancestors, in the order in which they run.
pub fn effective_programs(cgroup: impl AsFd, attach_type: bpf_attach_type) -> io::Result<Vec<u32>> {
    Ok(query(raw_fd(&cgroup), attach_type, BPF_F_QUERY_EFFECTIVE, None)?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exclusive_programs() {
        let programs = |ids: &[u32], flags| CgroupPrograms { ids: ids.to_vec(), flags };
        assert_eq!(programs(&[], 0).exclusive(), None);
        assert_eq!(programs(&[7], 0).exclusive(), Some(7));
        assert_eq!(programs(&[7], BPF_F_ALLOW_OVERRIDE).exclusive(), Some(7));
        assert_eq!(programs(&[7, 8], BPF_F_ALLOW_MULTI).exclusive(), None);
        assert!(programs(&[7], BPF_F_ALLOW_OVERRIDE).allows_override());
    }
}
