//! Creates netkit pairs (Linux 6.7) without `ip`, whose older versions do not know them (before iproute2 6.7).

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};

use crate::{
    Netns,
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
/// Length of `struct nlmsghdr` in bytes.
const HEADER_LEN: usize = 16;

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
    netns.run(|| request(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &body.concat()))
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

/// Sends a request to rtnetlink and waits for its acknowledgement.
fn request(kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
    let socket = open()?;
    let length = u32::try_from(HEADER_LEN + body.len()).expect("a short message");
    let flags = u16::try_from(flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK).expect("flags of 16 bits");
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let received = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // A message of type NLMSG_ERROR has the negative error number after its header.
    let errno = answer.get(HEADER_LEN..HEADER_LEN + 4).filter(|_| received >= HEADER_LEN + 4);
    match i32::from_ne_bytes(errno.expect("an acknowledgement").try_into().expect("4 bytes")) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}

fn open() -> io::Result<OwnedFd> {
    let socket =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(5, 0))?;
    Ok(socket)
}

/// Encodes a netlink attribute, padded to 4 bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("a short attribute");
    let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn c_string(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}
