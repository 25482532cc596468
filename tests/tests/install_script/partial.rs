//! Installations that stop in between, symlinks in the root, and services that do not run.

use std::{fs, os::unix::fs::symlink, process::Command};

use crate::{MINISIGN, Release, is_skipped};

const CONFIG: &str = "machine/etc/imds-agent/imds.toml";
const INCOMPLETE: &str = "the installation is incomplete";

fn release() -> Release {
    let release = Release::new();
    release.add_program(MINISIGN);
    release
}

#[test]
fn partial_installation_is_reported() {
    if is_skipped() {
        return;
    }
    let release = release();
    let cp = release.replace_program("cp");
    for (failure, status) in [("exit 1", 1), ("kill -TERM $PPID", 1)] {
        // The configuration is installed, and the disk is full during the copy of the agent.
        let script = format!(
            "#!/bin/sh\n{} \"$@\" || exit\ncase $3 in */usr/bin/*) {failure} ;; esac\n",
            cp.display()
        );
        release.write_program("cp", &script);
        let output = release.install(&[]);
        release.assert_fails(&output, INCOMPLETE);
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        assert!(release.path(CONFIG).exists());
        assert_eq!(fs::read_dir(release.path("machine/usr/bin")).unwrap().count(), 0);
    }
    // Nothing was changed before the signature was verified.
    let output = release.install(&["--public-key", "RWQ"]);
    release.assert_fails(&output, "install.sh: ");
    assert!(!String::from_utf8_lossy(&output.stderr).contains(INCOMPLETE), "{output:?}");
}

#[test]
fn symlinks_do_not_lead_out_of_the_root() {
    if is_skipped() {
        return;
    }
    let release = release();
    let machine = |path: &str| release.path("machine").join(path);
    for name in ["outside", "machine/real"] {
        fs::create_dir(release.path(name)).unwrap();
    }
    for (path, target) in [("etc", "outside"), ("etc", "missing"), ("etc/systemd", "outside")] {
        if path != "etc" {
            fs::create_dir(machine("etc")).unwrap();
        }
        symlink(release.path(target), machine(path)).unwrap();
        release.assert_fails(&release.install(&[]), "nothing was installed");
        fs::remove_file(machine(path)).unwrap();
    }
    assert_eq!(fs::read_dir(release.path("outside")).unwrap().count(), 0);

    // A relative one stays in the root.
    fs::remove_dir(machine("etc")).unwrap();
    symlink("real", machine("etc")).unwrap();
    release.assert_installs(&release.install(&[]));
    assert!(machine("real/imds-agent/imds.toml").exists());

    // The file of an earlier attempt is not followed either.
    fs::write(release.path("outside/file"), "own").unwrap();
    fs::create_dir_all(machine("usr/bin")).unwrap();
    symlink(release.path("outside/file"), machine("usr/bin/imds-agent.tmp")).unwrap();
    release.assert_installs(&release.install(&[]));
    assert_eq!(fs::read_to_string(release.path("outside/file")).unwrap(), "own");
}

#[test]
fn symlink_as_configuration_is_kept() {
    if is_skipped() {
        return;
    }
    let release = release();
    fs::create_dir_all(release.path("machine/etc/imds-agent")).unwrap();
    symlink("/nonexistent/imds.toml", release.path(CONFIG)).unwrap();
    release.assert_installs(&release.install(&[]));
    assert!(fs::symlink_metadata(release.path(CONFIG)).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(release.path(&format!("{CONFIG}.new"))).unwrap(), "# agent\n");
}

#[test]
fn image_without_the_service_is_reported() {
    if is_skipped() {
        return;
    }
    let release = release();
    let output = release.install(&[]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("the service is not enabled"), "{output:?}");
    release.assert_installs(&output);
    release.write_program("systemctl", "#!/bin/sh\necho \"$@\" >&2\n");
    let output = release.install(&[]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("enable imds-agent.service") && !errors.contains("WARNING"), "{output:?}");
    release.assert_installs(&output);
    release.write_program("systemctl", "#!/bin/sh\nexit 1\n");
    let output = release.install(&[]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains(INCOMPLETE));
}

#[test]
fn format_is_that_of_the_package_manager() {
    if is_skipped() {
        return;
    }
    let release = release();
    let known = "#!/bin/sh\n";
    // Tools that the distribution also offers do not know the packages of the system.
    let unknown = "#!/bin/sh\nexit 1\n";
    release.write_program("apt-get", known);
    for (dpkg, rpm, name) in [
        (known, unknown, "_amd64.deb"),
        (unknown, known, ".x86_64.rpm"),
        (unknown, unknown, "would install /usr/bin/imds-agent"),
    ] {
        release.write_program("dpkg", dpkg);
        release.write_program("rpm", rpm);
        let mut script = Command::new("/bin/sh");
        script.arg(release.path("install.sh")).arg("--dry-run").arg("--from").arg(release.path("release"));
        script.args(["--public-key", &release.key]).env_clear().env("PATH", release.path("bin"));
        let output = script.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        assert!(String::from_utf8_lossy(&text).contains(name), "{}", String::from_utf8_lossy(&text));
    }
}

#[test]
fn mask_of_a_removed_package_is_lifted() {
    if is_skipped() {
        return;
    }
    let release = release();
    for program in ["deb-systemd-helper", "systemctl"] {
        release.write_program(program, "#!/bin/sh\nexit 1\n");
    }
    let dry_run = |root: &[&str]| {
        let mut script = Command::new("/bin/sh");
        script.arg(release.path("install.sh")).args(["--dry-run", "--format", "tar"]).args(root);
        script.arg("--from").arg(release.path("release")).args(["--public-key", &release.key]);
        let output = script.env_clear().env("PATH", release.path("bin")).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let unmask = "would run: env DPKG_MAINTSCRIPT_PACKAGE=imds-agent deb-systemd-helper unmask imds-agent.service\n\
                  install.sh: would run: systemctl enable imds-agent.service\n";
    let text = dry_run(&[]);
    assert!(text.contains(unmask), "{text}");
    let text = dry_run(&["--root", release.path("machine").to_str().unwrap()]);
    assert!(text.contains("would run: systemctl --root=") && !text.contains("unmask"), "{text}");
}

#[test]
fn tmpdir_and_tar_options_do_not_matter() {
    if is_skipped() {
        return;
    }
    let release = release();
    let temporary = release.path("temporary");
    fs::create_dir(&temporary).unwrap();
    let mut script = Command::new("/bin/sh");
    script.arg("install.sh").args(["--root", "machine", "--from", "release", "--public-key", &release.key]);
    script.env_clear().env("PATH", release.path("bin")).env("TMPDIR", "temporary");
    script.env("TAR_OPTIONS", "--exclude=imds.toml");
    release.assert_installs(&script.current_dir(release.path("")).output().unwrap());
    assert!(release.path(CONFIG).exists());
    assert_eq!(fs::read_dir(temporary).unwrap().count(), 0);
}
