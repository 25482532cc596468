//! `imds-agent run`.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, anyhow};
use clap::{Args, ValueEnum};
use futures_util::StreamExt as _;
use imds_ebpf_common::{Backend, Edge, Hook};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval_at},
};

use super::{Failure, PinDirArg};
use crate::{
    config::{Config, Hooks},
    datapath::{Datapath, DatapathError, Plan, bpf, pins::PinDir},
    guard::Guard,
    node::{
        cgroup,
        kubepods::Kubepods,
        netlink::{Event, Netlink},
        netns::{self, Identity},
    },
    preflight,
    provider::{DMI_DIR, Dmi},
};

#[derive(Args, Debug)]
pub(super) struct RunArgs {
    /// Configuration file (TOML); without one, all defaults
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Attach to the pods that are there, then exit; what is attached stays in force
    #[arg(long)]
    once: bool,
    /// How programs are attached to interfaces
    #[arg(long, value_enum, default_value_t = TcBackend::Auto)]
    tc_backend: TcBackend,
    /// Seconds between two looks at everything, for what the kernel sends no event of
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    resync: u64,
    /// cgroup v2 below which sockets are guarded; without it, the root of the hierarchy
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Directory of the files by which `provider = "auto"` tells the provider
    #[arg(long, value_name = "DIR", default_value = DMI_DIR, hide = true)]
    dmi_dir: PathBuf,
    #[command(flatten)]
    pins: PinDirArg,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum TcBackend {
    /// TCX where the kernel has it, clsact otherwise
    Auto,
    /// TCX links (Linux 6.6 and newer)
    Tcx,
    /// Filters on the clsact qdisc
    Clsact,
}

impl TcBackend {
    fn choose(self) -> anyhow::Result<Backend> {
        match (self, bpf::has_tcx()) {
            (Self::Auto | Self::Tcx, true) => Ok(Backend::Tcx),
            (Self::Auto, false) | (Self::Clsact, _) => Ok(Backend::Clsact),
            (Self::Tcx, false) => {
                Err(anyhow!("this kernel has no TCX (Linux 6.6); use --tc-backend clsact or auto"))
            }
        }
    }
}

pub(super) async fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    let config = match &args.config {
        Some(path) => Config::load(path).map_err(|error| Failure::Usage(error.into()))?,
        None => Config::default(),
    };
    let guarded =
        config.endpoints.resolve(&Dmi::read(&args.dmi_dir)).map_err(|error| Failure::Usage(error.into()))?;
    preflight::check_capabilities()?;
    preflight::lift_limits()?;
    preflight::check_kernel()?;
    let cgroup = cgroup(config.hooks, args.cgroup)?;
    let plan = Plan {
        mode: config.mode,
        answer: config.answer,
        hooks: config.hooks,
        backend: args.tc_backend.choose()?,
        cgroup: cgroup.clone().filter(|_| config.hooks.has(Hook::Socket)),
        identity: identity(config.hooks)?,
    };
    let claim = PinDir::new(&args.pins.pin_dir)?.claim()?;

    // Listening comes before the first look, so that nothing falls between the two.
    let mut events = Netlink::events(plan.backend == Backend::Clsact, guarded.ipv4())?;
    let netlink = Netlink::connect()?.with_endpoints(guarded.ipv4());
    let datapath = Datapath::open(claim, &plan, &guarded, netlink.clone())?;
    match datapath.diagnostics() {
        Ok(diagnostics) => drop(tokio::spawn(async {
            log::warn!("the BPF programs' own log is no longer followed: {}", diagnostics.follow().await);
        })),
        Err(error) => log::warn!("{:#}", anyhow::Error::from(error)),
    }
    let kubepods = cgroup.filter(|_| config.hooks.has(Hook::Host)).map(Kubepods::new);
    let mut guard = Guard::new(datapath, netlink, config.interfaces, kubepods);
    guard.resync().await?;
    log::info!(
        "mode {}: {} pod and {} node interfaces guarded by {}, sockets {}, provider {}, {} endpoint{}, pins in {}",
        plan.mode.name(),
        guard.wanted(Edge::Pod).count(),
        guard.wanted(Edge::Node).count(),
        plan.backend.name(),
        if plan.cgroup.is_some() { "too" } else { "not" },
        guarded.provider(),
        guarded.endpoints().len(),
        if guarded.endpoints().len() == 1 { "" } else { "s" },
        args.pins.pin_dir.display(),
    );
    if args.once {
        let failures: Vec<_> = guard.failures().map(|(name, failure)| format!("{name}: {failure}")).collect();
        return if failures.is_empty() {
            Ok(ExitCode::SUCCESS)
        } else {
            Err(Failure::Failed(anyhow!("not everything is guarded: {}", failures.join("; "))))
        };
    }

    let mut terminate = signal(SignalKind::terminate()).context("can't listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("can't listen for SIGINT")?;
    let period = Duration::from_secs(args.resync);
    let mut timer = interval_at(Instant::now() + period, period);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = events.next() => {
                let event = event.context("lost the connection to rtnetlink: pods can't be followed")?;
                attempt(&mut guard, Some(event)).await;
            }
            () = guard.kubepods_changed() => report(guard.follow_kubepods()),
            _ = timer.tick() => attempt(&mut guard, None).await,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    log::info!("stopping; what is attached stays in force until `imds-agent unload`");
    Ok(ExitCode::SUCCESS)
}

/// The cgroup below which sockets are guarded, where a hook is on that does.
fn cgroup(hooks: Hooks, chosen: Option<PathBuf>) -> anyhow::Result<Option<PathBuf>> {
    if !judges_by_cgroup(hooks) {
        return Ok(None);
    }
    let root = || cgroup::root().context("can't read the mounts").transpose();
    let missing =
        || anyhow!("no cgroup v2 hierarchy is mounted: name one by --cgroup, or set {}", switch_off(hooks));
    chosen.map(Ok).or_else(root).unwrap_or_else(|| Err(missing())).map(Some)
}

/// How the programs know the node. Which sockets are the node's own must be known where sockets are judged.
fn identity(hooks: Hooks) -> anyhow::Result<Identity> {
    match netns::identity().context("can't tell this network namespace's cookie")? {
        Some(identity) => Ok(identity),
        None if !judges_by_cgroup(hooks) => Ok(Identity::Initial),
        None => Err(anyhow!(
            "this kernel (before Linux 5.14) has no cookie for a network namespace that is not the initial one: set {}",
            switch_off(hooks)
        )),
    }
}

fn judges_by_cgroup(hooks: Hooks) -> bool {
    hooks.has(Hook::Socket) || hooks.has(Hook::Host)
}

/// How to do without what judges by cgroup.
fn switch_off(hooks: Hooks) -> String {
    let on = [Hook::Socket, Hook::Host].into_iter().filter(|&hook| hooks.has(hook));
    on.map(|hook| format!("hooks.{} = false", hook.name())).collect::<Vec<_>>().join(" and ")
}

/// Takes in one event, or looks at everything. What fails is tried again with the next look at the latest.
async fn attempt(guard: &mut Guard, event: Option<Event>) {
    let result = match event {
        Some(event) => guard.handle(event).await,
        None => guard.resync().await,
    };
    report(result);
}

fn report(result: Result<(), DatapathError>) {
    if let Err(error) = result {
        log::error!("{:#}", anyhow::Error::from(error));
    }
}
