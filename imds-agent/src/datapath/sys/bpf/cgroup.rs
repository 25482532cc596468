//! Queries of the programs that are attached to a hook of a cgroup.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use aya_obj::generated::{
    BPF_F_ALLOW_MULTI, BPF_F_ALLOW_OVERRIDE, BPF_F_QUERY_EFFECTIVE, bpf_attach_type, bpf_cmd::BPF_PROG_QUERY,
};

use super::bpf_mut;

/// Largest number of programs that a query of a cgroup's hook returns: `BPF_CGROUP_MAX_PROGS` (`include/linux/bpf.h`).
const CGROUP_MAX: usize = 64;

/// Programs of one hook of a cgroup.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct CgroupPrograms {
    /// Ids of the programs, in the order of the query.
    pub ids: Vec<u32>,
    /// Attach flags, which all programs of a hook share; zero in a list of effective programs.
    pub flags: u32,
}

impl CgroupPrograms {
    /// Returns the program that prevents others from being attached: the kernel rejects another program beside one that was
    /// attached without `BPF_F_ALLOW_MULTI` (`__cgroup_bpf_attach`, kernel/bpf/cgroup.c).
    #[must_use]
    pub fn exclusive(&self) -> Option<u32> {
        self.ids.first().copied().filter(|_| self.flags & BPF_F_ALLOW_MULTI == 0)
    }

    /// Reports whether a program on a descendant of the cgroup replaces this one (`BPF_F_ALLOW_OVERRIDE`).
    #[must_use]
    pub fn allows_override(&self) -> bool {
        self.flags & BPF_F_ALLOW_OVERRIDE != 0
    }
}

/// Lists the programs that are attached to the cgroup itself, in the order in which they were attached.
pub fn cgroup_programs(cgroup: impl AsFd, attach_type: bpf_attach_type) -> io::Result<CgroupPrograms> {
    query(cgroup, attach_type, 0)
}

/// Lists the programs that run for sockets in the cgroup, including those of its ancestors, in the order in which they run.
pub fn effective_programs(cgroup: impl AsFd, attach_type: bpf_attach_type) -> io::Result<Vec<u32>> {
    Ok(query(cgroup, attach_type, BPF_F_QUERY_EFFECTIVE)?.ids)
}

fn query(cgroup: impl AsFd, attach_type: bpf_attach_type, query_flags: u32) -> io::Result<CgroupPrograms> {
    /// First fields of the command's part of `union bpf_attr`. Older kernels reject later fields that are not zero.
    #[repr(C)]
    struct Attr {
        target_fd: i32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        count: u32,
        pad: u32,
    }
    #[expect(clippy::cast_possible_truncation, reason = "the value is 64")]
    const COUNT: u32 = CGROUP_MAX as u32;
    let mut programs = [0_u32; CGROUP_MAX];
    let mut attr = Attr {
        target_fd: cgroup.as_fd().as_raw_fd(),
        attach_type: attach_type as u32,
        query_flags,
        attach_flags: 0,
        prog_ids: programs.as_mut_ptr() as u64,
        count: COUNT,
        pad: 0,
    };
    bpf_mut(BPF_PROG_QUERY, &mut attr)?;
    let ids = programs.into_iter().take(attr.count as usize).collect();
    Ok(CgroupPrograms { ids, flags: attr.attach_flags })
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
