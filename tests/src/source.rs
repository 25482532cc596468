//! Probes with a chosen source address or device.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt,
    },
};

use crate::{
    Netns,
    probe::{Outcome, http_exchange, timeval},
    services::{ECHO_PORT, HTTP_PORT},
};

/// Source address and device to which a process of the node binds its sockets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Source {
    /// Source address, which some routes depend on.
    pub address: Option<Ipv4Addr>,
    /// Device, such as a VRF.
    pub device: Option<&'static str>,
}

impl Source {
    /// Sends an HTTP request to `destination`.
    pub fn http_get(self, netns: &Netns, destination: Ipv4Addr, timeout: Duration) -> Outcome {
        let exchange = || {
            let socket =
                self.connected(SockType::Stream, SocketAddrV4::new(destination, HTTP_PORT), timeout)?;
            http_exchange(&mut TcpStream::from(socket), timeout)
        };
        netns.run(exchange).into()
    }

    /// Sends a datagram to the echo server at `destination`.
    pub fn udp_echo(self, netns: &Netns, destination: Ipv4Addr, timeout: Duration) -> Outcome {
        let exchange = || {
            let socket =
                self.connected(SockType::Datagram, SocketAddrV4::new(destination, ECHO_PORT), timeout)?;
            let socket = UdpSocket::from(socket);
            socket.set_read_timeout(Some(timeout))?;
            socket.send(b"echo")?;
            let mut buffer = [0; 16];
            let length = socket.recv(&mut buffer)?;
            Ok(buffer[..length].to_vec())
        };
        netns.run(exchange).into()
    }

    fn connected(self, kind: SockType, to: SocketAddrV4, timeout: Duration) -> io::Result<OwnedFd> {
        let socket = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)?;
        if let Some(device) = self.device {
            setsockopt(&socket, sockopt::BindToDevice, &device.into())?;
        }
        if let Some(address) = self.address {
            bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(address, 0)))?;
        }
        // The send timeout also limits connect(2).
        setsockopt(&socket, sockopt::SendTimeout, &timeval(timeout))?;
        match connect(socket.as_raw_fd(), &SockaddrIn::from(to)) {
            Ok(()) => Ok(socket),
            Err(Errno::EINPROGRESS) => Err(io::ErrorKind::TimedOut.into()),
            Err(errno) => Err(errno.into()),
        }
    }
}
