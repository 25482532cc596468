//! Creates netkit pairs (Linux 6.7) without `ip`, whose older versions do not know them (before iproute2 6.7).

use std::{fs::File, io, os::fd::AsRawFd as _};

use nix::sys::socket::SockProtocol;

use crate::{
    Netns,
    netlink_request::{attribute, c_string, request},
    skip::{WHOLE_TEST, skip},
};

// Attributes of include/uapi/linux/if_link.h.
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_NETKIT_PEER_INFO: u16 = 1;
const IFLA_NETKIT_MODE: u16 = 5;

/// `struct ifinfomsg` with every field zero.
const IFINFOMSG: [u8; 16] = [0; 16];

/// Mode of a netkit pair.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NetkitMode {
    /// Ethernet frames with MAC addresses and ARP.
    L2 = 0,
    /// IP packets without neighbour resolution.
    L3 = 1,
}

/// Adds a netkit pair to `netns`: the primary device `primary` there, and its peer `peer` in `peer_netns`.
pub fn add_pair(
    netns: &Netns,
    primary: &str,
    mode: NetkitMode,
    peer: &str,
    peer_netns: &Netns,
) -> io::Result<()> {
    let peer_file = File::open(peer_netns.path())?;
    let peer_info = [
        IFINFOMSG.to_vec(),
        attribute(IFLA_IFNAME, &c_string(peer)),
        attribute(IFLA_NET_NS_FD, &peer_file.as_raw_fd().to_ne_bytes()),
    ];
    let data = [
        attribute(IFLA_NETKIT_PEER_INFO, &peer_info.concat()),
        attribute(IFLA_NETKIT_MODE, &(mode as u32).to_ne_bytes()),
    ];
    let info = [attribute(IFLA_INFO_KIND, &c_string("netkit")), attribute(IFLA_INFO_DATA, &data.concat())];
    let body = [
        IFINFOMSG.to_vec(),
        attribute(IFLA_IFNAME, &c_string(primary)),
        attribute(IFLA_LINKINFO, &info.concat()),
    ];
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL | libc::NLM_F_ACK;
    netns.run(|| request(SockProtocol::NetlinkRoute, libc::RTM_NEWLINK, flags, &body.concat())).map(drop)
}

/// Reports whether the kernel lacks netkit devices, and prints a skip notice then.
#[must_use]
pub fn skip_without_netkit() -> bool {
    let (netns, other) = (Netns::new("netkit"), Netns::new("netkit-peer"));
    match add_pair(&netns, "nk0", NetkitMode::L3, "nk1", &other) {
        Ok(()) => false,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            skip(WHOLE_TEST, "no netkit devices on this kernel");
            true
        }
        Err(error) => panic!("add a netkit pair: {error}"),
    }
}
