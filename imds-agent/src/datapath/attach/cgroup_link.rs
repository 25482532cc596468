//! Link of one program on a cgroup: attaches, pins and repairs it.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Instant,
};

use aya_obj::generated::bpf_attach_type;

use super::{
    cgroup_backoff::CgroupBackoff,
    cgroup_order::{self, ExclusiveProgram, LaterProgram, OtherProgram},
    mprog,
};
use crate::datapath::{
    DatapathError,
    object::{ObjectError, Programs},
    pin::dir::{self, io_error},
    sys::bpf::{self, Target},
};

/// Kind of a change on a cgroup.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CgroupChangeKind {
    /// A program was attached.
    Attached,
    /// The program of an earlier agent was replaced.
    Replaced,
    /// A link was pinned again after its pin was removed.
    Pinned,
    /// A program was moved after those of other software.
    Reordered,
    /// A program was detached from the cgroup.
    Detached,
    /// A program is attached and last again, after a failure.
    Recovered,
    /// A program cannot be attached, or does not stay last.
    Failed,
}

/// A change on a cgroup, reported once.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CgroupChange {
    /// Kind of this change, which decides the log level.
    pub kind: CgroupChangeKind,
    /// True if the cgroup was discovered by this reconciliation.
    pub is_new: bool,
    /// Description of the change for the log.
    pub text: String,
}

impl CgroupChange {
    pub(crate) fn new(kind: CgroupChangeKind, text: impl Into<String>) -> Self {
        Self { kind, is_new: false, text: text.into() }
    }
}

/// Cgroup directory that the agent keeps open.
#[derive(Debug)]
pub(crate) struct OpenCgroup {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    /// Id of the cgroup: its inode number (kernfs).
    pub(crate) id: u64,
}

/// The link of one program on a cgroup.
#[derive(Debug)]
pub(crate) struct CgroupLink {
    program: &'static str,
    pub(super) attach_type: bpf_attach_type,
    pin: PathBuf,
    fd: Option<OwnedFd>,
    /// Reason why the program is not attached, or not last, as `status` shows it.
    pub(super) failure: Option<String>,
    /// Failure that was logged last.
    reported: Option<String>,
    attaching: CgroupBackoff,
    reordering: CgroupBackoff,
}

impl CgroupLink {
    /// Opens the link that an earlier agent pinned at `pin`, if it is still attached to this hook.
    pub(crate) fn adopt(
        program: &'static str,
        attach_type: bpf_attach_type,
        pin: PathBuf,
        cgroup: u64,
    ) -> Result<Self, DatapathError> {
        let (attaching, reordering) = Default::default();
        let mut link = Self {
            program,
            attach_type,
            pin,
            fd: None,
            failure: None,
            reported: None,
            attaching,
            reordering,
        };
        if let Some(fd) = dir::open(&link.pin)?
            && link.attached(cgroup, &fd).is_some_and(|attached| !bpf::is_foreign(attached.program))
        {
            link.fd = Some(fd);
        }
        Ok(link)
    }

    /// Reconciles the link: attaches the program, replaces the program of an earlier agent, pins the link, and moves it
    /// after the programs of other software. A program that cannot be attached is reported as a change, not as an error.
    pub(crate) fn restore(
        &mut self,
        programs: &Programs,
        cgroup: &OpenCgroup,
        changes: &mut Vec<CgroupChange>,
    ) -> Result<(), DatapathError> {
        let name = self.program;
        let fd = match programs.fd(name) {
            Ok(fd) => fd,
            Err(error) => {
                // The program of an earlier agent stays attached.
                let text = not_loaded(error, &cgroup.path);
                self.report_failure(text, changes);
                return Ok(());
            }
        };
        let attached = self.fd.as_ref().and_then(|fd| self.attached(cgroup.id, fd));
        let (Some(link), Some(link_fd)) = (attached, &self.fd) else {
            return self.attach(programs, cgroup, changes);
        };
        let at = cgroup.path.display();
        if Some(link.program) != programs.id(name) {
            bpf::link_update(link_fd, fd).map_err(io_error("replace the program on", &cgroup.path))?;
            (self.failure, self.reported) = (None, None);
            let text = format!("replaced {name} of an earlier agent on cgroup {at}");
            changes.push(CgroupChange::new(CgroupChangeKind::Replaced, text));
        }
        if !mprog::is_pinned(link.id, &self.pin) && !dir::lacks_bpffs(&self.pin) {
            dir::replace_pin(link_fd, &self.pin)?;
            let text = format!("pinned the link of {name} on cgroup {at} again");
            changes.push(CgroupChange::new(CgroupChangeKind::Pinned, text));
        }
        self.move_to_end(programs, cgroup, changes)
    }

