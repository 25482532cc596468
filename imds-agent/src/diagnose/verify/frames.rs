//! Test frames of a pod, and the socket that sends them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, OwnedFd},
};

use etherparse::PacketBuilder;
use imds_ebpf_common::{Service, endpoint::UDP};
use nix::{
    net::if_::if_nametoindex,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

/// IPv4 source address: the dummy address (RFC 7600), which no host has.
pub(crate) const SOURCE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
/// IPv6 source address in the discard-only prefix (RFC 6666), which no host has.
pub(crate) const SOURCE_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 8);
const HOPS: u8 = 64;
/// First ephemeral port of Linux.
const FIRST_PORT: u16 = 32_768;

/// MAC address, in the order of its bytes on the wire.
pub(crate) type Mac = [u8; 6];

/// Header fields that all frames of a sender share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frames {
    /// MAC address of the node's interface that receives the frame.
    pub(crate) to: Mac,
    pub(crate) from: Mac,
    /// Sequence number of TCP segments, with which the packet sink recognises them.
    pub(crate) marker: [u8; 4],
}

impl Frames {
    /// Builds a frame for `service` at `address`: a TCP segment with SYN and the window `id`, or an empty datagram. Each run has
    /// its own source port, so that connection tracking does not assign the segment to a connection of an earlier run.
    pub(crate) fn frame(&self, address: IpAddr, service: Service, id: u16) -> Vec<u8> {
        let source_port = FIRST_PORT | u16::from_be_bytes([self.marker[0], self.marker[1]]);
        let packet = PacketBuilder::ethernet2(self.from, self.to);
        let packet = match address {
            IpAddr::V4(address) => packet.ipv4(SOURCE_V4.octets(), address.octets(), HOPS),
            IpAddr::V6(address) => packet.ipv6(SOURCE_V6.octets(), address.octets(), HOPS),
        };
        let mut frame = Vec::new();
        // Writing fails only if the payload is too long.
        let _ok = if service.protocol == UDP {
            packet.udp(source_port, service.port).write_to_vec(&mut frame, &[])
        } else {
            let sequence = u32::from_be_bytes(self.marker);
            packet.tcp(source_port, service.port, sequence, id).syn().write_to_vec(&mut frame, &[])
        };
        frame
    }
}

/// A packet socket that sends frames with their Ethernet header.
#[derive(Debug)]
pub(crate) struct PacketSocket {
    socket: OwnedFd,
    ifindex: i32,
}

impl PacketSocket {
    /// Opens a socket for an interface of the calling thread's network namespace.
    pub(crate) fn open(interface: &str) -> io::Result<Self> {
        let ifindex = i32::try_from(if_nametoindex(interface)?).map_err(io::Error::other)?;
        // Without a protocol it receives nothing.
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { socket, ifindex })
    }

    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        #[expect(clippy::cast_possible_truncation, reason = "17 and 20")]
        let (family, address_length) =
            (libc::AF_PACKET as libc::sa_family_t, size_of::<libc::sockaddr_ll>() as libc::socklen_t);
        let address = libc::sockaddr_ll {
            sll_family: family,
            sll_protocol: 0,
            sll_ifindex: self.ifindex,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: pointer and length are of one live slice, and the address is a packet socket's, with its own length.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                address_length,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use imds_ebpf_common::{InMemoryPolicy, LinkLayer, Mode, PolicyFilter, Verdict, classify, endpoint::TCP};

    use super::*;
    use crate::{
        config::endpoint_set::{AllowedPort, Endpoint, EndpointSet},
        encode::address_key,
    };

    const FRAMES: Frames = Frames { to: [2; 6], from: [6; 6], marker: [0xa1, 0xb2, 0xc3, 0xd4] };

    #[test]
    fn frames_name_their_service() {
        let kept = Service::new(UDP, 53);
        for address in ["169.254.169.254", "fd00:ec2::254"] {
            let address = address.parse().unwrap();
            let endpoint =
                Endpoint { name: "imds".to_owned(), address, allow_ports: vec![AllowedPort(kept)] };
            let endpoint_set =
                EndpointSet { configured: "none", provider: "none", endpoints: vec![endpoint] };
            let endpoints: Vec<_> = endpoint_set.entries().collect();
            let filter = PolicyFilter::new(endpoints.iter().map(|(address, endpoint)| (*address, endpoint)));
            let tables = InMemoryPolicy {
                filter: &filter,
                endpoints: &endpoints,
                exemptions: &[],
                mode: Mode::Enforce,
            };
            let verdict =
                |service| classify(&*FRAMES.frame(address, service, 1), LinkLayer::Ethernet, &tables);
            let frame = FRAMES.frame(address, Service::new(TCP, 80), 7);
            let segment = frame.get(frame.len() - 20..).unwrap();
            assert_eq!((&segment[4..8], &segment[13..16]), (&FRAMES.marker[..], &[2, 0, 7][..]));
            assert_eq!(verdict(kept), Verdict::Allowed);
            assert_eq!(verdict(Service::new(TCP, 53)), Verdict::Denied);
            assert_eq!(verdict(Service::new(UDP, 54)), Verdict::Denied);
            assert_eq!(address_key(address), endpoints[0].0);
        }
    }
}
