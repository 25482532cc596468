//! Unloading: ends enforcement and removes everything that agents attached and pinned.

use std::path::PathBuf;

use imds_ebpf_common::TcHook;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Duration, Instant, sleep},
};

use super::{
    DatapathError, attach,
    claim::Claim,
    clsact, force, home, hosts, mprog,
    object::Maps,
    pins::{AttachPoint, PinDir, PinError},
    rcu::{Expedited, MANY_LINKS},
    sockets,
};
use crate::node::{links::Link, netlink::Netlink};

/// Interval at which `unload` tries to take the directory.
const RELEASE_RETRY: Duration = Duration::from_millis(20);

/// Result of [`unload`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Removed {
    /// Number of interfaces that had a program of the agent.
    pub interfaces: usize,
    /// Cgroups had programs of the agent.
    pub sockets: bool,
    /// The pin directory; `None` if there was none.
    pub pin_dir: Option<PathBuf>,
    /// Entries of the pin directory that agents do not create, and that stay.
    pub left: Vec<PathBuf>,
    /// The agent that released the directory, and runs on without enforcing anything.
    pub agent: Option<i32>,
}

/// Step of [`unload`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Progress {
    /// All hooks let everything pass from now on.
    PolicyOff,
    /// A running agent was asked to release the directory.
    AskedAgent(Option<i32>),
    /// So many of all pinned links were detached.
    Detached(usize, usize),
}

/// Removes everything that agents attached and pinned: links, filters, qdiscs that an agent added, and pins, and with them
/// programs and maps.
///
/// A running agent is asked to release the directory, and may take `timeout` for it.
/// The policy is switched off first, so that all hooks let everything pass at once. The kernel needs a grace period for each
/// TCX link that is detached after that.
pub async fn unload(
    pins: &PinDir,
    netlink: &Netlink,
    links: &[Link],
    timeout: Duration,
    mut progress: impl FnMut(Progress),
) -> Result<Removed, DatapathError> {
    let mut removed = Removed::default();
    // Open as long as this works on it, so that its inode is no other directory's.
    let Some(_directory) = pins.open_owned()? else { return Ok(removed) };
    home::ensure_no_filters_elsewhere(pins)?;
    let (claim, agent) = if let Some(claim) = pins.try_claim_existing()? {
        (claim, None)
    } else {
        // Before the agent is asked: it may hang.
        if force::switch_off(pins)? {
            progress(Progress::PolicyOff);
        }
        let holder = pins.holder()?;
        let agent = holder.and_then(|holder| holder.pid);
        if holder.is_some() {
            progress(Progress::AskedAgent(agent));
        }
        let Some(claim) = wait_for_release(pins, agent, timeout).await? else { return Ok(removed) };
        (claim, agent)
    };
    // Again, as an agent may have loaded its configuration in between.
    if force::switch_off(pins)? {
        progress(Progress::PolicyOff);
    }
    removed.agent = agent;
    detach(pins, netlink, links, &mut removed, progress).await?;
    removed.left = pins.remove_own()?;
    removed.pin_dir = Some(pins.root().to_owned());
    drop(claim);
    Ok(removed)
}

/// Asks the running agent to release the directory, and waits for it. Returns `None` if the directory is gone.
async fn wait_for_release(
    pins: &PinDir,
    agent: Option<i32>,
    timeout: Duration,
) -> Result<Option<Claim>, PinError> {
    let deadline = Instant::now() + timeout;
    loop {
        // Each time: an agent that starts in between removes the request.
        if !pins.request_unload()? {
            return Ok(None);
        }
        if let Some(claim) = pins.try_claim_existing()? {
            return Ok(Some(claim));
        }
        if Instant::now() >= deadline {
            // The request stays: an agent that works again later releases the directory then.
            let pid = pins.holder()?.map_or(agent, |holder| holder.pid);
            return Err(PinError::NotReleased { path: pins.root().to_owned(), pid, timeout });
        }
        sleep(RELEASE_RETRY).await;
    }
}

/// Expedites grace periods. Ctrl-C and SIGTERM then no longer end the process before it restores the setting.
fn expedite() -> Option<Expedited> {
    let handlers = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
    if handlers.iter().all(Result::is_ok) { Expedited::set() } else { None }
}

async fn detach(
    pins: &PinDir,
    netlink: &Netlink,
    links: &[Link],
    removed: &mut Removed,
    mut progress: impl FnMut(Progress),
) -> Result<(), DatapathError> {
    removed.sockets = sockets::detach_all(pins)? | hosts::detach_all(pins)?;
    removed.sockets |= sockets::detach_local_service(pins)?;
    let pinned = pins.pinned_links()?;
    let expedited = if pinned.len() >= MANY_LINKS { expedite() } else { None };
    for (done, (_, path)) in (1..).zip(&pinned) {
        removed.interfaces += usize::from(mprog::detach_pinned(path)?);
        progress(Progress::Detached(done, pinned.len()));
    }
    drop(expedited);
    // Without readable maps it is unknown which qdiscs an agent added; they stay.
    let mut maps = Maps::open(pins).ok();
    for link in links {
        let mut detached = false;
        for edge in TcHook::ALL {
            let point = AttachPoint { ifindex: link.index, edge };
            detached |= match &mut maps {
                Some(maps) => attach::remove_filter(netlink, maps, point).await?,
                None => clsact::detach_all(netlink, point).await?,
            };
        }
        removed.interfaces += usize::from(detached);
    }
    Ok(())
}
