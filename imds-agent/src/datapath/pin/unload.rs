//! Implementation of `imds-agent unload`: ends enforcement, and removes all attachments and pins of agents.

use std::{collections::BTreeSet, path::PathBuf};

use imds_ebpf_common::TcHook;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Duration, Instant, sleep},
};

use super::{
    dir::{AttachPoint, PinDir, PinError},
    lock::PinLock,
    netns_owner,
};
use crate::{
    datapath::{
        DatapathError,
        attach::{self, cgroup_programs, clsact, host_cgroups, mprog},
        maps::policy,
        object::Maps,
        sys::rcu::{self, Expedited, MANY_LINKS},
    },
    node::{link::Link, netlink::Netlink},
};

/// Interval at which `unload` tries to lock the directory.
const RELEASE_RETRY: Duration = Duration::from_millis(20);

/// Result of [`unload`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Removed {
    /// Indices of the interfaces that had a program of the agent.
    pub interfaces: BTreeSet<u32>,
    /// True if cgroups had programs of the agent.
    pub sockets: bool,
    /// Path of the removed pin directory; `None` if it did not exist.
    pub pin_dir: Option<PathBuf>,
    /// Entries of the pin directory that agents do not create. They are not removed.
    pub left: Vec<PathBuf>,
    /// Pid of the agent that has released the directory, and keeps running without enforcing anything.
    pub agent: Option<i32>,
}

/// Step of [`unload`], for progress messages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Progress {
    /// The policy is off: all hooks let all packets pass.
    PolicyOff,
    /// The running agent was asked to release the directory. Contains its pid, if visible.
    AskedAgent(Option<i32>),
    /// Number of detached links, and number of all pinned links.
    Detached(usize, usize),
}

/// Removes links, filters and pins of agents, and qdiscs that an agent added. Without pins and attachments, the kernel frees
/// the programs and maps.
///
/// Asks a running agent to release the directory, and waits at most `timeout` for it. Switches the policy off first, so that
/// all hooks let all packets pass at once, because detaching takes long: the kernel waits for a grace period for each TCX
/// link.
pub async fn unload(
    pins: &PinDir,
    netlink: &Netlink,
    links: &[Link],
    timeout: Duration,
    mut progress: impl FnMut(Progress),
) -> Result<Removed, DatapathError> {
    let mut removed = Removed::default();
    // Keeps the directory open, so that the kernel does not reuse its inode number.
    let Some(_directory) = pins.open_owned()? else { return Ok(removed) };
    netns_owner::ensure_no_filters_elsewhere(pins)?;
    let (pin_lock, agent) = if let Some(pin_lock) = pins.try_lock_existing()? {
        (pin_lock, None)
    } else {
        // Switches the policy off before asking the agent, which may hang.
        if policy::switch_off(pins)? {
            progress(Progress::PolicyOff);
        }
        let holder = pins.lock_owner()?;
        let agent = holder.and_then(|holder| holder.pid);
        if holder.is_some() {
            progress(Progress::AskedAgent(agent));
        }
        let Some(pin_lock) = wait_for_release(pins, agent, timeout).await? else { return Ok(removed) };
        (pin_lock, agent)
    };
    removed.agent = agent;
    remove(&pin_lock, netlink, links, &mut removed, progress).await?;
    Ok(removed)
}

/// Removes the same as [`unload`], unless an agent runs that uses the directory. Returns `None` in that case.
pub async fn unload_stopped(
    pins: &PinDir,
    netlink: &Netlink,
    links: &[Link],
    progress: impl FnMut(Progress),
) -> Result<Option<Removed>, DatapathError> {
    let mut removed = Removed::default();
    // Keeps the directory open, so that the kernel does not reuse its inode number.
    let Some(_directory) = pins.open_owned()? else { return Ok(Some(removed)) };
    netns_owner::ensure_no_filters_elsewhere(pins)?;
    let Some(pin_lock) = pins.lock_stopped()? else { return Ok(None) };
    remove(&pin_lock, netlink, links, &mut removed, progress).await?;
    Ok(Some(removed))
}

/// Removes everything of the locked directory.
async fn remove(
    pin_lock: &PinLock,
    netlink: &Netlink,
    links: &[Link],
    removed: &mut Removed,
    mut progress: impl FnMut(Progress),
) -> Result<(), DatapathError> {
    let pins = &pin_lock.dir;
    rcu::restore_if_recorded(pins);
    // A running agent may have applied its configuration since it was asked to release the directory.
    if policy::switch_off(pins)? {
        progress(Progress::PolicyOff);
    }
    detach(pins, netlink, links, removed, progress).await?;
    removed.left = pins.remove_own()?;
    removed.pin_dir = Some(pins.root().to_owned());
    Ok(())
}

/// Asks the running agent to release the directory, and waits for it. Returns `None` if the directory was removed.
async fn wait_for_release(
    pins: &PinDir,
    agent: Option<i32>,
    timeout: Duration,
) -> Result<Option<PinLock>, DatapathError> {
    let deadline = Instant::now() + timeout;
    loop {
        // Repeats both, because an agent that starts in the meantime removes the request and switches the policy on.
        if !pins.request_unload()? {
            return Ok(None);
        }
        policy::switch_off(pins)?;
        if let Some(pin_lock) = pins.try_lock_existing()? {
            return Ok(Some(pin_lock));
        }
        if Instant::now() >= deadline {
            // Leaves the request in place, so that a hanging agent releases the directory when it resumes.
            let pid = pins.lock_owner()?.map_or(agent, |holder| holder.pid);
            return Err(PinError::NotReleased { path: pins.root().to_owned(), pid, timeout }.into());
        }
        sleep(RELEASE_RETRY).await;
    }
}

/// Expedites grace periods. Handles SIGINT and SIGTERM first, so that they do not end the process before it restores the
/// setting.
fn expedite(pins: &PinDir) -> Option<Expedited> {
    let handlers = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
    if handlers.iter().all(Result::is_ok) { Expedited::set(pins) } else { None }
}

async fn detach(
    pins: &PinDir,
    netlink: &Netlink,
    links: &[Link],
    removed: &mut Removed,
    mut progress: impl FnMut(Progress),
) -> Result<(), DatapathError> {
    removed.sockets = host_cgroups::detach_all(pins)?;
    for kind in cgroup_programs::ON_ONE_CGROUP {
        removed.sockets |= cgroup_programs::detach(pins, kind)?;
    }
    let pinned = pins.pinned_links()?;
    let expedited = if pinned.len() >= MANY_LINKS { expedite(pins) } else { None };
    for (done, (point, path)) in (1..).zip(&pinned) {
        if mprog::detach_pinned(path)? {
            removed.interfaces.insert(point.ifindex);
        }
        progress(Progress::Detached(done, pinned.len()));
    }
    drop(expedited);
    // Qdiscs stay if the maps are unreadable, because then the owner of a qdisc is unknown.
    let mut maps = Maps::open(pins).ok();
    for link in links {
        let mut detached = false;
        for hook in TcHook::ALL {
            let point = AttachPoint { ifindex: link.index, hook };
            detached |= match &mut maps {
                Some(maps) => attach::remove_filter(netlink, maps, point).await?,
                None => clsact::detach_all(netlink, point).await?,
            };
        }
        if detached {
            removed.interfaces.insert(link.index);
        }
    }
    Ok(())
}
