//! The configuration file: TOML to a validated [`Config`].

mod endpoints;
mod exempt;
mod file;
mod hooks;
mod interfaces;
mod kubernetes;
mod metrics;
mod names;
mod selector;
mod source;
mod suggest;
#[cfg(test)]
mod tests;

use std::{
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use imds_ebpf_common::{
    DenyAction, DenyErrno, Mode,
    maps::{CONFIG_TEXT_LEN, MARK},
};
use thiserror::Error;

pub use self::{
    endpoints::Endpoints,
    exempt::{Exempt, Exemptions, NameGlob, Pods, Scope, Sender},
    hooks::{Hooks, Sendmsg},
    interfaces::Interfaces,
    kubernetes::{Access, Enabled, Kubernetes, Surroundings},
    metrics::Listen,
};
use self::{
    file::File,
    source::{Mistakes, Source},
};

use crate::{endpoints::Guarded, provider::Dmi};

/// What the operator wants. The default is what runs without a file: enforce, the endpoints of the provider whose machine
/// this is, interfaces as classified.
#[derive(Clone, Debug)]
pub struct Config {
    /// What happens to a packet from a pod to a guarded endpoint.
    pub mode: Mode,
    /// What its sender is told where it is denied.
    pub on_deny: DenyAction,
    /// Error of a call that the socket hook denies.
    pub on_deny_errno: DenyErrno,
    /// Where packets and calls are judged.
    pub hooks: Hooks,
    /// Setting of the sendmsg programs.
    pub sendmsg: Sendmsg,
    /// Bit of the packet mark that `from_pod` sets for `node_egress` on packets of exempt pods behind a bridge.
    pub mark: u32,
    /// What is guarded.
    pub endpoints: Endpoints,
    /// Which interfaces are pods'.
    pub interfaces: Interfaces,
    /// Who is exempt.
    pub exempt: Exemptions,
    /// Where metrics and health are served.
    pub listen: Vec<Listen>,
    /// True if the kernel is to collect run times of BPF programs.
    pub program_run_time: bool,
    /// How pods are known by name.
    pub kubernetes: Kubernetes,
    text: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            on_deny: DenyAction::default(),
            on_deny_errno: DenyErrno::default(),
            hooks: Hooks::default(),
            sendmsg: Sendmsg::default(),
            mark: MARK,
            endpoints: Endpoints::default(),
            interfaces: Interfaces::default(),
            exempt: Exemptions::default(),
            listen: Listen::by_default(),
            program_run_time: false,
            kubernetes: Kubernetes::default(),
            text: File::default().to_toml(),
        }
    }
}

/// One thing that is wrong with a configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read the configuration {}: {reason}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
    /// The file is not TOML, or has a key or value that is not known or makes no sense.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line of the mistake, from 1.
        line: usize,
        /// Column of the mistake in characters, from 1.
        column: usize,
        /// What is wrong, on one line.
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

/// Why a configuration can't be used, at least one thing. Nothing of it is in force then.
#[derive(Debug, Error)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// Each of them, by line.
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
    /// The first, and how many more there are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0[..] {
            [] => f.write_str("the configuration is wrong"),
            [only] => only.fmt(f),
            [first, more @ ..] => {
                write!(f, "{first} (and {} more, see `imds-agent config check`)", more.len())
            }
        }
    }
}

