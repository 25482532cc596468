//! Test frames of a pod, and the socket that sends them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use imds_ebpf_common::{Service, endpoint::UDP};
use nix::net::if_::if_nametoindex;

/// IPv4 source address: the dummy address (RFC 7600), which no host has.
pub(crate) const SOURCE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
/// IPv6 source address in the discard-only prefix (RFC 6666), which no host has.
pub(crate) const SOURCE_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 8);
const HOPS: u8 = 64;
const ETHERTYPE_V4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_V6: [u8; 2] = [0x86, 0xdd];
/// First ephemeral port of Linux.
const FIRST_PORT: u16 = 32_768;

/// MAC address, in the order of its bytes on the wire.
pub(crate) type Mac = [u8; 6];

/// Header fields that all frames of a sender share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frames {
    /// MAC address of the node's interface that receives the frame.
    pub(crate) to: Mac,
    /// MAC address of the sender.
    pub(crate) from: Mac,
    /// Sequence number of TCP segments, with which the packet sink recognises them.
    pub(crate) marker: [u8; 4],
}

impl Frames {
    /// Builds a frame for `service` at `address`: a TCP segment with SYN and the window `id`, or an empty datagram.
    pub(crate) fn frame(&self, address: IpAddr, service: Service, id: u16) -> Vec<u8> {
        let mut segment = self.segment(service, id);
        let length = u16::try_from(segment.len()).unwrap_or_default();
        let source: IpAddr = if address.is_ipv4() { SOURCE_V4.into() } else { SOURCE_V6.into() };
        let position = if service.protocol == UDP { 6 } else { 16 };
        let checksum = segment_checksum(source, address, service.protocol, &segment);
        if let Some(field) = segment.get_mut(position..position + 2) {
            field.copy_from_slice(&checksum.to_be_bytes());
        }

        let mut frame = [self.to, self.from].concat();
        match address {
            IpAddr::V4(address) => {
                frame.extend(ETHERTYPE_V4);
                frame.extend(ipv4_header(address, service.protocol, length));
            }
            IpAddr::V6(address) => {
                frame.extend(ETHERTYPE_V6);
                frame.extend([0x60, 0, 0, 0]);
                frame.extend(length.to_be_bytes());
                frame.extend([service.protocol, HOPS]);
                frame.extend(SOURCE_V6.octets());
                frame.extend(address.octets());
            }
        }
        frame.extend(segment);
        frame
    }

    /// Builds a TCP or UDP header without its checksum. Each run has its own source port, so that connection tracking does not
    /// assign the segment to a connection of an earlier run.
    fn segment(&self, Service { port, protocol, .. }: Service, id: u16) -> Vec<u8> {
        let source_port = FIRST_PORT | u16::from_be_bytes([self.marker[0], self.marker[1]]);
        let mut segment = [source_port.to_be_bytes(), port.to_be_bytes()].concat();
        if protocol == UDP {
            segment.extend([0, 8, 0, 0]);
        } else {
            segment.extend(self.marker);
            segment.extend([0, 0, 0, 0, 0x50, 0x02]);
            segment.extend(id.to_be_bytes());
            segment.extend([0, 0, 0, 0]);
        }
        segment
    }
}

fn ipv4_header(address: Ipv4Addr, protocol: u8, length: u16) -> [u8; 20] {
    let mut header = [0; 20];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&(length + 20).to_be_bytes());
    header[8] = HOPS;
    header[9] = protocol;
    header[12..16].copy_from_slice(&SOURCE_V4.octets());
    header[16..].copy_from_slice(&address.octets());
    let checksum = checksum(&header);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    header
}

/// Returns the checksum of a TCP segment or UDP datagram with its pseudo-header.
fn segment_checksum(source: IpAddr, destination: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    let mut bytes = Vec::new();
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => bytes.extend(address.octets()),
            IpAddr::V6(address) => bytes.extend(address.octets()),
        }
    }
    bytes.extend([0, protocol]);
    bytes.extend(u16::try_from(segment.len()).unwrap_or_default().to_be_bytes());
    bytes.extend(segment);
    checksum(&bytes)
}

/// Returns the Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let (words, _) = bytes.as_chunks::<2>();
    let mut sum: u32 = words.iter().map(|&word| u32::from(u16::from_be_bytes(word))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits above")]
    let sum = sum as u16;
    !sum
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
        // SAFETY: takes integers only. With protocol 0 it receives nothing.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just opened and has no other owner.
        Ok(Self { socket: unsafe { OwnedFd::from_raw_fd(fd) }, ifindex })
    }

    /// Sends a frame, which includes the Ethernet header.
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
    fn checksums() {
        assert_eq!(checksum(&ipv4_header(Ipv4Addr::new(169, 254, 169, 254), UDP, 8)), 0);
        for (address, start) in [("169.254.169.254", 34), ("fd00:ec2::254", 54)] {
            let address: IpAddr = address.parse().unwrap();
            let source: IpAddr = if address.is_ipv4() { SOURCE_V4.into() } else { SOURCE_V6.into() };
            for protocol in [TCP, UDP] {
                let frame = FRAMES.frame(address, Service::new(protocol, 80), 7);
                assert_eq!(segment_checksum(source, address, protocol, &frame[start..]), 0);
            }
        }
    }

    #[test]
    fn frames_name_their_service() {
        let kept = Service::new(UDP, 53);
        for address in ["169.254.169.254", "fd00:ec2::254"] {
            let address = address.parse().unwrap();
            let endpoint =
                Endpoint { name: "imds".to_owned(), address, allow_ports: vec![AllowedPort(kept)] };
            let endpoint_set = EndpointSet::new("none", "none", vec![endpoint]);
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
            assert_eq!(verdict(kept), Verdict::Allowed);
            assert_eq!(verdict(Service::new(TCP, 53)), Verdict::Denied);
            assert_eq!(verdict(Service::new(UDP, 54)), Verdict::Denied);
            assert_eq!(address_key(address), endpoints[0].0);
        }
    }
}