    /// Attaches the program, at the end of the cgroup's list.
    fn attach(
        &mut self,
        programs: &Programs,
        cgroup: &OpenCgroup,
        changes: &mut Vec<CgroupChange>,
    ) -> Result<(), DatapathError> {
        let now = Instant::now();
        let exclusive = ExclusiveProgram::find(&cgroup.path, self.attach_type);
        if self.failure.is_some() && exclusive.is_some() && !self.attaching.is_due(now) {
            return Ok(());
        }
        match bpf::link_create_cgroup(programs.fd(self.program)?, &cgroup.file, self.attach_type) {
            Ok(link) => {
                (self.failure, self.reported) = (None, None);
                self.attaching = CgroupBackoff::default();
                let text = format!("attached {} to cgroup {}", self.program, cgroup.path.display());
                changes.push(CgroupChange::new(CgroupChangeKind::Attached, text));
                // Stores the descriptor before pinning: if pinning fails, the program stays attached while this process lives.
                // The pin may exist already, for a detached link or a removed cgroup.
                Ok(dir::replace_pin(self.fd.insert(link), &self.pin)?)
            }
            Err(error) => {
                self.attaching.record_attempt(now);
                self.fd = None;
                let text = attach_error(self.program, &cgroup.path, &error, exclusive.as_ref());
                self.report_failure(text, changes);
                Ok(())
            }
        }
    }

    /// Moves the program after those of other software on the same cgroup. A later program could change the destination after
    /// the verdict.
    fn move_to_end(
        &mut self,
        programs: &Programs,
        cgroup: &OpenCgroup,
        changes: &mut Vec<CgroupChange>,
    ) -> Result<(), DatapathError> {
        let now = Instant::now();
        let is_idle = self.reordering.reset_if_idle(now);
        let program = programs.id(self.program).unwrap_or_default();
        // If the kernel does not list the programs, for example because an LSM denies it, the order is unknown.
        let later =
            cgroup_order::find_later_program(&cgroup.file, self.attach_type, program).unwrap_or_default();
        let at = cgroup.path.display();
        let later = match later {
            Some(LaterProgram::SameCgroup(program)) => program,
            Some(LaterProgram::Ancestor(program)) => {
                let text = format!(
                    "{}; it is attached to an ancestor of the cgroup: run the agent with --cgroup of the ancestor",
                    not_last(self.program, &cgroup.path, &program)
                );
                self.report_failure(text, changes);
                return Ok(());
            }
            None => {
                self.failure = None;
                if is_idle && self.reported.take().is_some() {
                    let text = format!("{} on cgroup {at} is last again", self.program);
                    changes.push(CgroupChange::new(CgroupChangeKind::Recovered, text));
                }
                return Ok(());
            }
        };
        if !self.reordering.is_due(now) {
            let text = not_last(self.program, &cgroup.path, &later);
            if self.reported.is_some() {
                // Logs one failure, even if another agent attaches a new program each time.
                self.reported = Some(text.clone());
            }
            self.report_failure(text, changes);
            return Ok(());
        }
        self.reordering.record_attempt(now);
        // The kernel appends the new link to the list. Several links may have the same program.
        match bpf::link_create_cgroup(programs.fd(self.program)?, &cgroup.file, self.attach_type) {
            Ok(link) => {
                self.failure = None;
                let earlier = self.fd.replace(link);
                if let Some(link) = &self.fd {
                    dir::replace_pin(link, &self.pin)?;
                }
                if let Some(earlier) = earlier {
                    bpf::link_detach(earlier)
                        .map_err(io_error("detach the earlier link from", &cgroup.path))?;
                }
                let text = format!(
                    "moved {} on cgroup {at} to the end of the programs: {later} ran after it",
                    self.program
                );
                changes.push(CgroupChange::new(CgroupChangeKind::Reordered, text));
            }
            Err(error) => {
                let text = format!("{}: {error}", not_last(self.program, &cgroup.path, &later));
                self.report_failure(text, changes);
            }
        }
        Ok(())
    }

