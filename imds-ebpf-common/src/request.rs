//! Starts of HTTP requests that exempt and audited pods send to protected endpoints.
//!
//! They show the operator which requests an exemption needs. User space keeps only method, path and version of the API, because the
//! text may contain a header with a token.

use core::mem::offset_of;

use network_types::tcp::TcpHdr;

use crate::{
    address::Address,
    endpoint::TCP,
    link_layer::IpOffset,
    packet::{Packet, plain_transport},
};

/// Size of [`RequestStart::text`] in bytes.
pub const MAX_TEXT: usize = 128;

/// Length of the shortest request line in bytes: `GET / HTTP/1.1`.
pub const MIN_TEXT: usize = 14;

/// First bytes of a TCP segment that begins with the name of an HTTP method.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RequestStart {
    /// Properties of the packet.
    pub header: RequestHeader,
    /// First bytes of the segment. The bytes from [`RequestHeader::length`] on are undefined.
    pub text: [u8; MAX_TEXT],
}

/// Properties of a packet with the start of a request. All integers are in host byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RequestHeader {
    /// Time in nanoseconds since boot (`CLOCK_BOOTTIME`).
    pub time: u64,
    /// Address of the endpoint.
    pub endpoint: Address,
    /// Index of the interface at whose hook the packet was seen.
    pub ifindex: u32,
    /// Number of valid bytes in [`RequestStart::text`], from [`MIN_TEXT`] to [`MAX_TEXT`].
    pub length: u32,
    /// Destination port.
    pub port: u16,
    /// Number of the [`Hook`](crate::Hook) that saw the packet.
    pub hook: u8,
    /// Number of the [`Verdict`](crate::Verdict) on the packet.
    pub verdict: u8,
    /// Explicit padding, always written as 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<RequestStart>() == 168);

impl RequestStart {
    /// Returns the valid bytes of the text.
    #[must_use]
    pub fn text(&self) -> &[u8] {
        let length = usize::try_from(self.header.length).unwrap_or(MAX_TEXT);
        self.text.get(..length).unwrap_or(&self.text)
    }
}

/// Returns the destination port and the offset in bytes of the payload of a TCP segment with an IP header at `ip`. Returns `None` for packets of other
/// protocols, fragments other than the first, packets with IPv6 extension headers, and truncated packets.
#[inline(always)]
pub fn tcp_payload<P: Packet + ?Sized>(packet: &P, ip: IpOffset) -> Option<(u16, usize)> {
    let (protocol, header) = plain_transport(packet, ip)?;
    // Hidden from the verifier, which otherwise follows the rest for each version of IP.
    let header = packet.verifier_opaque(header);
    if protocol != TCP {
        return None;
    }
    // The upper four bits of the byte after the acknowledgement number are the length of the header in words (RFC 9293, section
    // 3.1).
    let [length] = packet.fetch(header + offset_of!(TcpHdr, ack_seq) + size_of::<u32>())?;
    let port = packet.fetch(header + offset_of!(TcpHdr, dest))?;
    Some((u16::from_be_bytes(port), header + usize::from(length >> 4) * 4))
}

/// Reports whether a segment with these first bytes begins with the name of an HTTP method that a metadata service answers.
#[inline(always)]
#[must_use]
pub fn is_request(first: [u8; 4]) -> bool {
    // As words, because a comparison byte by byte has more paths for the verifier.
    const GET: u32 = u32::from_ne_bytes(*b"GET ");
    const PUT: u32 = u32::from_ne_bytes(*b"PUT ");
    const POST: u32 = u32::from_ne_bytes(*b"POST");
    const HEAD: u32 = u32::from_ne_bytes(*b"HEAD");
    const DELETE: u32 = u32::from_ne_bytes(*b"DELE");
    matches!(u32::from_ne_bytes(first), GET | PUT | POST | HEAD | DELETE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LinkLayer, find_header};

    /// Frame with an IP header, a TCP header with options, and a payload.
    fn frame(ether_type: u16, ip: &[u8]) -> [u8; 128] {
        let mut frame = [0; 128];
        frame[12..14].copy_from_slice(&ether_type.to_be_bytes());
        frame[14..14 + ip.len()].copy_from_slice(ip);
        frame
    }

    fn payload(frame: &[u8]) -> Option<usize> {
        let (port, offset) = tcp_payload(frame, find_header(frame, LinkLayer::Ethernet).ok()?)?;
        assert_eq!(port, 80);
        Some(offset)
    }

    #[test]
    fn payload_follows_the_options() {
        let mut v4 = [0; 40];
        (v4[0], v4[9], v4[23], v4[32]) = (0x45, TCP, 80, 0x80);
        assert_eq!(payload(&frame(0x0800, &v4)), Some(14 + 20 + 32));
        (v4[0], v4[23], v4[27], v4[36]) = (0x46, 0, 80, 0x50);
        assert_eq!(payload(&frame(0x0800, &v4)), Some(14 + 24 + 20));
        let mut v6 = [0; 60];
        (v6[0], v6[6], v6[43], v6[52]) = (0x60, TCP, 80, 0x50);
        assert_eq!(payload(&frame(0x86dd, &v6)), Some(14 + 40 + 20));
    }

    #[test]
    fn other_packets_have_no_payload() {
        let mut v4 = [0; 40];
        (v4[0], v4[9], v4[23], v4[32]) = (0x45, crate::endpoint::UDP, 80, 0x50);
        assert_eq!(payload(&frame(0x0800, &v4)), None);
        (v4[7], v4[9]) = (1, TCP);
        assert_eq!(payload(&frame(0x0800, &v4)), None);
        v4[7] = 0;
        assert_eq!(payload(&frame(0x0800, &v4)[..46]), None);
    }

    #[test]
    fn methods() {
        for method in ["GET /", "PUT /", "POST /", "HEAD /", "DELETE /"] {
            assert!(is_request(method.as_bytes().first_chunk().copied().unwrap()), "{method}");
        }
        for other in ["get /", "GETS", "HTTP", "\x16\x03\x01\x02"] {
            assert!(!is_request(other.as_bytes().first_chunk().copied().unwrap()), "{other}");
        }
    }
}
