//! `AF_PACKET` sockets, which send and receive whole frames without the checks of the IP stack.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

use crate::{Netns, poll::try_poll};

/// A packet socket bound to one interface.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl PacketSocket {
    /// Opens a socket that sends and receives whole frames on `interface` of `netns`.
    #[must_use]
    pub fn frames(netns: &Netns, interface: &str) -> Self {
        Self::open(netns, interface, libc::SOCK_RAW, libc::ETH_P_ALL)
    }

    /// Opens a socket that sends whole frames on `interface` of `netns`, for which the kernel takes `protocol` as EtherType
    /// whatever they contain.
    #[must_use]
    pub fn frames_as(netns: &Netns, interface: &str, protocol: libc::c_int) -> Self {
        Self::open(netns, interface, libc::SOCK_RAW, protocol)
    }

    /// Opens a socket that receives packets of `protocol`, an `EtherType`, from `interface` of `netns`. Packets begin
    /// with the IP header and are received before the IP stack validates them.
    #[must_use]
    pub(crate) fn packets(netns: &Netns, interface: &str, protocol: libc::c_int) -> Self {
        Self::open(netns, interface, libc::SOCK_DGRAM, protocol)
    }

    /// Makes sent frames bypass the interface's queue and the egress hooks.
    pub fn bypass_queue(&self) {
        self.set(libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 1);
    }

    /// Sends one frame, Ethernet header included.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: pointer and length describe one live slice.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Sends one frame larger than a page, of which only the first `linear` bytes are in the linear part of the skb.
    /// The sender chooses that number.
    pub fn send_scattered(&self, frame: &[u8], linear: u16) -> io::Result<()> {
        // The third and fourth of the ten bytes of struct virtio_net_hdr are hdr_len.
        let mut with_header = [[0; 2], linear.to_ne_bytes(), [0; 2], [0; 2], [0; 2]].concat();
        with_header.extend_from_slice(frame);
        self.set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1);
        let sent = self.send(&with_header);
        self.set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, 0);
        sent
    }

    /// Reports whether a frame that contains `marker` is received within `deadline`. Frames received earlier count too.
    #[must_use]
    pub fn sees(&self, marker: &[u8], deadline: Duration) -> bool {
        self.find(deadline, |frame| frame.windows(marker.len()).any(|window| window == marker)).is_some()
    }

    /// Returns the first frame that `is_wanted` accepts within `deadline`. Frames received earlier count too.
    #[must_use]
    pub fn find(&self, deadline: Duration, is_wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let mut buffer = [0; 2048];
        let mut next = || {
            while let Ok(frame) = self.receive(&mut buffer) {
                if is_wanted(frame) {
                    return Some(frame.to_vec());
                }
            }
            None
        };
        try_poll(deadline, &mut next)
    }

    /// Receives one packet if one is queued, truncated to the length of the buffer.
    pub(crate) fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        // SAFETY: pointer and length describe one live slice.
        let got = unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        Ok(&buffer[..got])
    }

    /// Returns the number of packets that the kernel dropped since the last call because the queue was full.
    pub(crate) fn take_dropped(&self) -> u64 {
        let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = socklen::<libc::tpacket_stats>();
        // SAFETY: the structure is the one that packet(7) documents for this option, and outlives the call.
        let result = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0, "PACKET_STATISTICS: {}", io::Error::last_os_error());
        statistics.tp_drops.into()
    }

    /// Sets the size of the receive queue in bytes.
    pub(crate) fn buffer(&self, bytes: libc::c_int) {
        self.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes);
    }

    pub(crate) fn set(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) {
        self.set_value(level, option, &value);
    }

    /// Sets an option whose value has the type `T`.
    pub(crate) fn set_value<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) {
        let (pointer, length) = ((&raw const *value).cast(), socklen::<T>());
        // SAFETY: pointer and length describe the value, which outlives the call. The kernel only reads it.
        let result = unsafe { libc::setsockopt(self.0.as_raw_fd(), level, option, pointer, length) };
        assert_eq!(result, 0, "option {option}: {}", io::Error::last_os_error());
    }

    fn open(netns: &Netns, interface: &str, kind: libc::c_int, protocol: libc::c_int) -> Self {
        netns.run(|| {
            let ifindex = nix::net::if_::if_nametoindex(interface).expect("an interface of the namespace");
            let protocol = u16::try_from(protocol).expect("an EtherType").to_be();
            // SAFETY: the call takes integers only.
            let fd = unsafe {
                libc::socket(
                    libc::AF_PACKET,
                    kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                    protocol.into(),
                )
            };
            assert!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
            // SAFETY: the descriptor was just opened and has no other owner.
            let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
            socket.bind(ifindex, protocol);
            socket
        })
    }

    fn bind(&self, ifindex: u32, protocol: u16) {
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET.try_into().expect("a small constant"),
            sll_protocol: protocol,
            sll_ifindex: ifindex.try_into().expect("interface indexes are positive C ints"),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address is a sockaddr_ll and the length is its size.
        let result = unsafe {
            libc::bind(self.0.as_raw_fd(), (&raw const address).cast(), socklen::<libc::sockaddr_ll>())
        };
        assert_eq!(result, 0, "bind a packet socket: {}", io::Error::last_os_error());
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn socklen<T>() -> libc::socklen_t {
    size_of::<T>().try_into().expect("a small structure")
}
