//! `imds-agent verify`: checks with test packets that pods are denied, and that exempt pods and the node are not.
//!
//! Test packets pass the programs, routes and rules of the node. The last hook (a TC program at the egress of each NIC, after
//! the agent's) counts and drops them. If another program runs before the last hook, `verify` sends no packets to it.

mod attached;
mod exits;
mod fixture;
mod forwarding;
mod frames;
mod host_calls;
mod last_hook;
mod node_allow_calls;
mod node_calls;
mod path_checks;
mod pod_calls;
mod probes;
mod routes;
mod sink_filter;
mod syscalls;
mod tc;
mod verify_report;

use std::{io, path::PathBuf, pin::pin, time::Duration};

use aya::maps::MapError;
use imds_ebpf_common::{
    Hook, Mode, TcHook,
    names::{MAP_ENDPOINTS, MAP_POLICY},
};
use thiserror::Error;
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep},
};

pub(crate) use self::verify_report::{Outcome, VerifyCheck, VerifyReport};
use self::{
    fixture::{LoopbackTap, TestDevice, TestPod},
    path_checks::Paths,
    probes::Probes,
    verify_report::{Skip, is_passed},
};
use crate::{
    config::{Hooks, endpoint_set::Endpoint},
    datapath::{
        DatapathError,
        maps::endpoint_maps,
        object::{Maps, ObjectError},
        pin::dir::PinDir,
    },
    node::netlink::{Netlink, NetlinkError},
    telemetry::status::{self, State},
    version::VERSION,
};

/// Schema version of the JSON output. Removed and changed fields increase it.
const SCHEMA: u32 = 1;
/// Hook name of checks of a whole path through the node.
const PATH: &str = "path";
/// Limit for a starting agent to reconcile every interface.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Limit for an agent to attach to new interfaces.
const ATTACH_DELAY: Duration = Duration::from_secs(5);
/// Limit for the end of another run.
const LOCK_TIMEOUT: Duration = Duration::from_mins(2);
/// Limit for a test packet to be counted. A busy machine can need seconds to handle it.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Delay between two reads of counters.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Debug, Error)]
pub(crate) enum VerifyError {
    #[error("nothing is loaded at {}: start `imds-agent run`, or set the --pin-dir of the running agent", .0.display())]
    Unloaded(PathBuf),
    #[error("failed to create a network namespace, which needs CAP_SYS_ADMIN")]
    Namespace(#[source] io::Error),
    #[error("this node has no uplink: no route leads to an endpoint")]
    NoExit,
    /// Another program decides on test packets before the last hook.
    #[error("another program runs before the last hook at {0}, and can send test packets out of the machine")]
    Bypassed(String),
    #[error("failed to {operation} {subject}")]
    Io {
        /// Operation, such as `open`.
        operation: &'static str,
        /// Object of the operation, such as `a socket`.
        subject: String,
        source: io::Error,
    },
    #[error("failed to use the map {map}")]
    Map { map: &'static str, source: MapError },
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error("another `imds-agent verify` runs on this node")]
    Locked,
    #[error("interrupted; all test devices are removed")]
    Interrupted,
}

impl VerifyError {
    fn io(operation: &'static str, subject: &str) -> impl FnOnce(io::Error) -> Self {
        let subject = subject.to_owned();
        move |source| Self::Io { operation, subject, source }
    }

