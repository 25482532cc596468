//! Proves what the guard does on this node: from a network namespace that is made for it, as from a pod, and from the
//! node.

mod calls;
mod edges;
mod hosts;
mod report;
mod sockets;
mod stage;
mod wire;

use std::{collections::BTreeSet, io, time::Duration};

use imds_ebpf_common::{Hook, Mode, TcHook};
use thiserror::Error;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep},
};

pub use self::report::{Check, Outcome, Report};
pub(crate) use self::stage::PREFIX;
use self::{
    edges::Obstacle,
    stage::{Device, Loop, Pod},
};
use crate::{
    config::Hooks,
    datapath::{
        DatapathError, endpoints,
        object::{Maps, ObjectError},
        pins::PinDir,
    },
    endpoints::Endpoint,
    node::netlink::{Netlink, NetlinkError},
    status::{self, State},
    version::VERSION,
};

/// Version of the JSON form: within one, fields are only added.
const SCHEMA: u32 = 1;
/// How long an agent that starts may take to look at every interface.
const STARTING: Duration = Duration::from_secs(15);
/// How long an interface that is new may be without its guard.
const SETTLING: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_millis(50);

/// Why nothing could be proven.
#[derive(Debug, Error)]
pub enum VerifyError {
    /// There is nothing to prove.
    #[error("nothing is loaded at {}: start `imds-agent run`, or name the --pin-dir of the one that runs", .0.display())]
    Unloaded(std::path::PathBuf),
    /// No network namespace could be made or entered.
    #[error("can't make a network namespace, which takes CAP_SYS_ADMIN: run this as root on the node itself")]
    Namespace(#[source] io::Error),
    /// A system call failed.
    #[error("can't {operation} {subject}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// With what.
        subject: String,
        /// What the system said.
        source: io::Error,
    },
    /// What is loaded can't be read.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// A request to rtnetlink.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The user wants no more of it.
    #[error("interrupted; what was made is removed")]
    Interrupted,
}

impl VerifyError {
    fn io(operation: &'static str, subject: &str) -> impl FnOnce(io::Error) -> Self {
        let subject = subject.to_owned();
        move |source| Self::Io { operation, subject, source }
    }
}

impl From<ObjectError> for VerifyError {
    fn from(error: ObjectError) -> Self {
        Self::Datapath(error.into())
    }
}

/// What is in force, as the proofs need it.
struct Guarding {
    pins: PinDir,
    maps: Maps,
    mode: Mode,
    hooks: Hooks,
    endpoints: Vec<Endpoint>,
    status: status::Report,
}

