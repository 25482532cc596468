//! Programs of other software on a cgroup: programs that run after the agent's, and programs that prevent its attachment.

use std::{
    fmt,
    fs::File,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_UDP4_SENDMSG,
    BPF_CGROUP_UDP6_SENDMSG,
};

use crate::datapath::sys::bpf;

/// A program on the cgroup that does not belong to imds-agent.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OtherProgram {
    /// Id of the program, as in `bpftool prog`.
    pub id: u32,
    /// Name of the program; `None` if it has none, or without `CAP_SYS_ADMIN`.
    pub name: Option<String>,
}

impl OtherProgram {
    fn new(id: u32) -> Self {
        Self { id, name: bpf::program_name(id) }
    }
}

impl fmt::Display for OtherProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "program {}", self.id)?;
        self.name.as_ref().map_or(Ok(()), |name| write!(f, " \"{name}\""))
    }
}

/// A program that was attached without `BPF_F_ALLOW_MULTI`, so that the kernel rejects others with `EPERM`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ExclusiveProgram {
    program: OtherProgram,
    allows_override: bool,
    /// Ancestor that the program is attached to; `None` for the cgroup itself.
    ancestor: Option<PathBuf>,
}

impl ExclusiveProgram {
    /// Finds the program that prevents attachments to a hook of the cgroup at `path`: a program of the cgroup itself, or of the
    /// nearest ancestor with programs (`hierarchy_allows_attach`, kernel/bpf/cgroup.c).
    pub fn find(path: &Path, attach_type: bpf_attach_type) -> Option<Self> {
        let hierarchy = path.ancestors().take_while(|path| path.join("cgroup.procs").exists());
        for (height, cgroup) in hierarchy.enumerate() {
            let programs = bpf::cgroup_programs(File::open(cgroup).ok()?, attach_type).ok()?;
            if programs.ids.is_empty() {
                continue;
            }
            let allows_override = programs.allows_override();
            let is_blocking = height == 0 || !allows_override;
            let id = programs.exclusive().filter(|_| is_blocking)?;
            let ancestor = (height > 0).then(|| cgroup.to_owned());
            return Some(Self { program: OtherProgram::new(id), allows_override, ancestor });
        }
        None
    }
}

impl fmt::Display for ExclusiveProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is attached", self.program)?;
        if let Some(ancestor) = &self.ancestor {
            write!(f, " to {}", ancestor.display())?;
        }
        let override_flag = if self.allows_override { "with BPF_F_ALLOW_OVERRIDE, " } else { "" };
        write!(f, " {override_flag}without BPF_F_ALLOW_MULTI")
    }
}

/// Reports whether a later program on this hook can change the destination after the verdict.
pub fn needs_last(attach_type: bpf_attach_type) -> bool {
    matches!(
        attach_type,
        BPF_CGROUP_INET4_CONNECT
            | BPF_CGROUP_INET6_CONNECT
            | BPF_CGROUP_UDP4_SENDMSG
            | BPF_CGROUP_UDP6_SENDMSG
    )
}

/// A program that runs after the agent's, and can change the destination after the verdict.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum LaterProgram {
    /// The program is attached to the same cgroup.
    SameCgroup(OtherProgram),
    /// The program is attached to an ancestor. The kernel runs the programs of a cgroup before those of its ancestors
    /// (`compute_effective_progs`, kernel/bpf/cgroup.c), so moving the agent's program does not help.
    Ancestor(OtherProgram),
}

impl LaterProgram {
    /// Returns the program, on whichever cgroup it is attached.
    pub fn program(&self) -> &OtherProgram {
        match self {
            Self::SameCgroup(program) | Self::Ancestor(program) => program,
        }
    }
}

/// Returns the last program that runs after `program`, preferably one on the same cgroup. Ignores programs of imds-agent, which
/// do not change addresses.
pub fn find_later_program(
    cgroup: impl AsFd,
    attach_type: bpf_attach_type,
    program: u32,
) -> io::Result<Option<LaterProgram>> {
    if !needs_last(attach_type) {
        return Ok(None);
    }
    let local = bpf::cgroup_programs(cgroup.as_fd(), attach_type)?.ids;
    let effective = bpf::effective_programs(cgroup, attach_type)?;
    let last =
        |ids: Vec<u32>| ids.into_iter().rev().find(|&id| !bpf::is_agent_program(id)).map(OtherProgram::new);
    let same_cgroup = last(later_in_cgroup(&local, &effective, program)).map(LaterProgram::SameCgroup);
    Ok(same_cgroup
        .or_else(|| last(later_in_ancestors(&local, &effective, program)).map(LaterProgram::Ancestor)))
}

/// Returns the programs that run after `program` in the effective order and are not in `local`, the list of the cgroup.
fn later_in_ancestors(local: &[u32], effective: &[u32], program: u32) -> Vec<u32> {
    let position = effective.iter().rposition(|&id| id == program);
    let after = position.map_or(&[][..], |position| effective.get(position + 1..).unwrap_or_default());
    after.iter().copied().filter(|id| !local.contains(id)).collect()
}

/// Returns the programs of `local`, the list of the cgroup, that run after `program` in the effective order. Programs with
/// `BPF_F_PREORDER` (Linux 6.15) run before all others of the cgroup, regardless of their position in the list.
fn later_in_cgroup(local: &[u32], effective: &[u32], program: u32) -> Vec<u32> {
    let after = |list: &[u32]| {
        let position = list.iter().rposition(|&id| id == program);
        position.map_or_else(Vec::new, |position| list.iter().skip(position + 1).copied().collect())
    };
    let runs_after = after(effective);
    after(local).into_iter().filter(|id| runs_after.contains(id)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_after_ours() {
        assert!(later_in_cgroup(&[1, 7], &[1, 7, 9], 7).is_empty());
        assert_eq!(later_in_cgroup(&[7, 1, 2], &[7, 1, 2, 9], 7), [1, 2]);
        // If a program has two links, the last one counts.
        assert!(later_in_cgroup(&[7, 1, 7], &[7, 1, 7], 7).is_empty());
        // With BPF_F_PREORDER.
        assert_eq!(later_in_cgroup(&[7, 1, 2], &[2, 7, 1], 7), [1]);
        // Detached in the meantime.
        assert!(later_in_cgroup(&[1, 2], &[1, 2], 7).is_empty());
    }

    #[test]
    fn ancestor_programs_after_ours() {
        assert_eq!(later_in_ancestors(&[1, 7], &[1, 7, 9], 7), [9]);
        assert!(later_in_ancestors(&[7, 1], &[7, 1], 7).is_empty());
        // With BPF_F_PREORDER.
        assert!(later_in_ancestors(&[7], &[9, 7], 7).is_empty());
    }

    #[test]
    fn occupants_in_words() {
        let program = OtherProgram { id: 12, name: Some("foreign".to_owned()) };
        let own = ExclusiveProgram { program: program.clone(), allows_override: false, ancestor: None };
        assert_eq!(own.to_string(), "program 12 \"foreign\" is attached without BPF_F_ALLOW_MULTI");
        let program = OtherProgram { name: None, ..program };
        let above =
            ExclusiveProgram { program, allows_override: true, ancestor: Some("/sys/fs/cgroup".into()) };
        assert_eq!(
            above.to_string(),
            "program 12 is attached to /sys/fs/cgroup with BPF_F_ALLOW_OVERRIDE, without BPF_F_ALLOW_MULTI"
        );
    }
}
