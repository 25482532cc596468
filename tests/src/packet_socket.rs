//! `AF_PACKET` sockets: whole frames, past every check that the IP stack makes.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use crate::Netns;

/// A packet socket bound to one interface.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// A socket that sends and receives whole frames on `interface` of `netns`.
    #[must_use]
    pub fn frames(netns: &Netns, interface: &str) -> Self {
        Self::open(netns, interface, libc::SOCK_RAW, libc::ETH_P_ALL)
    }

    /// A non-blocking socket that receives what arrives on `interface` of `netns` as IPv4, from its IP header on, before
    /// the IP stack judges it.
    #[must_use]
    pub(crate) fn ipv4(netns: &Netns, interface: &str) -> Self {
        Self::open(netns, interface, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, libc::ETH_P_IP)
    }

    /// Sends one frame, Ethernet header included.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: pointer and length are of one live slice.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Receives one packet, cut to the buffer's length.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        // SAFETY: pointer and length are of one live slice.
        let got = unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        Ok(&buffer[..got])
    }

    /// How many packets the kernel dropped because nobody had read the earlier ones, since the last call.
    pub(crate) fn take_dropped(&self) -> u64 {
        let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = socklen::<libc::tpacket_stats>();
        // SAFETY: the structure is the one that packet(7) names for this option, and outlives the call.
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

    /// Lets the socket hold up to `bytes` of unread packets.
    pub(crate) fn buffer(&self, bytes: libc::c_int) {
        // SAFETY: the option takes a C int, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                (&raw const bytes).cast(),
                socklen::<libc::c_int>(),
            )
        };
        assert_eq!(result, 0, "SO_RCVBUFFORCE: {}", io::Error::last_os_error());
    }

    fn open(netns: &Netns, interface: &str, kind: libc::c_int, protocol: libc::c_int) -> Self {
        netns.run(|| {
            let ifindex = nix::net::if_::if_nametoindex(interface).expect("an interface of the namespace");
            let protocol = u16::try_from(protocol).expect("an EtherType").to_be();
            // SAFETY: takes integers only.
            let fd = unsafe { libc::socket(libc::AF_PACKET, kind | libc::SOCK_CLOEXEC, protocol.into()) };
            assert!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
            // SAFETY: just opened, and nobody else's.
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
        // SAFETY: a packet socket's address, with its own length.
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
