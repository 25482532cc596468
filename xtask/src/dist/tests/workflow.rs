//! Publishing steps of `.github/workflows/release.yml`, against a registry on this machine.

use std::{
    env,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use imds_tests::{
    certificate::SelfSigned,
    executable::{find_program, write_executable},
    lacks_program, skip,
};
use serde_json::Value;
use tempfile::TempDir;

use super::{VERSION, json, released};
use crate::workspace::{output_of, root};

const USER: &str = "publisher";
const PASSWORD: &str = "pass word";
/// Line of `htpasswd` for the password: bcrypt, the only kind that the registry accepts.
const HTPASSWD: &str = "publisher:$2b$04$1N9Ep5JjXjdcaf31lmIQSetbpnwAgwmiJLuqB/OF2dHAugr2OLDT6";

/// A registry that demands a password.
struct Registry {
    process: Child,
    /// Host and port, as in `127.0.0.1:5000`.
    address: String,
}

impl Registry {
    /// Starts a registry that keeps its files in `dir`, with a certificate in `cert.pem` there.
    fn start(program: &Path, dir: &Path) -> Self {
        let SelfSigned { certificate, key } = SelfSigned::create(dir);
        let (htpasswd, config) = (dir.join("htpasswd"), dir.join("registry.yml"));
        fs::write(&htpasswd, HTPASSWD).unwrap();
        let text = serde_json::json!({
            "version": "0.1",
            "log": {"level": "info"},
            "storage": {"filesystem": {"rootdirectory": dir.join("registry")}},
            "http": {"addr": "127.0.0.1:0", "tls": {"certificate": certificate, "key": key}},
            "auth": {"htpasswd": {"realm": "test", "path": htpasswd}},
        });
        fs::write(&config, text.to_string()).unwrap();
        let mut serve = Command::new(program);
        serve.arg("serve").arg(config).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = serve.spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map(Result::unwrap);
        let address = lines.find_map(|line| {
            let (_, address) = line.split_once("listening on ")?;
            Some(address.split(['"', ',']).next()?.to_owned())
        });
        // A full pipe would block the registry.
        std::thread::spawn(|| lines.for_each(drop));
        Self { process, address: address.expect("an address in the registry's log") }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Returns the script of a step in the job `publish` of the workflow.
fn script(step: &str) -> String {
    let workflow = fs::read_to_string(root().join(".github/workflows/release.yml")).unwrap();
    let workflow: Value = serde_saphyr::from_str(&workflow).unwrap();
    let steps = workflow["jobs"]["publish"]["steps"].as_array().unwrap();
    let step = steps.iter().find(|candidate| candidate["name"] == step).expect("a step of that name");
    assert_eq!(step["working-directory"], "release");
    step["run"].as_str().unwrap().to_owned()
}

/// Returns a command that runs a step as GitHub does, in the directory of the release.
fn step(name: &str, release: &Path) -> Command {
    let mut bash = Command::new("bash");
    bash.args(["--noprofile", "--norc", "-e", "-o", "pipefail", "-c", &script(name)]);
    bash.current_dir(release).env("GITHUB_REF_NAME", format!("v{VERSION}"));
    bash
}

/// Returns a manifest or an index in the registry.
fn manifest(registry: &str, name: &str, directory: &TempDir) -> Value {
    let mut inspect = Command::new("skopeo");
    inspect.args(["inspect", "--raw", &format!("docker://{registry}/{name}:{VERSION}")]);
    serde_json::from_str(&output_of(with_registry(&mut inspect, directory)).unwrap()).unwrap()
}

/// Sets the files with the registry's certificate and the login.
fn with_registry<'a>(command: &'a mut Command, directory: &TempDir) -> &'a mut Command {
    command.env("SSL_CERT_FILE", directory.path().join("cert.pem"));
    command.env("REGISTRY_AUTH_FILE", directory.path().join("auth.json"))
}

/// Returns the image index or the manifest of an OCI archive.
fn archived(archive: &Path) -> Value {
    let layout = tempfile::tempdir().unwrap();
    tar::Archive::new(File::open(archive).unwrap()).unpack(layout.path()).unwrap();
    super::blob(layout.path(), &json(&layout.path().join("index.json"))["manifests"][0])
}

#[test]
fn workflow_pushes_image_and_chart() {
    let program =
        env::var_os("DOCKER_REGISTRY").map(PathBuf::from).or_else(|| find_program("docker-registry"));
    let Some(program) = program else {
        return skip("the release workflow", "neither DOCKER_REGISTRY nor PATH has a docker-registry");
    };
    if lacks_program("the release workflow", &["openssl", "skopeo"]) {
        return;
    }
    let (release, directory) = (released(), tempfile::tempdir().unwrap());
    output_of(&mut step("Verify the checksums", release.path())).unwrap();

    let registry = Registry::start(&program, directory.path());
    let address = format!("{}/team", registry.address);
    let push = |password: &str| {
        let mut push = step("Push image and chart", release.path());
        push.env("REGISTRY", &address).env("REGISTRY_USER", USER).env("REGISTRY_PASSWORD", password);
        output_of(with_registry(&mut push, &directory))
    };
    push("wrong").unwrap_err();
    push(PASSWORD).unwrap();

    for (name, archive) in [
        ("imds-agent", format!("imds-agent-{VERSION}-oci.tar")),
        ("charts/imds-agent", format!("imds-agent-chart-{VERSION}-oci.tar")),
    ] {
        assert_eq!(manifest(&address, name, &directory), archived(&release.path().join(archive)), "{name}");
    }
}

#[test]
fn workflow_uploads_each_file() {
    let (release, directory) = (released(), tempfile::tempdir().unwrap());
    write_executable(&directory.path().join("gh"), "#!/bin/sh\nprintf '%s\\n' \"$@\"\n");
    let path = format!("{}:{}", directory.path().display(), env::var("PATH").unwrap());
    let create = |tag: &str| {
        let mut create = step("Create the release", release.path());
        output_of(create.env("PATH", &path).env("GITHUB_REF_NAME", tag)).unwrap()
    };
    let arguments = create(&format!("v{VERSION}"));
    let (options, files) = arguments.split_once("\n--\n").unwrap();
    assert!(options.starts_with(&format!("release\ncreate\nv{VERSION}\n--verify-tag\n")), "{options}");
    assert!(options.ends_with("\n--notes-file\nnotes.md"), "{options}");
    let mut uploaded: Vec<_> = files.lines().collect();
    uploaded.sort_unstable();
    let entries = fs::read_dir(release.path()).unwrap();
    let mut expected: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    expected.sort_unstable();
    assert_eq!(uploaded, expected);
    assert!(create("v0.2.0-rc.1").starts_with("release\ncreate\nv0.2.0-rc.1\n--prerelease\n"));
}
