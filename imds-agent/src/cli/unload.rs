//! `imds-agent unload`: ends enforcement and prints the progress.

use std::{
    fmt, io,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use clap::Args;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::timeout,
};

use super::{DEFAULT_PIN_DIR, Failure, PinDirArg, StateDirArg, stop_command::stop_command};
use crate::{
    config::{Config, Environment},
    controller::node_report::report_unloaded,
    datapath::{
        self, DatapathError, Progress, Removed,
        maps::config_record,
        pin::{
            agents,
            dir::{PinDir, PinError, pid_phrase},
            lock::{self, UNPINNED},
        },
    },
    diagnose::preflight,
    kube::{ClusterClient, cluster::ApiConfig},
    node::{link::Link, netlink::Netlink},
};

const PROGRESS: Duration = Duration::from_secs(1);
/// Longest time for a request to the API server. The unload is complete before it.
const CONDITION_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Args, Debug)]
pub(super) struct UnloadArgs {
    /// Unload every pin directory of this node whose agent has stopped, and leave those of running agents
    #[arg(long, conflicts_with_all = ["wait", "timeout"])]
    stopped: bool,
    /// Wait for SIGTERM after the unload, so that a service manager or the kubelet does not start the process again
    #[arg(long)]
    wait: bool,
    /// Limit in seconds for a running agent to release the pin directory
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(0..=3600))]
    timeout: u64,
    #[command(flatten)]
    state: StateDirArg,
    #[command(flatten)]
    pins: PinDirArg,
}

pub(super) async fn unload(args: UnloadArgs) -> Result<ExitCode, Failure> {
    preflight::check_capabilities()?;
    let terminate = args.wait.then(|| signal(SignalKind::terminate()));
    let mut terminate = terminate.transpose().context("failed to listen for SIGTERM")?;
    let netlink = Netlink::connect()?;
    let node = Node { links: netlink.links().await?, netlink };
    let pins = PinDir::new(&args.pins.pin_dir)?;
    let is_complete = if args.stopped {
        node.unload_stopped(&pins).await?
    } else {
        node.unload(&pins, Duration::from_secs(args.timeout)).await?;
        true
    };
    if is_complete {
        // A later start must not bring back exemptions of this installation.
        args.state.store().remove()?;
    }
    if let Some(terminate) = &mut terminate {
        terminate.recv().await;
    }
    Ok(ExitCode::SUCCESS)
}

/// Interfaces of this network namespace, from which programs are removed.
struct Node {
    netlink: Netlink,
    links: Vec<Link>,
}

impl Node {
    /// Unloads one pin directory. Asks a running agent to release it.
    async fn unload(&self, pins: &PinDir, timeout: Duration) -> Result<(), Failure> {
        let reported_node = reported_node(pins);
        let unload_command = if pins.root() == Path::new(DEFAULT_PIN_DIR) {
            "imds-agent unload".to_owned()
        } else {
            format!("imds-agent unload --pin-dir {}", pins.root().display())
        };
        let failed = |reason: String, pid| {
            let remedy = stop_command(pid, &unload_command);
            Failure::Failed(anyhow!("failed to unload: {reason}. Stop the agent first: {remedy}"))
        };
        let mut printer = ProgressPrinter::new(pins);
        let progress = |progress| printer.print(progress);
        match datapath::unload(pins, &self.netlink, &self.links, timeout, progress).await {
            Ok(removed) => {
                if removed.pin_dir.is_none()
                    && let Some(agent) = lock::unpinned_agent()?
                {
                    return Err(failed(UNPINNED.to_owned(), agent.pid));
                }
                print(pins, &removed);
            }
            Err(DatapathError::Pin(error @ PinError::NotReleased { pid, .. })) => {
                let policy = if printer.is_off { "; all packets pass already" } else { "" };
                return Err(failed(format!("{error}{policy}"), pid));
            }
            Err(error) => return Err(error.into()),
        }
        withdraw_protection(reported_node).await;
        Ok(())
    }

