//! A machine with systemd: a Debian root file system in its own namespaces, on an environment's node.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{
    Netns,
    agent::output,
    cgroup::{remove, v2_root},
    netns::unique,
    poll::{poll_until, try_poll},
};

/// Environment variable with the directory of a Debian root that contains systemd.
pub const DEBIAN_ROOT: &str = "IMDS_DEBIAN_ROOT";

/// Time limit of the boot of systemd.
const BOOT: Duration = Duration::from_mins(1);

/// Mounts the file systems of a machine and becomes its init process. `$root` is the root, `$lower` the unchanged
/// directory below the overlay.
const BOOT_SCRIPT: &str = r#"
mount --make-rprivate /
mount -t tmpfs tmpfs "$root"
mkdir "$root/upper" "$root/work" "$root/all"
mount -t overlay -o "lowerdir=$lower,upperdir=$root/upper,workdir=$root/work" overlay "$root/all"
cd "$root/all"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm dev/net
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for device in null zero full random urandom tty net/tun; do
    if test -e "/dev/$device"; then
        touch "dev/$device"
        mount --bind "/dev/$device" "dev/$device"
    fi
done
mount --bind "$shared" mnt
pivot_root . mnt/.old
umount -l mnt/.old
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --log-target=null --show-status=no
"#;

/// A running machine. Dropping it ends all of its processes and removes their pins.
#[derive(Debug)]
pub struct Machine {
    /// `unshare`, whose only child is the init process of the machine.
    child: Child,
    cgroup: PathBuf,
    _root: TempDir,
    shared: TempDir,
}

impl Machine {
    /// Boots a machine in the network of `node`, from the root that [`DEBIAN_ROOT`] names. The directory stays
    /// unchanged.
    ///
    /// # Panics
    ///
    /// Panics if the variable is not set or the machine does not start.
    #[must_use]
    pub fn boot(node: &Netns) -> Self {
        Self::boot_with(node, None)
    }

    /// Boots like [`Self::boot`], with the files of the directory `layer` above the root.
    ///
    /// # Panics
    ///
    /// Panics if the variable is not set or the machine does not start.
    #[must_use]
    pub fn boot_with(node: &Netns, layer: Option<&Path>) -> Self {
        let lower = env::var(DEBIAN_ROOT).unwrap_or_else(|_| panic!("{DEBIAN_ROOT}: run `cargo xtask e2e`"));
        let lower = layer.map_or_else(|| lower.clone(), |layer| format!("{}:{lower}", layer.display()));
        let [root, shared] =
            [(); 2].map(|()| TempDir::with_prefix("imds-machine-").expect("a temporary directory"));
        fs::create_dir(shared.path().join(".old")).expect("make a directory");
        let cgroup = v2_root().join(unique("imds-machine-"));
        fs::create_dir(&cgroup).expect("make a cgroup");
        let mut command = node.command("sh");
        // The process enters the cgroup first: the cgroup namespace then has it as its root.
        let script = "echo $$ > \"$cgroup/cgroup.procs\" && exec unshare --mount --pid --uts --ipc --cgroup --fork \
                      --kill-child sh -ec \"$boot\"";
        command.args(["-ec", script]).stdin(Stdio::null());
        command.env("boot", BOOT_SCRIPT).env("cgroup", &cgroup).env("lower", lower);
        command.env("root", root.path()).env("shared", shared.path());
        let child = command.spawn().expect("start a machine");
        let machine = Self { child, cgroup, _root: root, shared };
        let state = || {
            let state = machine.run(&["systemctl", "is-system-running"]);
            let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
            matches!(&*state, "running" | "degraded").then_some(())
        };
        poll_until(BOOT, "systemd to be up", state);
        machine
    }

    /// Returns the directory that is mounted at `/mnt` in the machine.
    #[must_use]
    pub fn shared(&self) -> &Path {
        self.shared.path()
    }

    /// Runs a command in the machine, outside of all services.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Output {
        output(self.command(arguments))
    }

    /// Starts a process of the machine in the network namespace of a pod, as a container runtime does. The process ends with the
    /// machine.
    #[track_caller]
    pub fn start_in(&self, netns: &Netns) {
        let mut shell = Command::new("sh");
        let script =
            "nsenter --target \"$0\" --mount --pid --net=\"$1\" sleep infinity </dev/null >/dev/null 2>&1 &";
        shell.args(["-c", script, &self.first_process()]).arg(netns.path());
        assert!(shell.status().is_ok_and(|status| status.success()));
    }

    /// Runs a command in the machine, which must succeed. Returns its standard output.
    #[track_caller]
    pub fn checked(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "{arguments:?}: {}\n{}{}",
            output.status,
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// Returns the current value of a property of a systemd unit.
    #[track_caller]
    pub fn property(&self, unit: &str, name: &str) -> String {
        self.checked(&["systemctl", "show", "--property", name, "--value", unit]).trim().to_owned()
    }

    /// Returns the PID of the machine's init process. `unshare` itself is outside of the pid namespace.
    fn first_process(&self) -> String {
        let children = format!("/proc/{0}/task/{0}/children", self.child.id());
        fs::read_to_string(children).unwrap_or_default().trim().to_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("sh");
        let script = "echo $$ > \"$cgroup/cgroup.procs\" && exec nsenter --target \"$first\" --all env -i \
                      PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive \"$@\"";
        command.args(["-ec", script, "sh"]).args(arguments).env("first", self.first_process());
        // Cgroup of systemd itself after its start: inner cgroups with controllers must not contain processes.
        let scope = self.cgroup.join("init.scope");
        command.env("cgroup", if scope.exists() { scope } else { self.cgroup.clone() });
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The end of `unshare` ends its child, the init process, and thereby all processes of the pid namespace.
        let _gone = kill(Pid::from_raw(self.child.id().try_into().unwrap_or_default()), Signal::SIGKILL);
        let _reaped = self.child.wait();
        let removed = try_poll(BOOT, || {
            remove(&self.cgroup);
            (!self.cgroup.exists()).then_some(())
        });
        if removed.is_none() {
            eprintln!("failed to remove {}", self.cgroup.display());
        }
    }
}
