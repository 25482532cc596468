//! The `host_network` hook: calls of a process in the cgroup of Kubernetes pods and in the node's network namespace.
//!
//! The process is a child in a cgroup of its own. A run that is killed leaves its empty cgroup, which the next run removes.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    net::IpAddr,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{self, Command},
};

use imds_ebpf_common::{Hook, Service, Subject, SubjectKind, endpoint::TCP};

use super::{
    Enforced, VerifyError,
    probes::Treatment,
    syscalls::{attempt, is_refused, phrase},
    tc::closed,
    verify_report::{Outcome, Skip, VerifyCheck},
};
use crate::{
    config::endpoint_set::Endpoint,
    node::{cgroup, link::VERIFY_PREFIX},
};

/// Checks that calls from the cgroups of Kubernetes pods are refused.
pub(crate) fn check(enforced: &Enforced) -> Result<Vec<VerifyCheck>, VerifyError> {
    let report = enforced.status.host_network.as_ref();
    let is_attached = report.is_some_and(|report| report.attached);
    let mut checks = vec![VerifyCheck::attached(Hook::HostNetwork, is_attached)];
    for &id in report.map(|report| &report.cgroups).into_iter().flatten() {
        checks.extend(check_calls(enforced, Hook::HostNetwork, id, "hostNetwork pod")?);
    }
    Ok(checks)
}

/// Checks that calls to each endpoint from a new cgroup below the one with the id `parent` are refused. The programs know the
/// new cgroup as a probe, so that the user of its process does not matter. `sender` describes the process.
pub(crate) fn check_calls(
    enforced: &Enforced,
    hook: Hook,
    parent: u64,
    sender: &str,
) -> Result<Vec<VerifyCheck>, VerifyError> {
    let process = PodProcess::new(parent);
    let _probe = match &process {
        Ok(process) => {
            let subject = Subject::new(SubjectKind::Cgroup, process.id);
            Some(enforced.probes.add(subject, Treatment::Denied)?)
        }
        Err(_) => None,
    };
    let check = |endpoint| {
        let check = match &process {
            Ok(process) => {
                let (observed, outcome) = process.check(endpoint);
                VerifyCheck::new(hook.name(), "denied", observed, outcome)
            }
            Err(skip) => VerifyCheck::skipped(hook.name(), "denied", skip),
        };
        check.with_sender(sender).with_endpoint(endpoint)
    };
    Ok(enforced.endpoints.iter().map(check).collect())
}

/// A cgroup below another one, such as that of pods, for processes like those of a hostNetwork pod. Dropping this removes the
/// cgroup.
struct PodProcess {
    path: PathBuf,
    /// Id of the cgroup: its inode number.
    id: u64,
    processes: File,
}

impl PodProcess {
    fn new(pods: u64) -> Result<Self, Skip> {
        let path = cgroup::path_of(pods).ok().flatten();
        let path = path.ok_or_else(|| Skip::new(format!("cgroup {pods} is not visible from here")))?;
        Self::make(&path).map_err(|error| Skip::new(format!("failed to enter {}: {error}", path.display())))
    }

    fn make(pods: &Path) -> io::Result<Self> {
        remove_leftovers(pods);
        let path = pods.join(format!("{VERIFY_PREFIX}{}", process::id()));
        fs::create_dir(&path)?;
        let made = Self::open(&path);
        if made.is_err() {
            fs::remove_dir(&path)?;
        }
        let process = made?;
        match process.run(|| Err(io::Error::from_raw_os_error(libc::ECANCELED))) {
            error if error.raw_os_error() == Some(libc::ECANCELED) => Ok(process),
            error => Err(error),
        }
    }

    fn open(path: &Path) -> io::Result<Self> {
        let kind = path.join("cgroup.type");
        if fs::read_to_string(&kind)?.trim() == "domain invalid" {
            // A cgroup below a threaded one must be threaded.
            fs::write(kind, "threaded")?;
        }
        let processes = File::options().write(true).open(path.join("cgroup.procs"))?;
        let id = fs::metadata(path)?.ino();
        Ok(Self { path: path.to_owned(), id, processes })
    }

    fn check(&self, endpoint: &Endpoint) -> (String, Outcome) {
        let (address, service) = (endpoint.address, closed(&endpoint.allow_ports, TCP));
        let result = Err(self.run(move || connect(address, service)));
        (phrase(&result), Outcome::from_success(is_refused(&result)))
    }

    /// Runs `work` in a child in the cgroup and returns the error with which it ends.
    fn run(&self, mut work: impl FnMut() -> io::Result<()> + Send + Sync + 'static) -> io::Error {
        let processes = match self.processes.try_clone() {
            Ok(processes) => processes,
            Err(error) => return error,
        };
        let mut child = Command::new("/proc/self/exe");
        let enter_and_work = move || {
            // 0 stands for the writing process.
            (&processes).write_all(b"0")?;
            work()
        };
        // SAFETY: the closures of this module only make system calls, on descriptors and memory that exist before the fork.
        unsafe { child.pre_exec(enter_and_work) };
        // The closure ends with an error, so that the program never starts.
        child.spawn().err().unwrap_or_else(|| io::ErrorKind::Other.into())
    }
}

/// Connects and returns an error with an errno in any case, because the parent receives nothing else from the child.
fn connect(address: IpAddr, service: Service) -> io::Result<()> {
    let errno = match attempt(address, service) {
        Ok(()) => libc::EISCONN,
        Err(error) => error.raw_os_error().unwrap_or(libc::ETIMEDOUT),
    };
    Err(io::Error::from_raw_os_error(errno))
}

impl Drop for PodProcess {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            log::warn!("failed to remove {}: {error}", self.path.display());
        }
    }
}

fn remove_leftovers(pods: &Path) {
    for entry in fs::read_dir(pods).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(VERIFY_PREFIX)?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
            && let Err(error) = fs::remove_dir(entry.path())
        {
            log::debug!("{}: {error}", entry.path().display());
        }
    }
}
