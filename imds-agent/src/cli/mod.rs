//! Command line: arguments, help texts and exit codes.

mod checks;
mod config;
mod config_summary;
mod events;
mod manual;
mod output;
mod report;
mod run;
mod stop_command;
mod top;
mod unload;

use std::{io, os::unix::net::UnixStream, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use log::LevelFilter;
use nix::sys::resource::{Resource, getrlimit};
use tokio::runtime::{Builder, Runtime};

use crate::{
    config::last_good::LastGoodStore,
    datapath::pin::{dir::PinDir, netns_owner},
    diagnose::preflight,
    node::confinement,
    telemetry::logging::{self, LogFormat, LogOptions},
    version,
};

/// Default directory of the pinned maps, programs and links (`--pin-dir`).
pub const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/imds";

/// Blocks pods and containers from the cloud instance metadata service (169.254.169.254).
///
/// The BPF programs that `run` attaches stay attached when the agent stops, is killed or is upgraded. `unload` removes them.
///
/// Exit codes: 0 success; 1 failure; 2 invalid command line or configuration; 3 `status` found a problem or nothing loaded,
/// `verify` a check that failed, or `doctor` a missing feature.
#[derive(Debug, Parser)]
#[command(version, long_version = version::LONG, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Log")]
struct LogArgs {
    /// Log format on standard error. If that is the systemd journal, lines have a priority instead of time and level
    #[arg(long, global = true, value_name = "FORMAT", value_enum, default_value_t)]
    log_format: LogFormat,
    /// Lowest level to log. Overrides `RUST_LOG`, whose filters can also name modules and libraries
    /// (`info,imds_agent::kube=debug,hyper=debug`). Default: info
    #[arg(long, global = true, value_name = "LEVEL", value_enum)]
    log_level: Option<LogLevel>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogLevel {
    /// Failures of enforcement or of a command
    Error,
    /// Failures, changes by other programs, and limitations
    Warn,
    /// Also changes of the configuration, pods and interfaces
    Info,
    /// Also each interface and attachment of a resync
    Debug,
    /// All messages, also of libraries
    Trace,
}

impl LogLevel {
    const fn filter(self) -> LevelFilter {
        match self {
            Self::Error => LevelFilter::Error,
            Self::Warn => LevelFilter::Warn,
            Self::Info => LevelFilter::Info,
            Self::Debug => LevelFilter::Debug,
            Self::Trace => LevelFilter::Trace,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Protect this node: attach the BPF programs, and follow pods as they start and stop
    Run(run::RunArgs),
    /// Show the state of this node: mode, endpoints, exemptions, attached interfaces and problems
    Status(output::OutputArgs),
    /// Stream requests to protected endpoints with their verdicts. Prints unread recent events first
    Events(events::EventsArgs),
    /// Show the verdicts per second of each interface and hook, and the latest events, in a terminal
    Top(top::TopArgs),
    /// List denied senders (in audit mode: senders that enforcement would deny), and the rules that would exempt them
    Report(report::ReportArgs),
    /// Check kernel features, permissions and other programs on this node, and print remedies. Changes nothing
    Doctor(output::OutputArgs),
    /// Send test packets on this node, to check that pods are denied, and that exempt pods and the node are not
    Verify(output::OutputArgs),
    /// Check a configuration file, or show the effective configuration
    Config(config::ConfigArgs),
    /// End enforcement: remove every program, link, map and pin, and the last good configuration
    Unload(unload::UnloadArgs),
    /// Print a completion script for a shell
    Completions(manual::CompletionsArgs),
    /// Print or write manual pages
    Man(manual::ManArgs),
}

#[derive(Args, Debug)]
struct PinDirArg {
    /// Directory on a bpffs for the pinned maps, programs and links
    #[arg(long, value_name = "DIR", default_value = DEFAULT_PIN_DIR)]
    pin_dir: PathBuf,
}

impl PinDirArg {
    /// Returns the directory if it has programs for this network namespace. `consequence` completes the error message if nothing
    /// is loaded.
    fn loaded(&self, consequence: &str) -> anyhow::Result<PinDir> {
        preflight::check_capabilities()?;
        let pins = PinDir::new(&self.pin_dir)?;
        output::ensure_loaded(&pins, consequence)?;
        netns_owner::ensure_own_netns(&pins)?;
        Ok(pins)
    }
}

/// Default directory of the last good configuration (`--state-dir`).
pub const DEFAULT_STATE_DIR: &str = "/var/lib/imds-agent";

#[derive(Args, Debug)]
struct StateDirArg {
    /// Directory in which the last good configuration is stored
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
}

impl StateDirArg {
    fn store(self) -> LastGoodStore {
        LastGoodStore::new(self.state_dir)
    }
}

#[derive(Debug)]
enum Failure {
    /// The arguments or the configuration are invalid; exit code 2.
    Usage(anyhow::Error),
    /// The command failed, or is not possible on this machine; exit code 1.
    Failed(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Exit code of a failed check: `status` found a problem or nothing loaded, `verify` a check that failed, or `doctor` a
/// missing feature.
const EXIT_CHECK_FAILED: u8 = 3;

/// Runs a command and returns its exit code.
pub fn main(cli: Cli) -> ExitCode {
    let level = cli.log.log_level.map(LogLevel::filter);
    // Only `run` must not block on the reader of its standard error. The other commands may.
    let is_queued = matches!(cli.command, Command::Run(_));
    if let Err(error) = logging::init(LogOptions { format: cli.log.log_format, level, is_queued }) {
        return report(1, &anyhow::Error::from(error).context("failed to start the log thread"));
    }
    let code = run(cli.command);
    logging::flush();
    code
}

fn run(command: Command) -> ExitCode {
    let runtime = match runtime().context("failed to start the runtime") {
        Ok(runtime) => runtime,
        Err(error) => return report(1, &error),
    };
    let outcome = runtime.block_on(async {
        match command {
            Command::Run(args) => Box::pin(run::run(args)).await,
            Command::Status(args) => checks::status(args).await,
            Command::Doctor(args) => checks::doctor(args).await,
            Command::Verify(args) => checks::verify(args).await,
            Command::Top(args) => top::top(args).await,
            Command::Report(args) => report::report(&args).await,
            Command::Events(args) => events::events(&args),
            Command::Config(args) => config::config(&args),
            Command::Completions(args) => manual::completions(&args),
            Command::Man(args) => manual::man(&args),
            Command::Unload(args) => unload::unload(args).await,
        }
    });
    match outcome {
        Ok(code) => code,
        Err(Failure::Usage(error)) => report(2, &error),
        Err(Failure::Failed(error)) => report(1, &error),
    }
}

/// Builds the runtime of all commands.
///
/// tokio panics if it can't open the socket pair for signals (`signal/unix.rs`). Descriptors that are opened and closed first
/// turn a limit of open files that is too low into an error.
fn runtime() -> io::Result<Runtime> {
    // One each for epoll and eventfd, two for the socket pair, and one for its copy in the runtime.
    const PAIRS: usize = 3;
    let spare = (0..PAIRS).map(|_| UnixStream::pair()).collect::<io::Result<Vec<_>>>()?;
    drop(spare);
    Builder::new_current_thread().enable_all().build()
}

/// Returns the advice for an error that the limit of open files has caused.
fn advice(error: &str, limit: Option<u64>) -> String {
    // The texts of EMFILE, in contrast to those of ENFILE, by std and by nix.
    if !error.contains("Too many open files (os error") && !error.contains("EMFILE: Too many open files") {
        return String::new();
    }
    let limit = limit.map(|limit| format!(", which is {limit},")).unwrap_or_default();
    format!("; raise the limit of open files{limit} with `ulimit -n`, or LimitNOFILE= in a systemd unit")
}

/// Writes the error on one line. The log of the BPF verifier, if the error quotes it, follows unchanged.
fn report(code: u8, error: &anyhow::Error) -> ExitCode {
    let denied = error.chain().find_map(|cause| confinement::explain(cause.downcast_ref::<io::Error>()?));
    let denied = denied.map(|reason| format!("; the {reason}")).unwrap_or_default();
    let error = format!("{error:#}");
    let limit = getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft);
    // The advice belongs to the first line, because the log of the verifier has further ones.
    let (first, rest) =
        error.split_once('\n').map_or((&*error, String::new()), |(first, rest)| (first, format!("\n{rest}")));
    logging::write_final_error(&format!("imds-agent: {first}{}{denied}{rest}", advice(first, limit)));
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_for_the_limit_of_open_files() {
        let text = |errno| format!("failed to open x: {}", io::Error::from_raw_os_error(errno));
        let expected = "; raise the limit of open files, which is 7, with `ulimit -n`, or LimitNOFILE= in a systemd unit";
        assert_eq!(advice(&text(libc::EMFILE), Some(7)), expected);
        assert_eq!(advice(&nix::Error::EMFILE.to_string(), Some(7)), expected);
        assert_eq!(advice(&text(libc::ENFILE), Some(7)), "");
        assert_eq!(advice(&nix::Error::ENFILE.to_string(), Some(7)), "");
        assert_eq!(advice(&text(libc::ENOENT), Some(7)), "");
    }
}
