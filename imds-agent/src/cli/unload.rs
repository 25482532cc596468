//! `imds-agent unload`: ends enforcement and prints the progress.

use std::{
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
            dir::{PinDir, PinError},
            lock::{self, UNPINNED},
        },
    },
    diagnose::preflight,
    kube::{ClusterClient, cluster::ApiConfig},
    node::netlink::Netlink,
};

const PROGRESS: Duration = Duration::from_secs(1);
/// Longest time for a request to the API server. The unload is complete before it.
const CONDITION_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Args, Debug)]
pub(super) struct UnloadArgs {
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
    let pins = PinDir::new(&args.pins.pin_dir)?;
    let netlink = Netlink::connect()?;
    let links = netlink.links().await?;
    let (mut reported, mut is_off) = (Instant::now(), false);
    let progress = |progress| match progress {
        Progress::PolicyOff => is_off = true,
        Progress::AskedAgent(pid) => {
            let pid = pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
            eprintln!("waiting for the running agent{pid} to release {}", args.pins.pin_dir.display());
        }
        Progress::Detached(done, all) if reported.elapsed() >= PROGRESS => {
            eprintln!("detached {done} of {all} links; all packets pass");
            reported = Instant::now();
        }
        Progress::Detached(..) => {}
    };
    let reported_node = reported_node(&pins);
    let unload_command = if args.pins.pin_dir == Path::new(DEFAULT_PIN_DIR) {
        "imds-agent unload".to_owned()
    } else {
        format!("imds-agent unload --pin-dir {}", pins.root().display())
    };
    let failed = |reason: String, pid| {
        let remedy = stop_command(pid, &unload_command);
        Failure::Failed(anyhow!("failed to unload: {reason}. Stop the agent first: {remedy}"))
    };
    match datapath::unload(&pins, &netlink, &links, Duration::from_secs(args.timeout), progress).await {
        Ok(removed) => {
            if removed.pin_dir.is_none()
                && let Some(agent) = lock::unpinned_agent()?
            {
                return Err(failed(UNPINNED.to_owned(), agent.pid));
            }
            print(&pins, &removed);
        }
        Err(DatapathError::Pin(error @ PinError::NotReleased { pid, .. })) => {
            let policy = if is_off { "; all packets pass already" } else { "" };
            return Err(failed(format!("{error}{policy}"), pid));
        }
        Err(error) => return Err(error.into()),
    }
    // A later start must not bring back exemptions of this installation.
    args.state.store().remove()?;
    if let Some(api) = reported_node {
        withdraw_protection(api).await;
    }
    if let Some(terminate) = &mut terminate {
        terminate.recv().await;
    }
    Ok(ExitCode::SUCCESS)
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
async fn withdraw_protection(api: ApiConfig) {
    let mut client = ClusterClient::new(api);
    let result = timeout(CONDITION_TIMEOUT, report_unloaded(&mut client)).await;
    let error = match result {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the API server did not answer within {CONDITION_TIMEOUT:?}"),
    };
    eprintln!("failed to set the condition MetadataProtected of node {} to False: {error}", client.node());
}

fn print(pins: &PinDir, removed: &Removed) {
    let Some(pin_dir) = &removed.pin_dir else {
        println!("nothing is loaded at {}", pins.root().display());
        return;
    };
    let sockets = if removed.sockets { ", and sockets" } else { "" };
    println!(
        "removed {} (enforced until now: {} interfaces{sockets})",
        pin_dir.display(),
        removed.interfaces.len()
    );
    for path in &removed.left {
        eprintln!(
            "left {}: the agent did not create it, and does not start while it is there",
            path.display()
        );
    }
    if let Some(pid) = removed.agent {
        println!("the agent (pid {pid}) keeps running but no longer enforces; restart it to enforce again");
    }
}