    /// Unloads `named` and the other pin directories of this node, except those of running agents. Reports whether no agent
    /// runs.
    async fn unload_stopped(&self, named: &PinDir) -> Result<bool, Failure> {
        let others = agents::other_pin_dirs(named);
        let (mut is_complete, mut failures) = (lock::unpinned_agent()?.is_none(), Vec::new());
        for pins in [named].into_iter().chain(&others) {
            let reported_node = reported_node(pins);
            let mut printer = ProgressPrinter::new(pins);
            let progress = |progress| printer.print(progress);
            match datapath::unload_stopped(pins, &self.netlink, &self.links, progress).await {
                Ok(Some(removed)) => {
                    print(pins, &removed);
                    if removed.pin_dir.is_some() {
                        withdraw_protection(reported_node).await;
                    }
                }
                Ok(None) => {
                    is_complete = false;
                    let owner = pins.lock_owner()?.and_then(|owner| owner.pid);
                    let pid = pid_phrase(owner);
                    write_progress(
                        io::stdout(),
                        format_args!("left {}: its agent{pid} is running", pins.root().display()),
                    );
                }
                Err(error) => failures.push(error),
            }
        }
        let Some(last) = failures.pop() else { return Ok(is_complete) };
        for error in failures {
            write_progress(io::stderr(), format_args!("{:#}", anyhow::Error::from(error)));
        }
        Err(last.into())
    }
}

/// Printer of the progress of one pin directory.
struct ProgressPrinter<'a> {
    pins: &'a PinDir,
    reported: Instant,
    /// True once all packets pass.
    is_off: bool,
}

impl<'a> ProgressPrinter<'a> {
    fn new(pins: &'a PinDir) -> Self {
        Self { pins, reported: Instant::now(), is_off: false }
    }

    fn print(&mut self, progress: Progress) {
        match progress {
            Progress::PolicyOff => self.is_off = true,
            Progress::AskedAgent(pid) => {
                let pid = pid_phrase(pid);
                let path = self.pins.root().display();
                write_progress(
                    io::stderr(),
                    format_args!("waiting for the running agent{pid} to release {path}"),
                );
            }
            Progress::Detached(done, all) if self.reported.elapsed() >= PROGRESS => {
                write_progress(
                    io::stderr(),
                    format_args!("detached {done} of {all} links; all packets pass"),
                );
                self.reported = Instant::now();
            }
            Progress::Detached(..) => {}
        }
    }
}

/// Returns the node whose condition the recorded configuration reports.
fn reported_node(pins: &PinDir) -> Option<ApiConfig> {
    let record = config_record::pinned(pins)?;
    let kubernetes = Config::parse(&record.text, Path::new("")).ok()?.kubernetes;
    let environment = Environment::read();
    let access = kubernetes.access(&environment).filter(|_| kubernetes.node_condition)?;
    Some(ApiConfig { access, node: kubernetes.node_name(&environment) })
}

/// Ends the claim of the node's condition that pods are denied.
async fn withdraw_protection(node: Option<ApiConfig>) {
    let Some(api) = node else { return };
    let mut client = ClusterClient::new(api);
    let result = timeout(CONDITION_TIMEOUT, report_unloaded(&mut client)).await;
    let error = match result {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the API server did not answer within {CONDITION_TIMEOUT:?}"),
    };
    let node = client.node();
    write_progress(
        io::stderr(),
        format_args!("failed to set the condition MetadataProtected of node {node} to False: {error}"),
    );
}

fn print(pins: &PinDir, removed: &Removed) {
    let Some(pin_dir) = &removed.pin_dir else {
        return write_progress(io::stdout(), format_args!("nothing is loaded at {}", pins.root().display()));
    };
    let sockets = if removed.sockets { ", and sockets" } else { "" };
    let (path, interfaces) = (pin_dir.display(), removed.interfaces.len());
    let text = format_args!("removed {path} (enforced until now: {interfaces} interfaces{sockets})");
    write_progress(io::stdout(), text);
    for path in &removed.left {
        let path = path.display();
        let text =
            format_args!("left {path}: the agent did not create it, and does not start while it is there");
        write_progress(io::stderr(), text);
    }
    if let Some(pid) = removed.agent {
        let text = format_args!(
            "the agent (pid {pid}) keeps running but no longer enforces; restart it to enforce again"
        );
        write_progress(io::stdout(), text);
    }
}

/// Writes a line. Ignores a closed pipe and a full disk, which must not end the command before its work is done.
fn write_progress(mut output: impl io::Write, line: fmt::Arguments<'_>) {
    let _ = writeln!(output, "{line}");
}