impl Config {
    /// Reads and validates `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        Self::parse(&read(path)?, path)
    }

    /// Validates `text`, which was read from `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigErrors> {
        let (source, mut mistakes) = (Source { text, path }, Mistakes::default());
        let file = File::read(source, &mut mistakes);
        let interfaces = Interfaces::parse(&file.interfaces, source, &mut mistakes);
        let endpoints = Endpoints::parse(&file, source, &mut mistakes);
        let exempt = Exemptions::parse(&file.exempt, source, &mut mistakes);
        let listen = Listen::parse(&file.metrics, source, &mut mistakes);
        let kubernetes = Kubernetes::parse(&file.kubernetes, source, &mut mistakes);
        if kubernetes.enabled == Enabled::No
            && let Some(name) = exempt.first_of_pods(&file.exempt)
        {
            let message = "exempt.namespace: no pod is known with kubernetes.enabled = \"no\"";
            mistakes.note(source.error(name.span(), message.to_owned()));
        }
        let mode = file.mode.into();
        let hooks = Hooks::from(file.hooks.get_ref());
        let sendmsg = file.hooks.get_ref().sendmsg(source, &mut mistakes);
        let mark = file.hooks.get_ref().mark(source, &mut mistakes);
        let text = file.to_toml();
        // Of a file that was read in part only, these could be wrong.
        if mistakes.are_none() {
            if endpoints.are_none() && mode != Mode::Off {
                let message =
                    "provider: \"none\" and no [[endpoint]] would guard nothing; say mode = \"off\" for that";
                mistakes.note(source.error(file.provider.span(), message.to_owned()));
            }
            if !hooks.deny_remote() {
                let message =
                    "hooks: every one is off, so that nothing would be guarded; say mode = \"off\" for that";
                mistakes.note(source.error(file.hooks.span(), message.to_owned()));
            }
            if text.len() > CONFIG_TEXT_LEN {
                let message = format!("all of it, defaults included, is more than {CONFIG_TEXT_LEN} bytes");
                mistakes.note(source.error(0..0, message));
            }
        }
        if !mistakes.are_none() {
            return Err(ConfigErrors(mistakes.into_vec()));
        }
        Ok(Self {
            mode,
            on_deny: file.on_deny.into(),
            on_deny_errno: file.on_deny_errno.into(),
            hooks,
            sendmsg,
            mark,
            endpoints,
            interfaces,
            exempt,
            listen,
            program_run_time: file.metrics.program_run_time,
            kubernetes,
            text,
        })
    }

    /// The built-in defaults for a file that can't be used, with its `mode` and `metrics` if these are valid.
    ///
    /// No other key is taken: a key that depends on one with an error could weaken enforcement. The address of metrics is
    /// taken because the probes of a cluster restart an agent that does not answer there.
    #[must_use]
    pub fn fallback(text: &str, path: &Path) -> Self {
        let (source, mut mistakes) = (Source { text, path }, Mistakes::default());
        let File { mode, metrics, .. } = File::read(source, &mut mistakes);
        let mut of_metrics = Mistakes::default();
        let listen = Listen::parse(&metrics, source, &mut of_metrics);
        let file = File { mode, ..File::default() };
        let config = Self { mode: mode.into(), text: file.to_toml(), ..Self::default() };
        if !of_metrics.are_none() {
            return config;
        }
        Self { listen, text: File { metrics, ..file }.to_toml(), ..config }
    }

    /// The configuration with the `socket` hook off.
    #[must_use]
    pub fn without_socket(self) -> Self {
        let (source, mut mistakes) = (Source { text: &self.text, path: Path::new("") }, Mistakes::default());
        let file = File::read(source, &mut mistakes).without_socket();
        let hooks = Hooks::from(file.hooks.get_ref());
        Self { hooks, text: file.to_toml(), ..self }
    }

    /// What it guards, and whom it exempts from what, on a machine of which the firmware says `dmi`.
    pub fn resolve(&self, dmi: &Dmi) -> Result<(Guarded, Vec<Exempt>), ConfigErrors> {
        let guarded = self.endpoints.resolve(dmi)?;
        let exempt = self.exempt.resolve(&guarded)?;
        Ok((guarded, exempt))
    }

    /// The same as TOML, every default included.
    #[must_use]
    pub fn to_toml(&self) -> &str {
        &self.text
    }
}

/// The text of a file that is no larger than a configuration can be.
pub fn read(path: &Path) -> Result<String, ConfigError> {
    read_file(path).map_err(|reason| ConfigError::Read { path: path.to_owned(), reason })
}

fn read_file(path: &Path) -> io::Result<String> {
    const MOST: u64 = 1 << 20;
    // Without blocking: a pipe that nobody writes to would hold the agent.
    let file = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut text = String::new();
    if file.take(MOST + 1).read_to_string(&mut text)? as u64 > MOST {
        return Err(io::Error::other("it has more than a MiB"));
    }
    Ok(text)
}
