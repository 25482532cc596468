//! Network namespace that owns the pins. Several network namespaces can share a bpffs, so the agent, `status` or `unload` may
//! find pins of an agent in another namespace, such as a container's or the host's.

use imds_ebpf_common::{Policy, maps::MAP_SCHEMA_VERSION};

use super::dir::{self, PinDir, io_error};
use crate::{
    datapath::{
        DatapathError,
        maps::interface_records,
        object::Maps,
        sys::bpf::{self, Target},
    },
    node::netns,
};

/// Returns the inode number of the network namespace of this process.
pub(crate) fn this_netns() -> Result<u32, DatapathError> {
    let path = "/proc/thread-self/ns/net".as_ref();
    Ok(netns::this_inode().map_err(io_error("inspect", path))?)
}

/// Returns the network namespace that owns the pinned maps, or `None` if it is this one or the maps are unreadable.
pub(crate) fn other_netns(pins: &PinDir) -> Result<Option<u32>, DatapathError> {
    let Ok(maps) = Maps::open(pins) else { return Ok(None) };
    let Ok(Policy { layout: MAP_SCHEMA_VERSION, netns, .. }) = maps.policy.get(&0, 0) else {
        return Ok(None);
    };
    Ok((netns != this_netns()?).then_some(netns))
}

/// Fails if an interface of another network namespace uses the pins. Pins of a deleted namespace can be taken over.
pub(crate) fn ensure_not_in_use(pins: &PinDir) -> Result<(), DatapathError> {
    let Some(netns) = other_netns(pins)? else { return Ok(()) };
    for (_, path) in pins.pinned_links()? {
        let Some(fd) = dir::open(&path)? else { continue };
        let link = bpf::link(fd).map_err(io_error("read the link at", &path))?;
        if link.is_some_and(|link| matches!(link.target, Target::Interface { ifindex: 1.., .. })) {
            return Err(wrong_netns(pins, netns));
        }
    }
    log::warn!(
        "taking over {} from network namespace {netns}, which was deleted or has no attached links",
        pins.root().display()
    );
    Ok(())
}

/// Fails if the pins belong to another network namespace, even if they are not in use.
pub fn ensure_own_netns(pins: &PinDir) -> Result<(), DatapathError> {
    other_netns(pins)?.map_or(Ok(()), |netns| Err(wrong_netns(pins, netns)))
}

/// Fails if another network namespace may have filters of the agent. This process can't remove those; it can detach links in
/// any namespace.
pub(crate) fn ensure_no_filters_elsewhere(pins: &PinDir) -> Result<(), DatapathError> {
    let Some(netns) = other_netns(pins)? else { return Ok(()) };
    let maps = Maps::open(pins)?;
    if maps.interfaces.keys().flatten().any(|ifindex| interface_records::has_filter(&maps, ifindex)) {
        return Err(wrong_netns(pins, netns));
    }
    Ok(())
}

fn wrong_netns(pins: &PinDir, netns: u32) -> DatapathError {
    DatapathError::WrongNetns { path: pins.root().to_owned(), netns }
}
