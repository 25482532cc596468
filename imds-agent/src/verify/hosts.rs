//! Strict mode: calls of a process that is below the cgroup of Kubernetes pods and in the node's network namespace.
//!
//! The process is a child in a cgroup that is made for it. A process that is killed leaves its cgroup, empty; the next one
//! removes it.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    net::IpAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{self, Command},
};

use imds_ebpf_common::{Hook, Service, endpoint::TCP};

use super::{
    Guarding,
    calls::{attempt, is_refused, phrase},
    edges::{Obstacle, closed},
    report::{Check, Outcome},
    stage::PREFIX,
};
use crate::{endpoints::Endpoint, node::cgroup};

/// Proves that calls from the cgroups of Kubernetes pods are refused.
pub(super) fn prove(guarding: &Guarding) -> Vec<Check> {
    let hook = Hook::HostNetwork.name();
    let report = guarding.status.host_network.as_ref();
    let is_attached = report.is_some_and(|report| report.attached);
    let mut checks = vec![Check::attached(Hook::HostNetwork, is_attached)];
    for &id in report.map(|report| &report.cgroups).into_iter().flatten() {
        let inside = Inside::new(id);
        checks.extend(guarding.endpoints.iter().map(|endpoint| {
            let (found, result) = match &inside {
                Ok(inside) => inside.prove(endpoint),
                Err((reason, outcome)) => (reason.clone(), *outcome),
            };
            Check::of_hook(hook, "denied", found, result).at(endpoint)
        }));
    }
    checks
}

/// A cgroup below one of pods', for as long as this lives.
struct Inside {
    path: PathBuf,
    processes: File,
}

impl Inside {
    fn new(id: u64) -> Result<Self, Obstacle> {
        let unproven = |reason| (reason, Outcome::Unproven);
        let pods = cgroup::path_of(id).ok().flatten();
        let pods = pods.ok_or_else(|| unproven(format!("cgroup {id} can't be seen from here")))?;
        let made = Self::make(&pods).map_err(|error| format!("can't enter {}: {error}", pods.display()));
        made.map_err(unproven)
    }

    fn make(pods: &Path) -> io::Result<Self> {
        remove_leftovers(pods);
        let path = pods.join(format!("{PREFIX}{}", process::id()));
        fs::create_dir(&path)?;
        let made = Self::open(&path);
        if made.is_err() {
            fs::remove_dir(&path)?;
        }
        let inside = made?;
        match inside.run(|| Err(io::Error::from_raw_os_error(libc::ECANCELED))) {
            error if error.raw_os_error() == Some(libc::ECANCELED) => Ok(inside),
            error => Err(error),
        }
    }

    fn open(path: &Path) -> io::Result<Self> {
        let kind = path.join("cgroup.type");
        if fs::read_to_string(&kind)?.trim() == "domain invalid" {
            // Below a threaded one, all have to be.
            fs::write(kind, "threaded")?;
        }
        let processes = File::options().write(true).open(path.join("cgroup.procs"))?;
        Ok(Self { path: path.to_owned(), processes })
    }

    fn prove(&self, endpoint: &Endpoint) -> (String, Outcome) {
        let (address, service) = (endpoint.address, closed(&endpoint.keep, TCP));
        let result = Err(self.run(move || connect(address, service)));
        (phrase(&result), Outcome::of(is_refused(&result)))
    }

    /// Runs `work` in a child in the cgroup, for the error that it ends with.
    fn run(&self, mut work: impl FnMut() -> io::Result<()> + Send + Sync + 'static) -> io::Error {
        let processes = match self.processes.try_clone() {
            Ok(processes) => processes,
            Err(error) => return error,
        };
        let mut child = Command::new("/proc/self/exe");
        let enter_and_work = move || {
            // 0 is the process that writes it.
            (&processes).write_all(b"0")?;
            work()
        };
        // SAFETY: what is done here, and in the closures of this module, are system calls on what is there already.
        unsafe { child.pre_exec(enter_and_work) };
        // It never gets as far as the program.
        child.spawn().err().unwrap_or_else(|| io::ErrorKind::Other.into())
    }
}

/// Connects, for an error that has a number: only that comes back from a child.
fn connect(address: IpAddr, service: Service) -> io::Result<()> {
    let errno = match attempt(address, service) {
        Ok(()) => libc::EISCONN,
        Err(error) => error.raw_os_error().unwrap_or(libc::ETIMEDOUT),
    };
    Err(io::Error::from_raw_os_error(errno))
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            log::warn!("can't remove {}: {error}", self.path.display());
        }
    }
}

/// Removes the cgroups of processes that are gone.
fn remove_leftovers(pods: &Path) {
    for entry in fs::read_dir(pods).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
            && let Err(error) = fs::remove_dir(entry.path())
        {
            log::debug!("{}: {error}", entry.path().display());
        }
    }
}
