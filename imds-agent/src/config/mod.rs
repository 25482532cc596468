//! Configuration file: parses TOML into a validated [`Config`].

mod allowed_requests;
mod endpoint;
pub mod endpoint_set;
mod event_sinks;
mod exemption;
mod file;
mod hooks;
mod interfaces;
mod kubernetes;
pub mod last_good;
mod listen;
pub mod loader;
mod names;
pub mod node_pool;
mod node_table;
pub mod provider;
mod selector;
mod source;
mod suggest;
mod switch;
#[cfg(test)]
mod tests;

use std::{
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use imds_ebpf_common::{DenyAction, DenyErrno, Mode, maps::CONFIG_TEXT_LEN};
use thiserror::Error;

pub use self::{
    endpoint::Endpoints,
    event_sinks::{Events, HostPort, LogFile, Otlp, Sink, SyslogAddress},
    exemption::{
        EndpointSelector, Exempt, Exemptions, NameGlob, NamespaceSelector, PodSelector, RuleSubject,
    },
    hooks::{Hooks, Sendmsg},
    interfaces::Interfaces,
    kubernetes::{Access, Enabled, Environment, Kubernetes},
    listen::Listen,
    node_pool::{NodeIdentity, NodePool},
    node_table::NodeProcess,
    selector::Selector,
};
use self::{
    file::{File, strictness},
    listen::MetricsTable,
    node_pool::header_of,
    node_table::NodeTable,
    source::{Diagnostics, SourceFile},
};

use crate::config::{endpoint_set::EndpointSet, provider::Dmi};

/// Validated configuration. The default is used without a file: mode `enforce`, the endpoints of the provider that DMI
/// identifies, and no exemptions.
#[derive(Clone, Debug)]
pub struct Config {
    /// Treatment of a packet from a pod to a protected endpoint.
    pub mode: Mode,
    /// Response to the sender of a denied packet.
    pub on_deny: DenyAction,
    /// Error of a call that the socket hook denies.
    pub on_deny_errno: DenyErrno,
    /// Hooks that the configuration enables.
    pub hooks: Hooks,
    /// Setting of the sendmsg programs.
    pub sendmsg: Sendmsg,
    /// Processes of the node that may reach protected endpoints; `None` if all of them may.
    pub node_allow: Option<Vec<NodeProcess>>,
    /// Selection of the protected endpoints.
    pub endpoints: Endpoints,
    /// Interfaces whose classification the operator overrides.
    pub interfaces: Interfaces,
    /// Exemption rules, in the order of the file.
    pub exempt: Exemptions,
    /// Addresses of the server for metrics and health.
    pub listen: Vec<Listen>,
    /// True if the kernel should collect run times of BPF programs.
    pub program_run_time: bool,
    /// Sinks for records of denied requests.
    pub events: Events,
    /// Settings of the pod watch.
    pub kubernetes: Kubernetes,
    /// Pools of nodes with other settings. Empty for the configuration of one node.
    pools: Vec<NodePool>,
    text: String,
}

impl Default for Config {
    fn default() -> Self {
        Self::from_file(&File::default(), &mut Diagnostics::new("", Path::new("")))
    }
}

/// Single error in a configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to read the configuration {}: {reason}", path.display())]
    Read {
        /// Path of the configuration file.
        path: PathBuf,
        /// Error of the system call.
        reason: io::Error,
    },
    /// The file is not TOML, or has an unknown key or an invalid value.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Parse {
        /// Path of the configuration file.
        path: PathBuf,
        /// Line of the error, counted from 1.
        line: usize,
        /// Column of the error in characters, counted from 1.
        column: usize,
        /// Description of the error on one line.
        message: String,
    },
}

impl ConfigError {
    fn position(&self) -> (usize, usize) {
        match self {
            Self::Read { .. } => (0, 0),
            Self::Parse { line, column, .. } => (*line, *column),
        }
    }
}

/// All errors of an unusable configuration, at least one. The agent applies no part of such a configuration.
#[derive(Debug, Error)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// Fails if there are errors.
    fn check(mut errors: Vec<ConfigError>) -> Result<(), Self> {
        errors.sort_by_key(ConfigError::position);
        if errors.is_empty() { Ok(()) } else { Err(Self(errors)) }
    }

    /// Returns the errors, ordered by line.
    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        self.0.iter()
    }
}

impl From<ConfigError> for ConfigErrors {
    fn from(error: ConfigError) -> Self {
        Self(vec![error])
    }
}

impl fmt::Display for ConfigErrors {
    /// Formats the first error and the number of the others.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0[..] {
            [] => f.write_str("invalid configuration"),
            [only] => only.fmt(f),
            [first, more @ ..] => {
                write!(f, "{first} (and {} more, see `imds-agent config check`)", more.len())
            }
        }
    }
}

