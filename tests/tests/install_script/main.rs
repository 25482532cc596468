//! The installation script of a release, below a directory instead of the root of the machine: downloads over HTTP, signatures,
//! checksums and its failures.

mod partial;

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, TcpListener},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
};

use imds_tests::{
    WHOLE_TEST,
    executable::{find_program, write_executable},
    lacks_program,
};
use tempfile::TempDir;

const SCRIPT: &str = include_str!("../../../deploy/install.sh");
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Programs of a small machine, on which the script must run.
const PROGRAMS: [&str; 20] = [
    "awk",
    "cat",
    "cmp",
    "cp",
    "curl",
    "dd",
    "find",
    "grep",
    "gzip",
    "id",
    "mkdir",
    "mktemp",
    "mv",
    "rm",
    "sed",
    "sh",
    "sha256sum",
    "sort",
    "tar",
    "wc",
];
const MINISIGN: &str = "minisign";
const OPENSSL: &str = "openssl";

/// A signed release with one tarball, and a directory in which it is installed.
struct Release {
    dir: TempDir,
    key: String,
}

impl Release {
    fn new() -> Self {
        let release = Self { dir: tempfile::tempdir().unwrap(), key: String::new() };
        for dir in ["bin", "machine", "release"] {
            fs::create_dir(release.path(dir)).unwrap();
        }
        for program in PROGRAMS {
            release.add_program(program);
        }
        release.write_program("uname", "#!/bin/sh\n[ $1 = -s ] && echo Linux || echo x86_64\n");
        release.pack("agent");
        fs::write(release.path("install.sh"), SCRIPT).unwrap();
        release.shell("minisign -G -W -p key.pub -s key > log");
        release.sign("");
        let key = fs::read_to_string(release.path("key.pub")).unwrap();
        Self { key: key.lines().last().unwrap().to_owned(), ..release }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    #[track_caller]
    fn shell(&self, script: &str) {
        let output = Command::new("sh").args(["-ec", script]).current_dir(self.dir.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// Lets the machine have a program of this one.
    fn add_program(&self, name: &str) {
        let program = find_program(name).unwrap_or_else(|| panic!("no {name}"));
        symlink(program, self.path("bin").join(name)).unwrap();
    }

    fn write_program(&self, name: &str, text: &str) {
        let path = self.path("bin").join(name);
        write_executable(&path, text);
    }

    /// Removes a program from the machine, so that another can be written, and returns its path on this one.
    fn replace_program(&self, name: &str) -> PathBuf {
        fs::remove_file(self.path("bin").join(name)).unwrap();
        find_program(name).unwrap()
    }

    /// Writes the tarball with a stand-in for the binary, as `cargo xtask dist` lays it out.
    fn pack(&self, agent: &str) {
        let name = format!("imds-agent-{VERSION}-linux-amd64");
        self.shell(&format!(
            "mkdir -p {name}/usr/bin {name}/etc/imds-agent; echo {agent} > {name}/usr/bin/imds-agent
             chmod 755 {name}/usr/bin/imds-agent; echo '# {agent}' > {name}/etc/imds-agent/imds.toml
             tar -czf release/{name}.tar.gz {name}"
        ));
    }

    /// Writes the checksums and signs them with these options of minisign.
    fn sign(&self, options: &str) {
        self.shell(&format!(
            "cd release; sha256sum *.tar.gz > SHA256SUMS; minisign -S {options} -s ../key -m SHA256SUMS > ../log"
        ));
    }

    /// Runs the script with only the programs of the small machine.
    fn run(&self, arguments: &[&str]) -> Output {
        let mut script = Command::new("/bin/sh");
        script.arg(self.path("install.sh")).args(["--root"]).arg(self.path("machine")).args(arguments);
        script.env_clear().env("PATH", self.path("bin")).output().unwrap()
    }

    /// Installs from the directory of the release.
    fn install(&self, arguments: &[&str]) -> Output {
        let release = self.path("release");
        self.run(&[&["--from", release.to_str().unwrap(), "--public-key", &self.key], arguments].concat())
    }

    fn installed(&self) -> Option<String> {
        fs::read_to_string(self.path("machine/usr/bin/imds-agent")).ok()
    }

    #[track_caller]
    fn assert_installs(&self, output: &Output) {
        assert!(output.status.success(), "{output:?}");
        assert_eq!(self.installed().as_deref(), Some("agent\n"));
        fs::remove_dir_all(self.path("machine/usr")).unwrap();
    }

    /// Asserts that nothing was installed, and that the script prints the reason.
    #[track_caller]
    fn assert_fails(&self, output: &Output, reason: &str) {
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains(reason), "{output:?}");
        assert_eq!(self.installed(), None);
    }
}

fn is_skipped() -> bool {
    lacks_program(WHOLE_TEST, &[&PROGRAMS[..], &[MINISIGN, OPENSSL]].concat())
}

/// Serves the files of `dir` over HTTP on loopback, and returns the URL.
fn serve(dir: &Path) -> String {
    let (dir, listener) = (dir.to_owned(), TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let url = format!("http://{}/v{{version}}/", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
            let request = lines.next().unwrap_or_default();
            lines.find(String::is_empty);
            let path = request.split(' ').nth(1).unwrap_or_default();
            let file =
                path.strip_prefix(&format!("/v{VERSION}/")).and_then(|name| fs::read(dir.join(name)).ok());
            let (status, body) = file.map_or(("404 Not Found", Vec::new()), |body| ("200 OK", body));
            let head =
                format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        }
    });
    url
}

#[test]
fn download_is_verified_and_installed() {
    if is_skipped() {
        return;
    }
    let release = Release::new();
    release.add_program(MINISIGN);
    let url = serve(&release.path("release"));
    let download = |arguments: &[&str]| {
        release.run(&[&["--base-url", &url, "--public-key", &release.key], arguments].concat())
    };
    let dry = download(&["--dry-run"]);
    assert!(dry.status.success() && release.installed().is_none(), "{dry:?}");
    assert!(String::from_utf8_lossy(&dry.stdout).contains("machine/usr/bin/imds-agent"), "{dry:?}");

    let output = download(&[]);
    assert!(output.status.success(), "{output:?}");
    let mode = fs::metadata(release.path("machine/usr/bin/imds-agent")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o755);
    assert_eq!(fs::read_to_string(release.path("machine/etc/imds-agent/imds.toml")).unwrap(), "# agent\n");
    release.assert_installs(&output);

    // An installation keeps a changed configuration.
    fs::write(release.path("machine/etc/imds-agent/imds.toml"), "# own\n").unwrap();
    release.assert_installs(&download(&[]));
    assert_eq!(fs::read_to_string(release.path("machine/etc/imds-agent/imds.toml")).unwrap(), "# own\n");
    assert_eq!(
        fs::read_to_string(release.path("machine/etc/imds-agent/imds.toml.new")).unwrap(),
        "# agent\n"
    );

    release.assert_fails(&download(&["--version", "9.9.9"]), "failed to download");
    fs::remove_file(release.path(&format!("release/imds-agent-{VERSION}-linux-amd64.tar.gz"))).unwrap();
    release.assert_fails(&download(&[]), "failed to download");
    fs::remove_file(release.path("release/SHA256SUMS.minisig")).unwrap();
    release.assert_fails(&download(&[]), "failed to download");
}

#[test]
fn image_build_installs_below_its_root() {
    if is_skipped() {
        return;
    }
    let release = Release::new();
    release.add_program(MINISIGN);
    let script = SCRIPT.replace("\nPUBLIC_KEY=\n", &format!("\nPUBLIC_KEY='{}'\n", release.key));
    fs::write(release.path("release/install.sh"), script).unwrap();
    // mkosi mounts the directory of its configuration at $SRCDIR.
    symlink("release", release.path("imds-agent")).unwrap();
    fs::write(release.path("postinst"), include_str!("../../../deploy/machine-image/mkosi.postinst"))
        .unwrap();
    let mut build = Command::new("/bin/sh");
    build.arg(release.path("postinst")).env_clear().env("PATH", release.path("bin"));
    build.env("SRCDIR", release.dir.path()).env("BUILDROOT", release.path("machine"));
    release.assert_installs(&build.output().unwrap());
    let preset = release.path("machine/etc/systemd/system-preset/50-imds-agent.preset");
    assert_eq!(fs::read_to_string(preset).unwrap(), "enable imds-agent.service\n");
}

#[test]
fn changed_files_are_rejected() {
    if is_skipped() {
        return;
    }
    for verifier in [MINISIGN, OPENSSL] {
        let release = Release::new();
        release.add_program(verifier);
        release.assert_installs(&release.install(&[]));
        // Signature over the file itself instead of its hash.
        release.sign("-l");
        release.assert_installs(&release.install(&[]));
        let other = Release::new();
        release.assert_fails(
            &release.install(&["--public-key", &other.key]),
            "signature of SHA256SUMS is wrong",
        );
        for wrong in ["RWQ", "not base64!"] {
            release.assert_fails(&release.install(&["--public-key", wrong]), "install.sh: ");
        }

        // A tarball that was replaced, also with its checksum.
        release.pack("attacker");
        release.assert_fails(&release.install(&[]), "the checksum of");
        release.shell("cd release; sha256sum *.tar.gz > SHA256SUMS");
        release.assert_fails(&release.install(&[]), "signature of SHA256SUMS is wrong");
        release.sign("");
        release.shell("sed -i 2d release/SHA256SUMS.minisig");
        release.assert_fails(&release.install(&[]), "install.sh: ");
        release.shell("cd release; echo > SHA256SUMS; minisign -S -s ../key -m SHA256SUMS > ../log");
        release.assert_fails(&release.install(&[]), "SHA256SUMS does not list");
    }
}

#[test]
fn signature_is_never_skipped_silently() {
    if is_skipped() {
        return;
    }
    let release = Release::new();
    release.assert_fails(&release.install(&[]), "the signature cannot be verified");
    // OpenSSL before 3.0 cannot verify Ed25519 signatures.
    release.write_program(OPENSSL, "#!/bin/sh\necho 'Usage: pkeyutl [options]'\n");
    release.assert_fails(&release.install(&[]), "the signature cannot be verified");
    release.assert_fails(&release.install(&["--public-key", ""]), "no public key is set");
    let output = release.install(&["--no-signature"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("WARNING: the signature is not verified"));
    release.assert_installs(&output);
    release.pack("attacker");
    release.assert_fails(&release.install(&["--no-signature"]), "the checksum of");
}

#[test]
fn unknown_machines_and_options_are_rejected() {
    if is_skipped() {
        return;
    }
    let release = Release::new();
    for (arguments, reason) in [
        (&["--format", "apk"][..], "unknown format apk"),
        (&["--format", "deb"], "--root needs the format tar"),
        (&["--version", "../1"], "wrong version"),
        (&["--frmo"], "unknown option"),
        (&["--from"], "needs a value"),
        (&["--from", "", "--base-url", ""], "no source is set"),
        (&["--from", "/nonexistent"], "failed to open the directory"),
        // An unset variable must not select the running machine.
        (&["--root", "", "--dry-run"], "--root needs a directory"),
    ] {
        release.assert_fails(&release.install(arguments), reason);
    }
    release.write_program("uname", "#!/bin/sh\n[ $1 = -s ] && echo Linux || echo riscv64\n");
    release.assert_fails(&release.install(&[]), "no release for the architecture riscv64");
}

#[test]
fn environment_does_not_matter() {
    if is_skipped() {
        return;
    }
    let release = Release::new();
    release.add_program(MINISIGN);
    let mut script = Command::new("/bin/sh");
    script.arg("install.sh").args(["--root", "machine", "--from", "release", "--public-key", &release.key]);
    script.env_clear().env("PATH", release.path("bin")).env("CDPATH", release.dir.path());
    release.assert_installs(&script.current_dir(release.dir.path()).output().unwrap());

    // Without a program that the script needs, it does not claim to have installed anything.
    for program in
        PROGRAMS.into_iter().filter(|program| !["cat", "cmp", "curl", "rm", "sh"].contains(program))
    {
        fs::remove_file(release.path("bin").join(program)).unwrap();
        let output = release.install(&[]);
        assert!(output.status.success() == release.installed().is_some(), "{program}: {output:?}");
        let _ = fs::remove_dir_all(release.path("machine/usr"));
        release.add_program(program);
    }
}

#[test]
fn script_is_portable_and_names_the_version() {
    assert!(SCRIPT.contains(&format!("\nVERSION={VERSION}\n")));
    assert!(SCRIPT.contains("\nBASE_URL=") && SCRIPT.contains("\nPUBLIC_KEY="));
    if lacks_program("shellcheck of the script", &["shellcheck"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("install.sh"), SCRIPT).unwrap();
    let output = Command::new("shellcheck").arg("install.sh").current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