    /// Formats the error with its causes on one line.
    fn in_full(self) -> String {
        format!("{:#}", anyhow::Error::from(self))
    }
}

impl From<ObjectError> for VerifyError {
    fn from(error: ObjectError) -> Self {
        Self::Datapath(error.into())
    }
}

/// Effective configuration of the kernel, and the maps for test senders.
struct Enforced {
    pins: PinDir,
    maps: Maps,
    probes: Probes,
    mode: Mode,
    hooks: Hooks,
    endpoints: Vec<Endpoint>,
    status: status::StatusReport,
}

/// Runs all checks. All test devices, routes and map entries are removed when this returns.
pub(crate) async fn verify(pins: &PinDir, netlink: &Netlink) -> Result<VerifyReport, VerifyError> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(VerifyError::io("listen for", "SIGINT"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(VerifyError::io("listen for", "SIGTERM"))?;
    let interrupted = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let mut interrupted = pin!(interrupted);
    let start = async { Ok::<_, VerifyError>((lock().await?, Enforced::read(pins, netlink).await?)) };
    let (_lock, enforced) = tokio::select! {
        started = start => started?,
        () = &mut interrupted => return Err(VerifyError::Interrupted),
    };
    let mut fixture = Fixture::new(&enforced, netlink).await?;
    let checks = tokio::select! {
        checks = fixture.check(&enforced, netlink) => checks,
        () = &mut interrupted => Err(VerifyError::Interrupted),
    };
    fixture.remove(netlink).await?;
    let checks = checks?;
    Ok(VerifyReport {
        schema: SCHEMA,
        version: VERSION,
        pin_dir: pins.root().to_owned(),
        mode: enforced.mode.name(),
        passed: is_passed(&checks),
        checks,
    })
}

/// Waits until no other run is in this network namespace. The kernel ends the lock with the process.
async fn lock() -> Result<UnixListener, VerifyError> {
    let start = Instant::now();
    loop {
        // The leading zero byte makes the name an abstract one. Each network namespace has its own abstract names.
        match UnixListener::bind("\0imds-agent-verify") {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && start.elapsed() < LOCK_TIMEOUT => {
                sleep(POLL_INTERVAL).await;
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(VerifyError::Locked),
            lock => return lock.map_err(VerifyError::io("bind", "the lock's socket")),
        }
    }
}

impl Enforced {
    /// Reads the effective configuration once the agent has reconciled all interfaces.
    async fn read(pins: &PinDir, netlink: &Netlink) -> Result<Self, VerifyError> {
        let start = Instant::now();
        let mut status = status::gather(pins, netlink).await?;
        while status.agent.running && start.elapsed() < settle_timeout(&status) {
            sleep(POLL_INTERVAL).await;
            status = status::gather(pins, netlink).await?;
        }
        if status.state == State::Unloaded {
            return Err(VerifyError::Unloaded(pins.root().to_owned()));
        }
        let maps = Maps::open(pins)?;
        let unreadable = |map| move |source| VerifyError::Map { map, source };
        let policy = maps.policy.get(&0, 0).map_err(unreadable(MAP_POLICY))?;
        Ok(Self {
            pins: pins.clone(),
            mode: Mode::from_u32(policy.mode),
            hooks: Hooks::from_bits(policy.hooks),
            endpoints: endpoint_maps::read(&maps).map_err(unreadable(MAP_ENDPOINTS))?,
            probes: Probes::open(pins)?,
            maps,
            status,
        })
    }
}

struct Fixture {
    pod: Result<TestPod, Skip>,
    paths: Paths,
}

impl Fixture {
    async fn new(enforced: &Enforced, netlink: &Netlink) -> Result<Self, VerifyError> {
        let mut paths = Paths::new(enforced, netlink).await?;
        let pod = match TestPod::new(netlink).await {
            // A container may lack the right to create one.
            Err(error @ VerifyError::Namespace(_)) => Err(Skip::new(error.in_full())),
            Err(error) => {
                paths.remove(netlink).await?;
                return Err(error);
            }
            Ok(pod) => Ok(pod),
        };
        Ok(Self { pod, paths })
    }

    async fn remove(mut self, netlink: &Netlink) -> Result<(), VerifyError> {
        let removed = self.paths.remove(netlink).await;
        if let Ok(pod) = self.pod {
            pod.remove(netlink).await?;
        }
        removed
    }

    async fn check(
        &mut self,
        enforced: &Enforced,
        netlink: &Netlink,
    ) -> Result<Vec<VerifyCheck>, VerifyError> {
        let mut checks = Vec::new();
        if enforced.endpoints.is_empty() {
            checks.push(VerifyCheck::new("-", "an endpoint is protected", "no endpoint is", Outcome::Failed));
        }
        for hook in TcHook::ALL.into_iter().filter(|hook| enforced.hooks.contains(hook.hook())) {
            checks.push(attached::check(hook, &enforced.status, &self.paths.excluded));
            checks.extend(enforced.check_tc(hook, &self.pod, netlink).await?);
        }
        if enforced.hooks.contains(Hook::Socket) {
            checks.extend(pod_calls::check(enforced, &self.pod)?);
        }
        if enforced.hooks.contains(Hook::HostNetwork) {
            checks.extend(host_calls::check(enforced)?);
        }
        if enforced.hooks.contains(Hook::NodeAllow) {
            checks.extend(node_allow_calls::check(enforced)?);
        }
        checks.extend(self.paths.check(enforced, netlink, &self.pod).await?);
        Ok(checks)
    }
}

impl Enforced {
    async fn check_tc(
        &self,
        hook: TcHook,
        pod: &Result<TestPod, Skip>,
        netlink: &Netlink,
    ) -> Result<Vec<VerifyCheck>, VerifyError> {
        let tap = match hook {
            TcHook::FromPod => None,
            TcHook::NodeEgress => Some(LoopbackTap::new(netlink).await),
        };
        let device: Result<&dyn TestDevice, Skip> = match (&tap, pod) {
            (Some(Ok(tap)), _) => Ok(tap),
            (None, Ok(pod)) => match pod.obstacle() {
                Some(skip) => Err(skip),
                None => Ok(pod),
            },
            (Some(Err(skip)), _) | (None, Err(skip)) => Err(skip.clone()),
        };
        let is_followed = self.status.agent.running;
        tc::check(hook, device, &self.endpoints, &self.maps, &self.probes, is_followed).await
    }
}

/// Returns the limit for a running agent to reconcile new interfaces.
fn settle_timeout(status: &status::StatusReport) -> Duration {
    match status.interfaces.iter().all(status::Interface::is_attached) {
        _ if !status.agent.ready => START_TIMEOUT,
        true => Duration::ZERO,
        false => ATTACH_DELAY,
    }
}