impl Config {
    /// Reads and validates the configuration file at `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        Self::parse(&read(path)?, path)
    }

    /// Validates `text`, which was read from `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigErrors> {
        let mut diagnostics = Diagnostics::new(text, path);
        let file = File::read(&mut diagnostics);
        if file.to_toml().len() > CONFIG_TEXT_LEN {
            // Returns before the checks that compare all entries with each other.
            let message = format!("the configuration with all defaults exceeds {CONFIG_TEXT_LEN} bytes");
            return Err(diagnostics.source.error(0..0, message).into());
        }
        let mut config = Self::check(&file, &mut diagnostics);
        // A recorded configuration names its pool.
        if let Some(header) = header_of(text).filter(|_| file.node_pool.is_empty()) {
            config.text.insert_str(0, &format!("{header}\n"));
        }
        // Errors of the rest of the file would be repeated for each pool.
        if diagnostics.is_empty() {
            config.pools = NodePool::parse(&file, &mut diagnostics);
        }
        diagnostics.finish()?;
        Ok(config)
    }

    /// Validates `file`, including the relations between its keys.
    fn check(file: &File, diagnostics: &mut Diagnostics<'_>) -> Self {
        let config = Self::from_file(file, diagnostics);
        if config.kubernetes.enabled == Enabled::No
            && let Some((span, key)) = config.exempt.first_pod_rule(&file.exempt)
        {
            let message = format!("{key}: needs the pod watch, but kubernetes.enabled = \"no\"");
            diagnostics.error(span, message);
        }
        // Later checks could report wrong errors if only a part of the file was read.
        if diagnostics.is_empty() {
            if config.endpoints.is_empty() && config.mode != Mode::Off {
                let message =
                    "provider: \"none\" without an [[endpoint]] protects nothing; set mode = \"off\" instead";
                diagnostics.error(file.provider.span(), message);
            }
            if !config.hooks.deny_remote() {
                let message = "hooks: all hooks are off, so nothing is enforced; set mode = \"off\" instead";
                diagnostics.error(file.hooks.span(), message);
            }
        }
        config
    }

    /// Validates each key of `file`, and records the errors.
    fn from_file(file: &File, diagnostics: &mut Diagnostics<'_>) -> Self {
        Self {
            mode: file.mode,
            on_deny: file.on_deny,
            on_deny_errno: file.on_deny_errno,
            hooks: file.hooks(),
            sendmsg: file.hooks.get_ref().sendmsg(diagnostics),
            node_allow: file.node.parse(diagnostics),
            endpoints: Endpoints::parse(file, diagnostics),
            interfaces: Interfaces::parse(&file.interfaces, diagnostics),
            exempt: Exemptions::parse(&file.exempt, diagnostics),
            listen: Listen::parse(&file.metrics, diagnostics),
            program_run_time: file.metrics.program_run_time,
            events: Events::parse(&file.events, diagnostics),
            kubernetes: Kubernetes::parse(&file.kubernetes, diagnostics),
            pools: Vec::new(),
            text: file.to_toml(),
        }
    }

    /// Returns the built-in defaults for an unusable file, with its `mode` and `metrics` if these are valid, and the valid
    /// entries of `node.allow`. If the file has pools, the mode is the strictest one.
    ///
    /// Other keys are ignored, because a key that depends on an invalid one could weaken enforcement. The allow list of
    /// the node only restricts, and depends on no other key. The metrics address is used because the probes of a cluster
    /// restart an agent that does not answer there.
    pub fn fallback(text: &str, path: &Path) -> Self {
        let File { mode, metrics, .. } = File::read(&mut Diagnostics::new(text, path));
        let pools = node_pool::modes(text);
        let mode = pools.into_iter().chain([mode]).min_by_key(|mode| strictness(*mode)).unwrap_or(mode);
        let mut diagnostics = Diagnostics::new(text, path);
        let _addresses = Listen::parse(&metrics, &mut diagnostics);
        let metrics = if diagnostics.is_empty() { metrics } else { MetricsTable::default() };
        let node = NodeTable::salvage(SourceFile { text, path });
        Self::from_file(&File { mode, node, metrics, ..File::default() }, &mut diagnostics)
    }

    /// Returns the configuration with the `socket` hook off.
    #[must_use]
    pub fn without_socket(self) -> Self {
        let file = File::read(&mut Diagnostics::new(&self.text, Path::new(""))).without_socket();
        let hooks = file.hooks();
        Self { hooks, text: file.to_toml(), ..self }
    }

    /// Resolves the protected endpoints and the exemptions on a machine with the SMBIOS fields `dmi`.
    pub fn resolve(&self, dmi: &Dmi) -> Result<(EndpointSet, Vec<Exempt>), ConfigErrors> {
        let endpoints = self.endpoints.resolve(dmi)?;
        let exempt = self.exempt.resolve(&endpoints)?;
        Ok((endpoints, exempt))
    }

    /// Returns the configuration as TOML, including every default.
    pub fn to_toml(&self) -> &str {
        &self.text
    }
}

/// Reads a configuration file of at most 1 MiB.
pub fn read(path: &Path) -> Result<String, ConfigError> {
    read_file(path).map_err(|reason| ConfigError::Read { path: path.to_owned(), reason })
}

/// Reads the configuration from standard input.
pub fn read_stdin() -> Result<String, ConfigError> {
    read_limited(io::stdin().lock()).map_err(|reason| ConfigError::Read { path: "-".into(), reason })
}

fn read_file(path: &Path) -> io::Result<String> {
    // Open without blocking: a FIFO without a writer would block the agent.
    let file = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    read_limited(file)
}

fn read_limited(file: impl io::Read) -> io::Result<String> {
    const MAX_FILE_SIZE: u64 = 1 << 20;
    let mut text = String::new();
    if file.take(MAX_FILE_SIZE + 1).read_to_string(&mut text)? as u64 > MAX_FILE_SIZE {
        return Err(io::Error::other("the file is larger than 1 MiB"));
    }
    Ok(text)
}