    /// Detaches and unpins the program.
    pub(crate) fn detach(
        &mut self,
        cgroup: &OpenCgroup,
        changes: &mut Vec<CgroupChange>,
    ) -> Result<(), DatapathError> {
        (self.failure, self.reported) = (None, None);
        let mut was_attached = false;
        if let Some(fd) = self.fd.take()
            && self.attached(cgroup.id, &fd).is_some()
        {
            bpf::link_detach(&fd).map_err(io_error("detach a program from", &cgroup.path))?;
            was_attached = true;
        }
        was_attached |= mprog::detach_pinned(&self.pin)?;
        if was_attached {
            let text = format!("detached {} from cgroup {}", self.program, cgroup.path.display());
            changes.push(CgroupChange::new(CgroupChangeKind::Detached, text));
        }
        Ok(())
    }

    fn report_failure(&mut self, text: String, changes: &mut Vec<CgroupChange>) {
        if self.reported.as_ref() != Some(&text) {
            changes.push(CgroupChange::new(CgroupChangeKind::Failed, text.clone()));
            self.reported = Some(text.clone());
        }
        self.failure = Some(text);
    }

    /// Returns the description of the link if it is attached to this hook of the cgroup.
    fn attached(&self, cgroup: u64, fd: &OwnedFd) -> Option<bpf::Link> {
        let link = bpf::link(fd).ok().flatten()?;
        let desired = Target::Cgroup { id: cgroup, attach_type: self.attach_type as u32 };
        (link.target == desired).then_some(link)
    }
}

/// Describes a failure to attach a program, including the program that prevents it.
pub(crate) fn attach_error(
    program: &str,
    cgroup: &Path,
    error: &io::Error,
    exclusive: Option<&ExclusiveProgram>,
) -> String {
    let cause = match (error.kind(), exclusive) {
        (io::ErrorKind::PermissionDenied, Some(exclusive)) => format!("operation not permitted: {exclusive}"),
        _ => error.to_string(),
    };
    format!("failed to attach {program} to cgroup {}: {cause}", cgroup.display())
}

/// Describes a program that cannot be attached because it is not loaded.
fn not_loaded(error: ObjectError, cgroup: &Path) -> String {
    format!("failed to attach to cgroup {}: {:#}", cgroup.display(), anyhow::Error::from(error))
}

/// Describes a program that is not attached, including the program that prevents it.
pub(crate) fn not_attached(
    program: &str,
    cgroup: Option<&Path>,
    exclusive: Option<&ExclusiveProgram>,
) -> String {
    let cgroup = cgroup.map(|cgroup| format!(" {}", cgroup.display())).unwrap_or_default();
    let cause = exclusive.map(|exclusive| format!(": {exclusive}")).unwrap_or_default();
    format!("{program} is not attached to cgroup{cgroup}{cause}")
}

/// Describes a program that is not the last one to run.
pub(crate) fn not_last(program: &str, cgroup: &Path, later: &OtherProgram) -> String {
    format!(
        "{program} on cgroup {} is not last: {later} runs after it and can change the destination",
        cgroup.display()
    )
}
