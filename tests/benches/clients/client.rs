//! Clients and the commands that run them in a pod.

use std::{
    env, fmt,
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::node::Node;

/// Environment variable with the directory of the libraries.
const LIBRARIES: &str = "IMDS_CLIENTS";
/// `PATH` of the clients. Contains no command-line tools of clouds, which some clients look for.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Lets a client resolve the name of Google's service, without a resolver. $1 is /etc/hosts, $2 /etc/resolv.conf.
const WITH_HOSTS: &str =
    r#"mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/resolv.conf && shift 2 && exec "$@""#;
/// Makes a program wait for a line, as clients.py and clients.cjs do.
const WITH_START: &str = r#"echo ready; read -r _; exec "$@""#;
const PYTHON: &str = include_str!("clients.py");
const NODE: &str = include_str!("clients.cjs");
const HOSTS: &str =
    "127.0.0.1 localhost\n169.254.169.254 metadata.google.internal metadata.google.internal.\n";
const RESOLVER: &str = "nameserver 127.0.0.1\n";
const URL: &str = "http://169.254.169.254/metadata/instance?api-version=2021-02-01";

/// A client and one of its calls.
#[derive(Debug)]
pub(crate) struct Client {
    name: &'static str,
    call: &'static str,
    kind: Kind,
    version: String,
    /// Files that the client finds in its pod.
    files: PathBuf,
}

/// Command of a client.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// A program with its arguments.
    Program(&'static [&'static str]),
    /// A function of clients.py.
    Python(&'static str),
    /// A function of clients.py, with Debian's interpreter and libraries.
    DebianPython(&'static str),
    /// A function of clients.cjs.
    Node(&'static str),
}

const CLIENTS: [(&str, &str, Kind); 15] = [
    ("curl", "", Kind::Program(&["curl", "--silent", "--header", "Metadata: true", URL])),
    ("wget", "", Kind::Program(&["wget", "--quiet", "--output-document=-", "--header=Metadata: true", URL])),
    (
        "busybox",
        "`wget`",
        Kind::Program(&["busybox", "wget", "-q", "-O", "-", "--header", "Metadata: true", URL]),
    ),
    ("boto3", "`Session.get_credentials`", Kind::Python("boto3")),
    ("@aws-sdk/credential-providers", "`fromInstanceMetadata`", Kind::Node("aws")),
    ("azure-identity", "`ManagedIdentityCredential`", Kind::Python("azure_managed_identity")),
    ("azure-identity", "`DefaultAzureCredential`", Kind::Python("azure_default")),
    ("@azure/identity", "`ManagedIdentityCredential`", Kind::Node("azure_managed_identity")),
    ("@azure/identity", "`DefaultAzureCredential`", Kind::Node("azure_default")),
    ("msal", "`ManagedIdentityClient`", Kind::Python("msal")),
    ("google-auth", "`default`", Kind::Python("google_default")),
    ("google-auth", "`compute_engine.Credentials`", Kind::Python("google_token")),
    ("gcp-metadata", "`isAvailable`", Kind::Node("gcp_available")),
    ("gcp-metadata", "`instance`", Kind::Node("gcp_token")),
    ("cloud-init", "`DataSourceEc2.wait_for_metadata_service`", Kind::DebianPython("cloud_init")),
];

impl Client {
    /// Returns every client, installed or not. `dir` is for the files that they find in a pod.
    pub(crate) fn all(dir: &Path) -> Vec<Self> {
        let files = dir.join("clients");
        fs::create_dir_all(files.join("home")).expect("make a home directory");
        fs::write(files.join("hosts"), HOSTS).expect("write /etc/hosts");
        fs::write(files.join("resolv.conf"), RESOLVER).expect("write /etc/resolv.conf");
        CLIENTS
            .map(|(name, call, kind)| Self { name, call, kind, version: String::new(), files: files.clone() })
            .into()
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Returns the row header: name, version and call.
    pub(crate) fn title(&self) -> String {
        format!("{} {} {}", self.name, self.version, self.call).trim_end().to_owned()
    }

    /// Starts the client for the first time and learns its version.
    pub(crate) fn load(&mut self, node: &Node) -> Result<Loaded, String> {
        if let Kind::Program([program, ..]) = self.kind {
            // busybox has no option for it, and prints it without any.
            let arguments: &[&str] = if program == &"busybox" { &[] } else { &["--version"] };
            let mut command = Command::new(program);
            command.args(arguments).env("PATH", PATH);
            let output = command.output().map_err(|_| format!("{program} is not installed"))?;
            let text = String::from_utf8_lossy(&output.stdout);
            let is_version =
                |word: &&str| word.trim_start_matches('v').starts_with(|first: char| first.is_ascii_digit());
            let version = text.split_whitespace().find(is_version).unwrap_or("of an unknown version");
            version.trim_start_matches('v').clone_into(&mut self.version);
        }
        let loaded = self.start(node)?;
        if !loaded.version.is_empty() {
            self.version.clone_from(&loaded.version);
        }
        Ok(loaded)
    }

    /// Starts the client in the node's pod and waits until it has loaded its libraries.
    pub(crate) fn start(&self, node: &Node) -> Result<Loaded, String> {
        let log = self.files.join("stderr");
        let mut command = node.command("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", WITH_HOSTS, "sh"]);
        command.arg(self.files.join("hosts")).arg(self.files.join("resolv.conf"));
        command.env_clear().env("PATH", PATH).env("HOME", self.files.join("home"));
        self.add_program(&mut command)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&log).expect("make a log"));
        let mut child = node.in_cgroup(|| command.spawn()).expect("start unshare");
        let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut line = String::new();
        output.read_line(&mut line).expect("read from a pipe");
        if let Some(version) = line.strip_prefix("ready") {
            return Ok(Loaded { child, output, version: version.trim().to_owned() });
        }
        child.wait().expect("wait for a client");
        let log = fs::read_to_string(log).unwrap_or_default();
        // Node.js prints its version last.
        let error = log.lines().rev().find(|line| line.contains("Error")).or_else(|| log.lines().last());
        Err(error.unwrap_or("it did not start").to_owned())
    }

    /// Adds the program, its arguments and its environment.
    fn add_program(&self, command: &mut Command) -> Result<(), String> {
        let libraries = || env::var_os(LIBRARIES).map(PathBuf::from).ok_or(format!("{LIBRARIES} is not set"));
        match self.kind {
            Kind::Program(program) => {
                command.args(["sh", "-c", WITH_START, "sh"]).args(program);
            }
            Kind::Python(function) => {
                let python = interpreter("python3", &["-c", "import sys; print(sys.executable)"])?;
                command
                    .arg(python)
                    .args(["-c", PYTHON, function])
                    .env("PYTHONPATH", libraries()?.join("python"));
            }
            Kind::DebianPython(function) => {
                let packages = libraries()?.join("debian/usr/lib/python3/dist-packages");
                command.args(["/usr/bin/python3", "-c", PYTHON, function]).env("PYTHONPATH", packages);
            }
            Kind::Node(function) => {
                let node = interpreter("node", &["-p", "process.execPath"])?;
                command.arg(node).args(["-e", NODE, function]);
                command.env("NODE_PATH", libraries()?.join("node/node_modules"));
            }
        }
        Ok(())
    }
}

