//! The command line.

mod config;
mod config_summary;
mod doctor;
mod events;
mod manual;
mod output;
mod report;
mod run;
mod status;
mod stop_command;
mod top;
mod unload;
mod verify;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand, ValueEnum};
use log::LevelFilter;

use crate::{
    last_good::LastGoodStore,
    logging::{self, LogFormat, LogOptions},
    version,
};

/// Where maps, programs and links are pinned unless the user says otherwise.
pub const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/imds";

/// Keeps pods and containers away from the cloud instance metadata service (169.254.169.254).
///
/// What `run` puts into the kernel stays in force when the agent stops, is killed or upgraded; `unload` removes it.
///
/// Exit status: 0 done, 1 failure, 2 a command line or configuration that can't be used, 3 `status` found that
/// something is not enforced, `verify` that something does not hold, or `doctor` that something is missing.
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
    /// Form of the log on standard error. Lines have a priority instead of time and level if that is the journal of systemd
    #[arg(long, global = true, value_name = "FORMAT", value_enum, default_value_t)]
    log_format: LogFormat,
    /// Least severe level that is logged. It wins over `RUST_LOG`, whose filters can also name modules and libraries
    /// (`info,imds_agent::kube=debug,hyper=debug`). Without both: info
    #[arg(long, global = true, value_name = "LEVEL", value_enum)]
    log_level: Option<LogLevel>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogLevel {
    /// Failures
    Error,
    /// Also changes by other programs, and limitations
    Warn,
    /// Also changes of configuration, pods and interfaces
    Info,
    /// Also each interface and attachment of a resync
    Debug,
    /// Everything
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
    /// Protect this node, and follow its pods as they come and go
    Run(run::RunArgs),
    /// Show what is guarded how, and what is not
    Status(output::OutputArgs),
    /// Follow what is denied, as it happens; what came last while nobody followed comes first
    Events(events::EventsArgs),
    /// Watch pods, verdicts per second and what was denied last, in a terminal
    Top(top::TopArgs),
    /// List who was denied what, or would have been in audit mode, and the rules that would exempt them
    Report(report::ReportArgs),
    /// Say what works here and what does not, and what to do; nothing is changed
    Doctor(output::OutputArgs),
    /// Prove on this node that pods are denied and the node is not
    Verify(output::OutputArgs),
    /// Check a configuration file, or show the configuration in force
    Config(config::ConfigArgs),
    /// Remove every program, link, map and pin, and the last good configuration
    Unload(unload::UnloadArgs),
    /// Write a script for a shell that completes this command line
    Completions(manual::CompletionsArgs),
    /// Write manual pages
    Man(manual::ManArgs),
}

#[derive(Args, Debug)]
struct PinDirArg {
    /// Directory on a bpffs in which everything is pinned
    #[arg(long, value_name = "DIR", default_value = DEFAULT_PIN_DIR)]
    pin_dir: PathBuf,
}

/// Directory of the last good configuration unless the user names another one.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/imds-agent";

#[derive(Args, Debug)]
struct StateDirArg {
    /// Directory of the last good configuration
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
}

impl StateDirArg {
    fn store(self) -> LastGoodStore {
        LastGoodStore::new(self.state_dir)
    }
}

/// Why a command ends early.
#[derive(Debug)]
enum Failure {
    /// What the user gave can't be used.
    Usage(anyhow::Error),
    /// It can't be done here, or failed.
    Failed(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// A check whose answer is no: `status` with something unenforced, `verify` with something that does not hold,
/// `doctor` with something that is missing.
const NOT_HELD: u8 = 3;

/// Carries out a command.
#[must_use]
pub fn main(cli: Cli) -> ExitCode {
    let level = cli.log.log_level.map(LogLevel::filter);
    // The other commands may wait for the process that reads their output.
    let is_queued = matches!(cli.command, Command::Run(_));
    if let Err(error) = logging::init(LogOptions { format: cli.log.log_format, level, is_queued }) {
        return report(1, &anyhow::Error::from(error).context("failed to start the thread of the log"));
    }
    let code = run(cli.command);
    logging::flush();
    code
}

fn run(command: Command) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(1, &error.into()),
    };
    let outcome = runtime.block_on(async {
        match command {
            Command::Run(args) => Box::pin(run::run(args)).await,
            Command::Status(args) => status::status(args).await,
            Command::Doctor(args) => doctor::doctor(args).await,
            Command::Verify(args) => verify::verify(args).await,
            Command::Top(args) => top::top(args).await,
            Command::Report(args) => report::report(&args),
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

/// Says on one line what is wrong. A verifier's log comes after it, as it is.
fn report(code: u8, error: &anyhow::Error) -> ExitCode {
    logging::write_last_words(&format!("imds-agent: {error:#}"));
    ExitCode::from(code)
}
