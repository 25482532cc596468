//! Network namespaces that are gone when dropped.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write as _,
    os::{fd::AsFd, linux::fs::MetadataExt as _, unix::process::CommandExt as _},
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        resource::{RLIM_INFINITY, Resource, setrlimit},
        signal::{Signal, kill},
    },
    unistd::Pid,
};

use crate::{cgroup, pins, poll::poll_until};

const DIRECTORY: &str = "/run/netns";
const PREFIX: &str = "imds-";

/// A named network namespace, deleted on drop together with the processes in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: Arc<File>,
    /// Whether it is the one in which this process and the machine's others are, which stay.
    is_machines: bool,
}

impl Netns {
    /// Makes a namespace whose name ends in `role`.
    #[must_use]
    pub fn new(role: &str) -> Self {
        static PREPARED: Once = Once::new();
        PREPARED.call_once(|| {
            lift_memlock();
            sweep();
        });

        let name = format!("{}-{role}", unique(PREFIX));
        let file = Arc::new(add(&name, true));
        Self { name, file, is_machines: false }
    }

    /// A name for the namespace in which this process is.
    pub(crate) fn of_machine() -> Self {
        lift_memlock();
        // Not one that is swept, with all processes in it.
        let name = unique("machine-");
        let file = Arc::new(add(&name, false));
        Self { name, file, is_machines: true }
    }

    /// Name under /run/netns.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of the namespace's file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// Runs `work` in this namespace, on a thread of its own: the caller's never changes. A socket stays in the
    /// namespace in which it was made, so that `work` may return one.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(&self.file).expect("setns");
                work()
            });
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// A command that will run in this namespace. Unlike under `ip netns exec`, it sees the machine's /sys, and so
    /// bpffs and cgroup2.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = Arc::clone(&self.file);
        // SAFETY: between fork and exec, setns and the conversion of its errno are mere system call and integer.
        unsafe { command.pre_exec(move || Ok(enter(&file)?)) };
        command
    }

    /// Runs `ip` in this namespace with one command a line.
    pub fn ip(&self, batch: &str) {
        checked(self.command("ip").args(["-batch", "-"]), Some(batch));
    }

    /// Sets a sysctl below `net`, such as `ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = format!("/proc/sys/net/{key}");
        // The directory shows the namespace of the thread that looks.
        self.run(|| fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}")));
    }

    /// Whether there is such a sysctl.
    #[must_use]
    pub fn has_sysctl(&self, key: &str) -> bool {
        self.run(|| Path::new("/proc/sys/net").join(key).exists())
    }

    /// Kills every process in this namespace and waits until none is left; none of the machine's own.
    pub fn kill_processes(&self) {
        if !self.is_machines {
            kill_processes(&self.file);
        }
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.kill_processes();
        delete(&self.name);
    }
}

/// `prefix`, the process and a number, such that no other caller in any process gets the same.
pub fn unique(prefix: &str) -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// Whether a name made by [`unique`] with `prefix` is of a process that no longer exists.
pub(crate) fn is_leftover(name: &str, prefix: &str) -> bool {
    let pid = name.strip_prefix(prefix).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
    pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

/// Runs a command to its end and panics with what it said unless it succeeded.
#[track_caller]
pub(crate) fn checked(command: &mut Command, input: Option<&str>) -> String {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("a pipe");
    // A command that ends without reading its input says why itself.
    let _ = stdin.write_all(input.unwrap_or_default().as_bytes());
    drop(stdin);
    let output = child.wait_with_output().expect("wait for a child");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed ({}): {stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn enter(namespace: &impl AsFd) -> nix::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNET)
}

/// Before Linux 5.11 maps and programs count as locked memory, of which a user may have little. Agents inherit what a
/// service manager would give them.
fn lift_memlock() {
    // Takes CAP_SYS_RESOURCE; newer kernels have no such limit.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
}

/// Removes what processes that were killed left behind.
fn sweep() {
    pins::sweep();
    cgroup::sweep();
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        if !is_leftover(&name, PREFIX) {
            continue;
        }
        // Another process may be sweeping too, and be quicker.
        if let Ok(file) = File::open(Path::new(DIRECTORY).join(&name)) {
            kill_processes(&file);
            delete(&name);
        }
    }
}

fn kill_processes(namespace: &File) {
    poll_until(Duration::from_secs(10), "the processes in a namespace to die", || {
        let processes = processes_in(namespace);
        for process in &processes {
            // It may have gone by itself.
            let _ = kill(*process, Signal::SIGKILL);
        }
        processes.is_empty().then_some(())
    });
}

/// The processes whose main thread is in `namespace`: never the caller's own, which only sends threads there.
fn processes_in(namespace: &File) -> Vec<Pid> {
    let wanted = namespace.metadata().expect("stat of an open file");
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let found = fs::metadata(format!("/proc/{pid}/ns/net"));
            found.is_ok_and(|found| (found.st_dev(), found.st_ino()) == (wanted.st_dev(), wanted.st_ino()))
        })
        .map(Pid::from_raw)
        .collect()
}

/// What `ip netns add` does, or with the namespace that is there `ip netns attach`: worlds need so many that its start would take a good part of a test's time.
fn add(name: &str, is_new: bool) -> File {
    fs::create_dir_all(DIRECTORY).unwrap_or_else(|error| panic!("{DIRECTORY}: {error}"));
    let path = Path::new(DIRECTORY).join(name);
    File::create_new(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mount_it = || {
        if is_new {
            unshare(CloneFlags::CLONE_NEWNET)?;
        }
        mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
    };
    let mounted = thread::scope(|scope| scope.spawn(mount_it).join());
    mounted.expect("no panic").unwrap_or_else(|error| panic!("make namespace {name}: {error}"));
    File::open(&path).expect("a namespace that was just made")
}

fn delete(name: &str) {
    let path = Path::new(DIRECTORY).join(name);
    // Nothing to be done where it fails: it runs in drop, and the next process sweeps.
    let _ = umount2(&path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(&path);
}
