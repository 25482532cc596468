//! Finds the devices through which packets leave the machine: the lowest device of the stack below each uplink.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    diagnose::devices::Device,
    node::link::{Link, VERIFY_PREFIX},
};

/// Returns the lowest devices below `uplinks`, without `pods`: each packet that leaves by an uplink leaves by one of them.
pub(crate) fn lowest(
    devices: &BTreeMap<u32, Device>,
    uplinks: impl IntoIterator<Item = u32>,
    pods: &BTreeSet<u32>,
) -> BTreeSet<u32> {
    let (mut seen, mut lowest) = (BTreeSet::new(), BTreeSet::new());
    let mut queue: Vec<_> = uplinks.into_iter().collect();
    while let Some(index) = queue.pop() {
        let Some(device) = devices.get(&index).filter(|_| seen.insert(index)) else { continue };
        let below: Vec<_> = below(devices, device).filter(|index| !pods.contains(index)).collect();
        if below.is_empty() {
            lowest.insert(index);
        }
        queue.extend(below);
    }
    lowest
}

/// Returns the devices to which `device` passes its packets.
fn below<'d>(devices: &'d BTreeMap<u32, Device>, device: &'d Device) -> impl Iterator<Item = u32> + 'd {
    let ports = move |master: u32| {
        let is_port = move |port: &&Device| {
            port.link.master == Some(master) && !port.link.name.starts_with(VERIFY_PREFIX)
        };
        let ports = devices.values().filter(is_port);
        // A synthetic NIC (netvsc) sends by itself while the virtual function below is down.
        ports.filter(move |port| !device.is_plain || port.is_running).map(|port| port.link.index)
    };
    let Link { index, lower, .. } = device.link;
    let linked = lower.filter(|_| device.is_stacked);
    let peer = lower.filter(|_| device.link.is_pair()).and_then(|peer| devices.get(&peer));
    let behind_peer = peer.and_then(|peer| peer.link.master).into_iter().flat_map(ports);
    let behind_peer = behind_peer.filter(move |index| Some(*index) != lower);
    ports(index).chain(linked).chain(behind_peer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::link::LinkKind;

    #[derive(Clone, Copy, PartialEq)]
    enum Kind {
        Plain,
        Stacked,
        Pair,
        Virtual,
    }

    fn device(index: u32, kind: Kind, master: Option<u32>, lower: Option<u32>) -> Device {
        let link_kind = if kind == Kind::Pair { LinkKind::Veth } else { LinkKind::Other };
        let link = Link { kind: link_kind, master, lower, ..Link::with_index(index) };
        let (is_plain, is_stacked) = (kind == Kind::Plain, kind == Kind::Stacked);
        Device { is_running: true, is_plain, is_stacked, ..Device::new(link) }
    }

    fn lowest_below(devices: &[Device], uplink: u32) -> Vec<u32> {
        let devices = devices.iter().map(|device| (device.link.index, device.clone())).collect();
        lowest(&devices, [uplink], &[9].into()).into_iter().collect()
    }

    #[test]
    fn stacks_end_at_the_nic() {
        use Kind::{Pair, Plain, Stacked, Virtual};
        assert_eq!(lowest_below(&[device(2, Plain, None, None)], 2), [2]);
        // A VLAN on a bond with two NICs.
        let bond = [
            device(2, Plain, Some(4), None),
            device(3, Plain, Some(4), None),
            device(4, Virtual, None, None),
            device(5, Stacked, None, Some(4)),
        ];
        assert_eq!(lowest_below(&bond, 5), [2, 3]);
        // A bridge with the NIC and a pod, reached through a pair.
        let bridge = [
            device(2, Plain, Some(4), None),
            device(4, Virtual, None, None),
            device(5, Pair, None, Some(6)),
            device(6, Pair, Some(4), Some(5)),
            device(9, Pair, Some(4), None),
        ];
        assert_eq!(lowest_below(&bridge, 4), [2, 6]);
        assert_eq!(lowest_below(&bridge, 5), [2]);
    }

    #[test]
    fn netvsc_without_its_function() {
        let mut function = device(3, Kind::Plain, Some(2), None);
        let synthetic = device(2, Kind::Plain, None, None);
        assert_eq!(lowest_below(&[synthetic.clone(), function.clone()], 2), [3]);
        function.is_running = false;
        assert_eq!(lowest_below(&[synthetic, function], 2), [2]);
    }
}
