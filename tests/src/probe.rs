//! Probes: attempts of a program in a namespace to reach an address.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, SocketAddrV4, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Type};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, setsockopt, socket,
    sockopt,
};

use crate::{
    Netns,
    poll::try_poll,
    scale::scaled_timeout,
    services::{ECHO_PORT, HTTP_PORT},
};

/// Timeout of a probe that should fail: several hundred round-trip times.
pub const SHORT: Duration = Duration::from_millis(400);
/// Time limit for repeating a probe that should succeed, for busy machines.
pub const LONG: Duration = Duration::from_secs(5);

/// Result of a probe of a server.
#[derive(Debug)]
pub enum Outcome {
    /// Bytes of the response.
    Answer(Vec<u8>),
    /// No response within the timeout.
    Timeout,
    /// Connection refused or port unreachable.
    Refused,
    /// An error of the local kernel or of a router.
    Error(io::Error),
}

impl Outcome {
    /// Reports whether a response was received.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        matches!(self, Self::Answer(_))
    }
}

impl From<io::Result<Vec<u8>>> for Outcome {
    fn from(result: io::Result<Vec<u8>>) -> Self {
        match result {
            Ok(answer) => Self::Answer(answer),
            Err(error) => match error.kind() {
                ErrorKind::TimedOut | ErrorKind::WouldBlock => Self::Timeout,
                ErrorKind::ConnectionRefused => Self::Refused,
                _ => Self::Error(error),
            },
        }
    }
}

/// Reports whether the HTTP server at `address` responds within [`LONG`], or longer on emulated machines.
pub fn reachable(netns: &Netns, address: impl Into<IpAddr>) -> bool {
    let address = address.into();
    let deadline = scaled_timeout(LONG);
    try_poll(deadline, || http_get(netns, address, SHORT).is_answer().then_some(())).is_some()
}

/// Sends an HTTP request to `address`.
pub fn http_get(netns: &Netns, address: impl Into<IpAddr>, timeout: Duration) -> Outcome {
    http_get_at(netns, (address.into(), HTTP_PORT).into(), timeout)
}

/// Sends an HTTP request to any address and port.
pub fn http_get_at(netns: &Netns, address: SocketAddr, timeout: Duration) -> Outcome {
    let connected = netns.run(|| TcpStream::connect_timeout(&address, timeout));
    let exchange = |mut stream: TcpStream| {
        let answer = http_exchange(&mut stream, timeout);
        // Shut down explicitly: a forked child of another thread has a copy of the socket until its execve(2), so that
        // closing ours would not reset the connection.
        let _reset_already = stream.shutdown(Shutdown::Both);
        answer
    };
    connected.and_then(exchange).into()
}

/// Opens a connection to the HTTP server at `address` from the calling thread's namespace.
pub fn connect(address: Ipv4Addr, timeout: Duration) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&SocketAddr::from((address, HTTP_PORT)), timeout)
}

/// Sends an HTTP request on an open connection.
pub fn http_exchange(stream: &mut TcpStream, timeout: Duration) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(timeout))?;
    stream.write_all(b"GET /metadata/instance HTTP/1.1\r\nHost: metadata\r\nMetadata: true\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if answer.starts_with(b"HTTP/1.1 200 ") { Ok(answer) } else { Err(ErrorKind::InvalidData.into()) }
}

/// Sends a datagram to the echo server at `address`.
pub fn udp_echo(netns: &Netns, address: impl Into<IpAddr>, timeout: Duration) -> Outcome {
    udp_echo_at(netns, (address.into(), ECHO_PORT).into(), timeout)
}

/// Sends a datagram to an echo server at any address and port.
pub fn udp_echo_at(netns: &Netns, address: SocketAddr, timeout: Duration) -> Outcome {
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let exchange = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(address)?;
        socket.set_read_timeout(Some(timeout))?;
        socket.send(b"echo")?;
        let mut buffer = [0; 16];
        let length = socket.recv(&mut buffer)?;
        Ok(buffer[..length].to_vec())
    };
    netns.run(exchange).into()
}

/// Sends an ICMP echo request to `address`.
pub fn icmp_echo(netns: &Netns, address: Ipv4Addr, timeout: Duration) -> Outcome {
    let echo = IcmpEchoHeader { id: 0x1b4d, seq: 1 };
    let mut request = Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), b"echo").to_bytes().to_vec();
    request.extend_from_slice(b"echo");
    let is_reply = |packet: &[u8]| {
        let ip = etherparse::Ipv4Slice::from_slice(packet).ok()?;
        let (header, _) = Icmpv4Header::from_slice(ip.payload().payload).ok()?;
        Some(ip.header().source_addr() == address && header.icmp_type == Icmpv4Type::EchoReply(echo))
    };
    let exchange = || {
        let protocol = SockProtocol::Icmp;
        let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeval(timeout))?;
        let to = SockaddrIn::from(SocketAddrV4::new(address, 0));
        sendto(socket.as_raw_fd(), &request, &to, MsgFlags::empty())?;
        let end = Instant::now() + timeout;
        let mut buffer = [0; 256];
        while Instant::now() < end {
            let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            if is_reply(&buffer[..length]) == Some(true) {
                return Ok(buffer[..length].to_vec());
            }
        }
        Err(ErrorKind::TimedOut.into())
    };
    netns.run(exchange).into()
}

/// Sends IP packets with their headers. The kernel fills in source, ID and checksum if they are zero.
pub fn send_ipv4(netns: &Netns, destination: Ipv4Addr, packets: &[Vec<u8>]) -> io::Result<()> {
    netns.run(|| {
        let socket = raw_socket()?;
        let to = SockaddrIn::from(SocketAddrV4::new(destination, 0));
        for packet in packets {
            sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty())?;
        }
        Ok(())
    })
}

/// Opens a socket that sends IP packets with their headers (raw(7): `IPPROTO_RAW` implies `IP_HDRINCL`).
pub(crate) fn raw_socket() -> nix::Result<std::os::fd::OwnedFd> {
    socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)
}

pub(crate) fn timeval(duration: Duration) -> nix::sys::time::TimeVal {
    let microseconds = duration.as_micros().try_into().expect("a timeout of less than 290,000 years");
    nix::sys::time::TimeValLike::microseconds(microseconds)
}
