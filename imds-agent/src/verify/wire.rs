//! Frames, and how they are sent.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use imds_ebpf_common::{Service, endpoint::UDP};
use nix::net::if_::if_nametoindex;

/// Locally administered, and no interface's: whatever the verdict, nobody takes the frame for its own.
const TO_NOBODY: [u8; 6] = [0x02, 0, 0, 0, 0, 0xfe];
const FROM_NOBODY: [u8; 6] = [0x02, 0, 0, 0, 0, 0xfd];
/// The dummy address (RFC 7600), which nobody has.
const SOURCE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
/// In the discard-only prefix (RFC 6666), which nobody has.
const SOURCE_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 8);
const SOURCE_PORT: u16 = 40_000;
const HOPS: u8 = 64;

/// A frame for `service` at `address`, with a TCP header or, for any other protocol, one of UDP.
pub(super) fn frame(address: IpAddr, service: Service) -> Vec<u8> {
    let segment = segment(service);
    #[expect(clippy::cast_possible_truncation, reason = "at most 20 bytes")]
    let length = segment.len() as u16;
    let mut frame = [TO_NOBODY, FROM_NOBODY].concat();
    match address {
        IpAddr::V4(address) => {
            frame.extend([0x08, 0x00]);
            frame.extend(ipv4_header(address, service.protocol, length));
        }
        IpAddr::V6(address) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([service.protocol, HOPS]);
            frame.extend(SOURCE_V6.octets());
            frame.extend(address.octets());
        }
    }
    frame.extend(segment);
    frame
}

/// Ports, and as much of the rest as makes it a SYN or an empty datagram without a checksum.
fn segment(Service { port, protocol, .. }: Service) -> Vec<u8> {
    let mut segment = [SOURCE_PORT.to_be_bytes(), port.to_be_bytes()].concat();
    if protocol == UDP {
        segment.extend([0, 8, 0, 0]);
    } else {
        segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    }
    segment
}

fn ipv4_header(address: Ipv4Addr, protocol: u8, length: u16) -> [u8; 20] {
    let mut header = [0; 20];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&(length + 20).to_be_bytes());
    header[8] = HOPS;
    header[9] = protocol;
    header[12..16].copy_from_slice(&SOURCE_V4.octets());
    header[16..].copy_from_slice(&address.octets());
    let (words, _) = header.as_chunks::<2>();
    let sum: u32 = words.iter().map(|&word| u32::from(u16::from_be_bytes(word))).sum();
    // Of ten words, so that one carry is all there can be after the first.
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !((sum & 0xffff) as u16 + (sum >> 16) as u16);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    header
}

/// A socket that sends whole frames.
#[derive(Debug)]
pub(super) struct PacketSocket {
    socket: OwnedFd,
    ifindex: i32,
}

impl PacketSocket {
    /// On an interface of the calling thread's network namespace.
    pub(super) fn open(interface: &str) -> io::Result<Self> {
        let ifindex = i32::try_from(if_nametoindex(interface)?).map_err(io::Error::other)?;
        // SAFETY: takes integers only. With protocol 0 it receives nothing.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened, and nobody else's.
        Ok(Self { socket: unsafe { OwnedFd::from_raw_fd(fd) }, ifindex })
    }

    /// Sends a frame.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
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
    use imds_ebpf_common::{Filter, Frame, Listed, Mode, Verdict, endpoint::TCP, judge};

    use super::*;
    use crate::endpoints::{self, Endpoint, Guarded, Keep};

    #[test]
    fn a_header_adds_up() {
        let header = ipv4_header(Ipv4Addr::new(169, 254, 169, 254), UDP, 8);
        let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn frames_are_for_what_they_are_said_to_be() {
        let kept = Service::new(UDP, 53);
        for address in ["169.254.169.254", "fd00:ec2::254"] {
            let address = address.parse().unwrap();
            let endpoint = Endpoint { name: "imds".to_owned(), address, keep: vec![Keep(kept)] };
            let guarded = Guarded::new("none", "none", vec![endpoint]);
            let endpoints: Vec<_> = guarded.entries().collect();
            let filter = Filter::of(endpoints.iter().map(|(address, endpoint)| (*address, endpoint)));
            let tables = Listed { filter: &filter, endpoints: &endpoints, grants: &[], mode: Mode::Enforce };
            let verdict = |service| judge(&*frame(address, service), Frame::Ethernet, &tables);
            assert_eq!(verdict(kept), Verdict::Kept);
            assert_eq!(verdict(Service::new(TCP, 53)), Verdict::Deny);
            assert_eq!(verdict(Service::new(UDP, 54)), Verdict::Deny);
            assert_eq!(endpoints::address(address), endpoints[0].0);
        }
    }
}