/// Proves it, or says what does not hold. What is made for that is gone when this returns.
pub async fn verify(pins: &PinDir, netlink: &Netlink) -> Result<Report, VerifyError> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(VerifyError::io("listen for", "SIGINT"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(VerifyError::io("listen for", "SIGTERM"))?;
    let guarding = Guarding::read(pins, netlink).await?;
    let pod = Pod::new(netlink).await?;
    let checks = tokio::select! {
        checks = guarding.prove(&pod, netlink) => checks,
        _ = interrupt.recv() => Err(VerifyError::Interrupted),
        _ = terminate.recv() => Err(VerifyError::Interrupted),
    };
    pod.remove(netlink).await?;
    let checks = checks?;
    Ok(Report {
        schema: SCHEMA,
        version: VERSION,
        pin_dir: pins.root().to_owned(),
        mode: guarding.mode.name(),
        held: checks.iter().all(|check| check.ok),
        checks,
    })
}

impl Guarding {
    /// What is in force, once an agent that starts is through with it.
    async fn read(pins: &PinDir, netlink: &Netlink) -> Result<Self, VerifyError> {
        let start = Instant::now();
        let mut status = status::gather(pins, netlink).await?;
        while status.agent.running && start.elapsed() < patience(&status) {
            sleep(INTERVAL).await;
            status = status::gather(pins, netlink).await?;
        }
        if status.state == State::Unloaded {
            return Err(VerifyError::Unloaded(pins.root().to_owned()));
        }
        let maps = Maps::open(pins)?;
        let unreadable = |source| DatapathError::Map { map: "imds_policy", source };
        let policy = maps.policy.get(&0, 0).map_err(unreadable)?;
        let entries = endpoints::read(&maps).map_err(unreadable)?;
        let mut entries: Vec<_> = entries.into_iter().collect();
        entries.sort_by_key(|(_, entry)| entry.id);
        let endpoints = entries.iter().map(|(address, entry)| Endpoint::from_entry(*address, entry));
        Ok(Self {
            pins: pins.clone(),
            mode: Mode::from_u32(policy.mode),
            hooks: Hooks::from_bits(policy.hooks),
            endpoints: endpoints.collect(),
            maps,
            status,
        })
    }

    async fn prove(&self, pod: &Pod, netlink: &Netlink) -> Result<Vec<Check>, VerifyError> {
        let mut checks = Vec::new();
        if self.endpoints.is_empty() {
            checks.push(Check::of_hook("-", "an endpoint is guarded", "none is", Outcome::Failed));
        }
        for edge in TcHook::ALL.into_iter().filter(|edge| self.hooks.has(edge.hook())) {
            checks.push(self.interfaces(edge));
            let made = match edge {
                TcHook::FromPod => None,
                TcHook::NodeEgress => Some(Loop::new(netlink).await.map_err(obstacle)),
            };
            let device: Result<&dyn Device, Obstacle> = match &made {
                None => Ok(pod),
                Some(Ok(device)) => Ok(device),
                Some(Err(obstacle)) => Err(obstacle.clone()),
            };
            let is_followed = self.status.agent.running;
            checks.extend(edges::prove(edge, device, &self.endpoints, &self.maps, is_followed).await);
        }
        if self.hooks.has(Hook::Socket) {
            checks.extend(sockets::prove(self, pod)?);
        }
        if self.hooks.has(Hook::HostNetwork) {
            checks.extend(hosts::prove(self));
        }
        checks.extend(sockets::prove_node(&self.endpoints));
        Ok(checks)
    }

    /// Whether the interfaces that are there are guarded at an edge, before all others.
    fn interfaces(&self, edge: TcHook) -> Check {
        let hook = edge.hook().name();
        let expected = "first at every interface";
        let mut interfaces = Vec::new();
        interfaces.extend(
            self.status
                .interfaces
                .iter()
                .filter_map(|interface| Some((interface, interface.attachment(hook)?))),
        );
        let not = |is_bad: fn(&status::HookAttachment) -> bool, what| {
            let names: BTreeSet<_> = interfaces
                .iter()
                .filter(|(_, attachment)| is_bad(attachment))
                .map(|(interface, _)| &*interface.name)
                .collect();
            let names: Vec<_> = names.into_iter().collect();
            (!names.is_empty()).then(|| format!("{} {what}", names.join(", ")))
        };
        let missing = not(|attachment| !attachment.is_attached(), "not enforced");
        let behind = not(|attachment| attachment.is_attached() && !attachment.is_enforced(), "not first");
        let wrong: Vec<_> = missing.into_iter().chain(behind).collect();
        if wrong.is_empty() {
            let found = format!("at {} of {0}", interfaces.len());
            return Check::of_hook(hook, expected, found, Outcome::Proven);
        }
        Check::of_hook(hook, expected, wrong.join("; "), Outcome::Failed)
    }
}

/// How long to wait for an agent that runs to be through with what is new.
fn patience(status: &status::Report) -> Duration {
    match status.interfaces.iter().all(status::Interface::is_attached) {
        _ if !status.agent.ready => STARTING,
        true => Duration::ZERO,
        false => SETTLING,
    }
}

/// An interface that can't be made proves nothing.
fn obstacle(error: VerifyError) -> Obstacle {
    (format!("{:#}", anyhow::Error::from(error)), Outcome::Unproven)
}
