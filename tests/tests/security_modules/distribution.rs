//! Debian's SELinux policy in enforcing mode. `cargo xtask vm --selinux` boots a machine with it.

use std::{
    ffi::CString,
    fs::{self, Permissions},
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::mount::{MsFlags, mount};

use imds_tests::{WHOLE_TEST, output, skip, skip_unless_disposable};

/// Directory of the policies, and of the agent's executables that the policies confine.
pub(crate) const POLICIES: &str = "/selinux";
pub(crate) const AGENT: &str = "/usr/bin/imds-agent";
pub(crate) const BROKER: &str = "/usr/bin/imds-broker";
const SELINUXFS: &str = "/sys/fs/selinux";

/// Mount point of the root directory. The broker detaches its root, which is not possible with that of an initramfs.
const ROOT: &str = "/node";

/// Types of the machine's files, whose file system is created without labels.
const LABELS: [(&str, &str); 14] = [
    ("/", "root_t"),
    ("/bin", "bin_t"),
    ("/dev", "device_t"),
    ("/dev/null", "null_device_t"),
    ("/dev/random", "random_device_t"),
    ("/dev/urandom", "urandom_device_t"),
    ("/etc", "etc_t"),
    ("/etc/imds-agent", "etc_t"),
    ("/lib", "lib_t"),
    ("/lib64", "lib_t"),
    ("/run", "var_run_t"),
    ("/run/netns", "ifconfig_runtime_t"),
    ("/usr", "usr_t"),
    ("/usr/bin", "bin_t"),
];

/// A policy that the kernel enforces until this is dropped. Only one test has it at a time.
pub(crate) struct Policy {
    name: &'static str,
    _turn: MutexGuard<'static, ()>,
}

impl Policy {
    /// Loads Debian's policy, with the module of deploy/selinux if the name is `service`, or without it if the name is
    /// `distribution`. Returns `None` with a skip notice on a machine without the policies.
    pub(crate) fn load(name: &'static str) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        if skip_unless_disposable("loads an SELinux policy") {
            return None;
        }
        if !Path::new(POLICIES).exists() {
            skip(WHOLE_TEST, "there is no SELinux policy of a distribution, which `--selinux` provides");
            return None;
        }
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // Otherwise the kernel drops messages about denials.
        fs::write("/proc/sys/kernel/printk_ratelimit", "0").unwrap();
        let policy = Path::new(POLICIES).join(name).join("policy");
        fs::write(Path::new(SELINUXFS).join("load"), fs::read(policy).unwrap()).unwrap();
        for (path, kind) in LABELS {
            if path == "/run/netns" {
                fs::create_dir_all(path).unwrap();
            }
            label(Path::new(path), kind);
        }
        label_libraries();
        if !Path::new(ROOT).exists() {
            fs::create_dir(ROOT).unwrap();
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some("/"), ROOT, None::<&str>, flags, None::<&str>).unwrap();
        }
        fs::write(Path::new(SELINUXFS).join("enforce"), "1").unwrap();
        Some(Self { name, _turn: turn })
    }

    /// Labels this file or directory, which is created if it is missing, as the policy demands.
    pub(crate) fn restore_label(&self, path: &str) -> &Self {
        let contexts = Path::new(POLICIES).join(self.name).join("file_contexts");
        let contexts = fs::read_to_string(contexts).unwrap();
        let parent = Path::new(path).parent().unwrap().display();
        let patterns = [path.to_owned(), format!("{path}(/.*)?"), format!("{parent}(/.*)?")];
        let found = patterns.iter().find_map(|pattern| {
            let mut lines = contexts.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            lines.find(|line| line.first() == Some(&pattern.as_str())).and_then(|line| line.last().copied())
        });
        let context = found.unwrap_or_else(|| panic!("the policy has no context of {path}"));
        if !Path::new(path).exists() {
            fs::create_dir_all(path).unwrap();
        }
        label(Path::new(path), context.split(':').nth(2).unwrap());
        self
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        // The next test reports an error.
        let _ = fs::write(Path::new(SELINUXFS).join("enforce"), "0");
    }
}

/// Labels the dynamic linker and the libraries, which exist if the agent is not linked statically.
fn label_libraries() {
    for entry in ["/lib", "/lib64"].iter().flat_map(fs::read_dir).flatten().flatten() {
        let is_linker = entry.file_name().as_bytes().starts_with(b"ld-");
        label(&entry.path(), if is_linker { "ld_so_t" } else { "lib_t" });
    }
}

/// Sets the type of a file.
pub(crate) fn label(path: &Path, kind: &str) {
    let context = CString::new(format!("system_u:object_r:{kind}:s0")).unwrap();
    let file = CString::new(path.as_os_str().as_bytes()).unwrap();
    let value = context.as_bytes_with_nul();
    // SAFETY: the strings end with a null byte, and the length is the one of the value.
    let result = unsafe {
        libc::setxattr(file.as_ptr(), c"security.selinux".as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    assert_eq!(result, 0, "label {}: {}", path.display(), std::io::Error::last_os_error());
}

/// Writes a script that starts the agent as systemd starts the service: from its domain, with `NoNewPrivileges=`.
pub(crate) fn write_service_launcher(dir: &Path) -> PathBuf {
    let start = format!("{}; exec {AGENT} \"$@\"", write_attribute("current", "init_t:s0"));
    // The standard output of a service is not the console.
    let quiet = "[ ! -c /proc/self/fd/1 ] || exec > /dev/null";
    let text = format!(
        "#!/tools/sh\n{quiet}\nexec chroot {ROOT} /tools/setpriv --no-new-privs /tools/sh -c '{start}' sh \"$@\"\n"
    );
    write_script(&dir.join("service"), &text)
}

/// Writes a script that starts a program as a container runtime starts a process of this type.
pub(crate) fn write_container_launcher(dir: &Path, kind: &str, program: &Path) -> PathBuf {
    let exec = write_attribute("exec", kind);
    let text = format!("#!/tools/sh\n{exec}\nexec {} \"$@\"\n", program.display());
    write_script(&dir.join("container"), &text)
}

/// Returns a shell command that sets the context of the shell (`current`) or of the next program (`exec`).
pub(crate) fn write_attribute(attribute: &str, kind_and_level: &str) -> String {
    format!("printf %s system_u:system_r:{kind_and_level} > /proc/self/attr/{attribute}")
}

fn write_script(path: &Path, text: &str) -> PathBuf {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    path.to_owned()
}

/// Returns the context of a process.
pub(crate) fn context(pid: u32) -> String {
    let context = fs::read_to_string(format!("/proc/{pid}/attr/current")).unwrap();
    context.trim_end_matches(['\0', '\n']).to_owned()
}

/// Returns the denials of processes or to processes in these domains, from the kernel log.
pub(crate) fn denials(domains: &[&str]) -> Vec<String> {
    let log = String::from_utf8_lossy(&output(Command::new("dmesg")).stdout).into_owned();
    let is_denial = |line: &&str| {
        let is_about = |domain: &&str| line.contains(&format!(":{domain}:"));
        line.contains("avc:  denied") && line.contains("permissive=0") && domains.iter().any(is_about)
    };
    log.lines().filter(is_denial).map(str::to_owned).collect()
}
