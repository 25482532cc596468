//! Which network namespace the pins belong to. A bpffs is shared where a network namespace is not, so that an agent,
//! `status` or `unload` can meet the pins of another node's: a container's, or the host's.

use crate::node::netns;
use imds_ebpf_common::{Policy, maps::LAYOUT};

use super::{
    DatapathError,
    bpf::{self, Target},
    object::Maps,
    pins::{self, PinDir},
    records,
};

/// Inode number of the network namespace in which this runs.
pub(super) fn this_netns() -> Result<u32, DatapathError> {
    let path = "/proc/thread-self/ns/net".as_ref();
    Ok(netns::this_inode().map_err(pins::io_error("inspect", path))?)
}

/// The other namespace to which the pinned maps belong; `None` where they are this one's or can't be read.
pub(super) fn other_netns(pins: &PinDir) -> Result<Option<u32>, DatapathError> {
    let Ok(maps) = Maps::open(pins) else { return Ok(None) };
    let Ok(Policy { layout: LAYOUT, netns, .. }) = maps.policy.get(&0, 0) else { return Ok(None) };
    Ok((netns != this_netns()?).then_some(netns))
}

/// Fails where the pins are in use in another namespace. Those of a namespace that is gone are free to take.
pub(super) fn ensure_free(pins: &PinDir) -> Result<(), DatapathError> {
    let Some(netns) = other_netns(pins)? else { return Ok(()) };
    for (_, path) in pins.pinned_links()? {
        let link = pins::open(&path)?.and_then(|fd| bpf::link(fd).ok().flatten());
        if link.is_some_and(|link| matches!(link.target, Target::Interface { ifindex: 1.., .. })) {
            return Err(DatapathError::Elsewhere { path: pins.root().to_owned(), netns });
        }
    }
    log::warn!(
        "{} is left from network namespace {netns}, which is gone or has only filters",
        pins.root().display()
    );
    Ok(())
}

/// Fails where the pins belong to another namespace, whatever is in use there.
pub fn ensure_ours(pins: &PinDir) -> Result<(), DatapathError> {
    match other_netns(pins)? {
        Some(netns) => Err(DatapathError::Elsewhere { path: pins.root().to_owned(), netns }),
        None => Ok(()),
    }
}

/// Fails where another namespace may have filters, which can't be seen from here. Links can be removed from anywhere.
pub(super) fn ensure_no_filters_elsewhere(pins: &PinDir) -> Result<(), DatapathError> {
    let Some(netns) = other_netns(pins)? else { return Ok(()) };
    let maps = Maps::open(pins)?;
    if maps.interfaces.keys().flatten().any(|ifindex| records::has_filter(&maps, ifindex)) {
        return Err(DatapathError::Elsewhere { path: pins.root().to_owned(), netns });
    }
    Ok(())
}
