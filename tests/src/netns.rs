//! Network namespaces that are deleted on drop.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write as _},
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
    errno::Errno,
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
const OF_THREAD: &str = "/proc/thread-self/ns/net";

/// A named network namespace. Dropping it deletes the namespace and kills its processes.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: Arc<File>,
    /// True for the namespace of this process and of the machine, which stays.
    is_machines: bool,
}

impl Netns {
    /// Creates a namespace whose name ends in `role`.
    #[must_use]
    pub fn new(role: &str) -> Self {
        static PREPARED: Once = Once::new();
        PREPARED.call_once(|| {
            lift_memlock();
            share_directory();
            sweep();
        });

        let name = format!("{}-{role}", unique(PREFIX));
        let file = Arc::new(add(&name, OF_THREAD, true));
        Self { name, file, is_machines: false }
    }

    /// Gives a name that ends in `role` to the network namespace of the process.
    #[must_use]
    pub fn of_process(role: &str, pid: u32) -> Self {
        let name = format!("{}-{role}", unique(PREFIX));
        let file = Arc::new(add(&name, &format!("/proc/{pid}/ns/net"), false));
        Self { name, file, is_machines: false }
    }

    /// Creates a name for the namespace of this process.
    pub(crate) fn of_machine() -> Self {
        lift_memlock();
        // The prefix differs from that of other namespaces, which are swept together with their processes.
        let name = unique("machine-");
        let file = Arc::new(add(&name, OF_THREAD, false));
        Self { name, file, is_machines: true }
    }

    /// Returns the name under /run/netns.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the path of the namespace's file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// Runs `work` in this namespace on a separate thread, so that the caller's namespace never changes. A socket stays
    /// in the namespace in which it was created; `work` may therefore return one.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(&self.file).expect("setns");
                work()
            });
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Returns a command that will run in this namespace. Unlike with `ip netns exec`, the command sees the machine's
    /// /sys with bpffs and cgroup2.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = Arc::clone(&self.file);
        // SAFETY: between fork and exec the closure only calls setns and converts its error number, both of which are
        // async-signal-safe.
        unsafe { command.pre_exec(move || Ok(enter(&file)?)) };
        command
    }

    /// Runs `ip` in this namespace with one command per line.
    pub fn ip(&self, batch: &str) {
        checked(self.command("ip").args(["-batch", "-"]), Some(batch));
    }

    /// Sets a sysctl below `net`, such as `ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = format!("/proc/sys/net/{key}");
        // The directory shows the network namespace of the thread that opens it.
        self.run(|| fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}")));
    }

    /// Reports whether the sysctl exists.
    #[must_use]
    pub fn has_sysctl(&self, key: &str) -> bool {
        self.run(|| Path::new("/proc/sys/net").join(key).exists())
    }

    /// Kills every process in this namespace and waits for their end. Does nothing for the machine's own namespace.
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

/// Returns `prefix` with the process id and a number. The name is unique on this machine.
pub fn unique(prefix: &str) -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// Reports whether a name that [`unique`] built with `prefix` belongs to a process that no longer exists.
pub(crate) fn is_leftover(name: &str, prefix: &str) -> bool {
    let pid = name.strip_prefix(prefix).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
    pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

/// Runs a command and returns its output. Panics with its standard error unless it succeeds.
#[track_caller]
pub(crate) fn checked(command: &mut Command, input: Option<&str>) -> String {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("a pipe");
    // Ignores the error: a command that ends without reading its input reports the reason itself.
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

/// Raises the limit of locked memory, to which maps and programs count before Linux 5.11. Agents inherit it, as from a
/// service manager.
fn lift_memlock() {
    // Needs CAP_SYS_RESOURCE. Newer kernels do not use the limit for BPF.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
}

/// Removes the namespaces, cgroups and pins of processes that were killed.
fn sweep() {
    pins::sweep();
    cgroup::sweep();
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        if !is_leftover(&name, PREFIX) {
            continue;
        }
        // Another process may sweep concurrently and delete the namespace first.
        if let Ok(file) = File::open(Path::new(DIRECTORY).join(&name)) {
            kill_processes(&file);
            delete(&name);
        }
    }
}

fn kill_processes(namespace: &File) {
    poll_until(Duration::from_secs(10), "the processes in a namespace to end", || {
        let processes = processes_in(namespace);
        for process in &processes {
            // The process may have ended by itself.
            let _ = kill(*process, Signal::SIGKILL);
        }
        processes.is_empty().then_some(())
    });
}

/// Returns the processes whose main thread is in `namespace`. Never includes the caller's process, of which only other
/// threads enter the namespace.
fn processes_in(namespace: &File) -> Vec<Pid> {
    let own = namespace.metadata().expect("stat of an open file");
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let found = fs::metadata(format!("/proc/{pid}/ns/net"));
            found.is_ok_and(|found| (found.st_dev(), found.st_ino()) == (own.st_dev(), own.st_ino()))
        })
        .map(Pid::from_raw)
        .collect()
}

/// Implements `ip netns add`, or `ip netns attach` for the current namespace. Starting `ip` for each of the many
/// namespaces would take a large part of a test's time.
fn add(name: &str, of: &str, is_new: bool) -> File {
    fs::create_dir_all(DIRECTORY).unwrap_or_else(|error| panic!("{DIRECTORY}: {error}"));
    let path = Path::new(DIRECTORY).join(name);
    File::create_new(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mount_it = || {
        if is_new {
            unshare(CloneFlags::CLONE_NEWNET)?;
        }
        mount(Some(of), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
    };
    let mounted = thread::scope(|scope| scope.spawn(mount_it).join());
    mounted.expect("no panic").unwrap_or_else(|error| panic!("make namespace {name}: {error}"));
    File::open(&path).expect("a namespace that was just made")
}

/// Makes the directory of the names a shared mount, as the first `ip netns add` of a machine does. Names from before that could not be
/// removed after it, because it stacks a second mount on each.
fn share_directory() {
    fs::create_dir_all(DIRECTORY).expect("create the directory of network namespaces");
    let none = None::<&str>;
    let share = || mount(none, DIRECTORY, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    if share() == Err(Errno::EINVAL) {
        mount(Some(DIRECTORY), DIRECTORY, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .expect("bind mount");
        share().expect("shared mount");
    }
}

fn delete(name: &str) {
    let path = Path::new(DIRECTORY).join(name);
    // Ignores errors: the name may not be mounted.
    let _ = umount2(&path, MntFlags::MNT_DETACH);
    // No panic in drop, which may run for a failing test. The next process sweeps.
    if let Err(error) = fs::remove_file(&path)
        && error.kind() != io::ErrorKind::NotFound
    {
        eprintln!("{}: {error}", path.display());
    }
}
