//! Container runtimes on an environment's node: podman with pods from Kubernetes YAML, and containerd with the
//! reference CNI plugins.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use imds_tests::{
    Netns, TestEnv, daemon_set, output,
    poll::{poll_until, try_poll},
    probe::LONG,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Image of the pods: busybox, and curl with its libraries.
const IMAGE: &str = "localhost/tools:1";
/// Script that copies the files of the image to `$root`.
const IMAGE_SCRIPT: &str = r#"
mkdir -p "$root/bin" "$root/tmp" "$root/etc"
cp "$(command -v busybox)" "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
ln -s busybox "$root/bin/sleep"
curl=$(command -v curl)
cp --parents --dereference "$curl" $(ldd "$curl" | grep -o '/[^ ]*') "$root"
tar -C "$root" -c . > "$tar"
"#;
/// Settings that work with this machine's limits; see containers.conf(5).
const CONTAINERS_CONF: &str = r#"
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
apparmor_profile = ""
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
"#;

/// Returns the standard output of a command as text.
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
fn checked(command: Command) -> String {
    let name = format!("{command:?}");
    let output = output(command);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {}\n{stderr}", output.status);
    stdout(&output)
}

/// Creates an archive of the pods' file system in `dir`.
fn tools(dir: &Path) -> PathBuf {
    let tar = dir.join("tools.tar");
    let mut script = Command::new("sh");
    script.args(["-ec", IMAGE_SCRIPT]).env("root", dir.join("tools")).env("tar", &tar);
    checked(script);
    tar
}

/// podman with its own images and containers on an environment's node. Dropping it removes all of them.
pub(crate) struct Podman<'w> {
    env: &'w TestEnv,
    dir: TempDir,
}

impl<'w> Podman<'w> {
    /// Name of the cgroup in which podman creates pods.
    pub(crate) const CGROUP: &'static str = "libpod_parent";

    pub(crate) fn new(env: &'w TestEnv) -> Self {
        let dir = TempDir::with_prefix("imds-podman-").unwrap();
        fs::write(dir.path().join("containers.conf"), CONTAINERS_CONF).unwrap();
        let podman = Self { env, dir };
        podman.run(&[
            "import",
            "--change",
            "ENV PATH=/usr/bin:/bin",
            tools(podman.dir.path()).to_str().unwrap(),
            IMAGE,
        ]);
        podman
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.env.node.command("podman");
        let dir = self.dir.path();
        command.env("CONTAINERS_CONF", dir.join("containers.conf"));
        for (option, name) in
            [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp"), ("--network-config-dir", "net")]
        {
            command.arg(option).arg(dir.join(name));
        }
        command.args(arguments);
        command
    }

    /// Runs podman, which must succeed, and returns its standard output.
    #[track_caller]
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        checked(self.command(arguments))
    }

    /// Starts a pod with this name from the YAML of the AKS documentation.
    pub(crate) fn play(&self, name: &str, host_network: bool) {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": name },
            "spec": {
                "hostNetwork": host_network,
                "containers": [{ "name": name, "image": IMAGE, "command": ["sleep", "1000"] }],
            },
        });
        let yaml = self.dir.path().join(name).with_extension("yaml");
        fs::write(&yaml, pod.to_string()).unwrap();
        self.run(&["play", "kube", yaml.to_str().unwrap()]);
    }

    /// Runs a command in the pod.
    pub(crate) fn exec(&self, pod: &str, command: &[&str]) -> Output {
        let container = format!("{pod}-{pod}");
        output(self.command(&[&["exec", &container], command].concat()))
    }

    /// Runs a command in a pod that is removed afterwards.
    pub(crate) fn run_once(&self, command: &[&str]) -> Output {
        output(self.command(&[&["run", "--rm", "--pull", "never", IMAGE], command].concat()))
    }

    /// Builds the agent's image from its static binary.
    pub(crate) fn build_agent(&self) {
        let binary = PathBuf::from(env::var("IMDS_AGENT").expect("IMDS_AGENT"));
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/image/Containerfile");
        let mut build =
            self.command(&["build", "--quiet", "--network", "none", "--tag", "localhost/imds-agent"]);
        build.arg("--file").arg(file).arg(binary.parent().unwrap());
        checked(build);
    }

    /// Returns a command of the agent in a container with exactly the privileges of the `DaemonSet`.
    pub(crate) fn agent(&self, options: &[&str], arguments: &[&str]) -> Command {
        let scratch = format!("{0}:{0}:ro", self.env.scratch_dir().display());
        let mut command =
            self.command(&["run", "--pull", "never", "--network", "host", "--pid", "host", "--read-only"]);
        command.args(["--cap-drop", "all", "--cap-add", &daemon_set::capabilities().join(",")]);
        command.args(["--security-opt", "no-new-privileges", "--cgroupns", "private"]);
        command.args([
            "--volume",
            "/sys/fs/bpf:/sys/fs/bpf",
            "--volume",
            "/sys/fs/cgroup:/sys/fs/cgroup:ro,rbind",
        ]);
        command.args(["--volume", &scratch]).args(options).arg("localhost/imds-agent").args(arguments);
        command.arg("--pin-dir").arg(self.env.pin_dir());
        command
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        for arguments in [
            &["pod", "rm", "--all", "--force", "--time", "0"][..],
            &["rm", "--all", "--force", "--time", "0"],
            &["system", "reset", "--force"],
        ] {
            let _left = self.command(arguments).stdin(Stdio::null()).output();
        }
    }
}