/// Returns the path of an interpreter, which may be started through a wrapper that needs its environment.
fn interpreter(name: &str, arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new(name).args(arguments).output().map_err(|_| format!("{name} is not installed"))?;
    String::from_utf8(output.stdout).map(|path| path.trim().to_owned()).map_err(|error| error.to_string())
}

/// A client that is ready to ask the metadata service.
#[derive(Debug)]
pub(crate) struct Loaded {
    child: Child,
    output: BufReader<ChildStdout>,
    version: String,
}

impl Loaded {
    /// Lets the client ask, and measures until it has an answer or gives up. Kills it after `limit`.
    pub(crate) fn ask(mut self, limit: Duration) -> JoinHandle<Run> {
        let (sender, receiver) = mpsc::channel();
        let begin = Instant::now();
        writeln!(self.child.stdin.take().expect("a pipe")).expect("write to a pipe");
        thread::spawn(move || {
            for line in self.output.lines().map_while(Result::ok) {
                // Programs write the document instead.
                if line == "ok" || line.starts_with("failed ") {
                    let _ = sender.send((begin.elapsed(), Some(line)));
                }
            }
            let _ = sender.send((begin.elapsed(), None));
        });
        let mut child = self.child;
        thread::spawn(move || {
            let answer = receiver.recv_timeout(limit);
            if answer.is_err() || matches!(answer, Ok((_, Some(_)))) {
                // Libraries may wait for threads of their own after the answer. Fails if the client has ended.
                let _ = child.kill();
            }
            let status = child.wait().expect("wait for a client");
            match answer {
                Ok((took, Some(outcome))) => Run { seconds: Some(took.as_secs_f64()), outcome },
                Ok((took, None)) => {
                    let outcome = if status.success() { "ok".to_owned() } else { status.to_string() };
                    Run { seconds: Some(took.as_secs_f64()), outcome }
                }
                Err(_) => Run { seconds: None, outcome: "stopped".to_owned() },
            }
        })
    }
}

/// Result of one client with one answer.
#[derive(Debug)]
pub(crate) struct Run {
    /// Time until the client had an answer or gave up, if it did within the limit.
    pub(crate) seconds: Option<f64>,
    outcome: String,
}

impl Run {
    /// Reports whether the client reached the service.
    pub(crate) fn is_ok(&self) -> bool {
        self.outcome == "ok"
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.seconds {
            Some(seconds) => write!(f, "{seconds:.2} s, {}", self.outcome),
            None => f.write_str(&self.outcome),
        }
    }
}