/// containerd with its own root directory. Pods are network namespaces that a CNI plugin connects.
pub(crate) struct Containerd<'w> {
    env: &'w TestEnv,
    dir: TempDir,
    daemon: Child,
}

/// A network namespace that a CNI plugin connected to the node.
pub(crate) struct Sandbox<'c, 'w> {
    containerd: &'c Containerd<'w>,
    pub(crate) netns: Netns,
    network: Value,
}

impl<'w> Containerd<'w> {
    pub(crate) fn new(env: &'w TestEnv) -> Self {
        let dir = TempDir::with_prefix("imds-containerd-").unwrap();
        let daemon = Self::start(env, dir.path());
        let containerd = Self { env, dir, daemon };
        // containerd needs an image instead of a bare file system, which podman builds.
        let podman = Podman::new(env);
        let image = containerd.dir.path().join("image.tar");
        podman.run(&[
            "save",
            "--quiet",
            "--format",
            "docker-archive",
            "--output",
            image.to_str().unwrap(),
            IMAGE,
        ]);
        drop(podman);
        containerd.wait();
        containerd.ctr(&["image", "import", "--snapshotter", "native", image.to_str().unwrap()]);
        containerd
    }

    fn start(env: &TestEnv, dir: &Path) -> Child {
        let config = format!(
            "version = 2\nroot = '{0}/root'\nstate = '{0}/state'\n[grpc]\naddress = '{0}/sock'\n\
             disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.internal.v1.opt']\n",
            dir.display()
        );
        let path = dir.join("config.toml");
        fs::write(&path, config).unwrap();
        let mut command = env.node.command("containerd");
        command.arg("--config").arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("start containerd")
    }

    fn wait(&self) {
        poll_until(LONG, "containerd", || output(self.command(&["version"])).status.success().then_some(()));
    }

    /// Kills the daemon and starts another one. Containers keep running.
    pub(crate) fn restart(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
        self.daemon = Self::start(self.env, self.dir.path());
        self.wait();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.env.node.command("ctr");
        command.arg("--address").arg(self.dir.path().join("sock")).args(arguments);
        command
    }

    #[track_caller]
    fn ctr(&self, arguments: &[&str]) -> String {
        checked(self.command(arguments))
    }

    /// Creates a sandbox in a network. `network` is a CNI configuration without name, version and addresses.
    pub(crate) fn sandbox(&self, mut network: Value, subnet: &str) -> Sandbox<'_, 'w> {
        network["cniVersion"] = "0.4.0".into();
        network["name"] = network["type"].clone();
        network["ipam"] = json!({
            "type": "host-local",
            "subnet": subnet,
            "routes": [{ "dst": "0.0.0.0/0" }],
            "dataDir": self.dir.path().join("cni"),
        });
        let sandbox = Sandbox { containerd: self, netns: Netns::new("cni"), network };
        sandbox.cni("ADD");
        sandbox
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        let tasks = stdout(&output(self.command(&["task", "list", "--quiet"])));
        for task in tasks.lines() {
            let _gone = output(self.command(&["task", "delete", "--force", task]));
        }
        let _ended = self.daemon.kill().and_then(|()| self.daemon.wait());
        // Unmounts remaining mounts of containers.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let dir = self.dir.path().to_string_lossy().into_owned();
        for mount in
            mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|path| path.starts_with(&dir))
        {
            let _gone = nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

impl Sandbox<'_, '_> {
    fn cni(&self, verb: &str) {
        let plugin = format!("/usr/lib/cni/{}", self.network["type"].as_str().unwrap());
        let mut command = self.containerd.env.node.command("sh");
        command
            .args(["-ec", "printf '%s' \"$network\" | \"$plugin\""])
            .env("plugin", plugin)
            .env("network", self.network.to_string());
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", self.netns.name()).env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", self.netns.path()).env("CNI_PATH", "/usr/lib/cni");
        checked(command);
    }

    /// Runs a command in a container of the sandbox.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        let netns = format!("network:{}", self.netns.path().display());
        let options = ["run", "--rm", "--snapshotter", "native", "--with-ns", &netns];
        let name = imds_tests::netns::unique("e2e-");
        output(self.containerd.command(&[&options[..], &[IMAGE, &name], arguments].concat()))
    }
}

impl Drop for Sandbox<'_, '_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.cni("DEL");
        }
    }
}

/// Waits until the agent that is pinned for this environment has completed its sync and reports no problem.
pub(crate) fn wait_ready(env: &TestEnv) {
    let ready = try_poll(LONG, || env.try_status().ok().filter(imds_tests::Status::is_ready));
    assert!(ready.is_some(), "the agent is not ready: {:?}", env.try_status());
}
