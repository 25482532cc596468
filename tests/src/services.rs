//! Servers in the fabric: HTTP and UDP echo, at the metadata addresses and at unprotected ones.

use std::{
    io::{self, ErrorKind, PipeReader, PipeWriter, Read as _, Write as _},
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    thread::{self, JoinHandle},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{Netns, documents};

pub(crate) const HTTP_PORT: u16 = 80;
pub(crate) const ECHO_PORT: u16 = 7;
/// Port of a resolver. HTTP and echo servers listen there, because only reachability is tested.
pub const DNS_PORT: u16 = 53;

const MAX_REQUEST: usize = 8192;

/// Servers that run in the background until they are dropped.
#[derive(Debug)]
pub struct Services {
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Services {
    /// Starts servers at each of `addresses`, which `fabric` must have.
    pub fn start(fabric: &Netns, addresses: &[IpAddr]) -> Self {
        let mut server = fabric.run(|| Server::bind(addresses)).expect("bind the fabric's servers");
        let (stopped, stop) = io::pipe().expect("a pipe");
        let thread = thread::spawn(move || while server.turn(&stopped) {});
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Server {
    listeners: Vec<TcpListener>,
    echoes: Vec<UdpSocket>,
    connections: Vec<Connection>,
}

struct Connection {
    stream: TcpStream,
    request: Vec<u8>,
}

impl Server {
    fn bind(addresses: &[IpAddr]) -> io::Result<Self> {
        let mut server = Self { listeners: Vec::new(), echoes: Vec::new(), connections: Vec::new() };
        for address in addresses {
            for port in [HTTP_PORT, DNS_PORT] {
                let listener = TcpListener::bind((*address, port))?;
                listener.set_nonblocking(true)?;
                server.listeners.push(listener);
            }
            for port in [ECHO_PORT, DNS_PORT] {
                let echo = UdpSocket::bind((*address, port))?;
                echo.set_nonblocking(true)?;
                server.echoes.push(echo);
            }
        }
        Ok(server)
    }

    /// Waits for I/O and handles it. Returns `false` once the servers must stop.
    fn turn(&mut self, stopped: &PipeReader) -> bool {
        let sources = (self.listeners.iter().map(AsFd::as_fd))
            .chain(self.echoes.iter().map(AsFd::as_fd))
            .chain(self.connections.iter().map(|connection| connection.stream.as_fd()))
            .chain([stopped.as_fd()]);
        let mut fds: Vec<_> = sources.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        poll(&mut fds, PollTimeout::NONE).expect("poll");
        if fds.last().and_then(PollFd::any) == Some(true) {
            return false;
        }
        // All sockets are non-blocking and few, so that each can be tried without checking which one is ready.
        self.connections.retain_mut(Connection::is_open_after_reading);
        self.echoes.iter().for_each(echo_all);
        for listener in &self.listeners {
            while let Ok((stream, _)) = listener.accept() {
                if stream.set_nonblocking(true).is_ok() {
                    self.connections.push(Connection { stream, request: Vec::new() });
                }
            }
        }
        true
    }
}

impl Connection {
    /// Reads available bytes and responds to a complete request. Returns whether the connection stays open.
    fn is_open_after_reading(&mut self) -> bool {
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(1..) if self.request.len() > MAX_REQUEST => return false,
                Ok(length @ 1..) => self.request.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Ok(0) | Err(_) => return false,
            }
            if self.request.ends_with(b"\r\n\r\n") {
                let answer = documents::respond(&self.request);
                // Ignores errors: the client may have closed the connection, and a waiting client has enough buffer
                // space.
                let _ = self.stream.write_all(answer.as_bytes());
                return false;
            }
        }
    }
}

fn echo_all(socket: &UdpSocket) {
    let mut buffer = [0; 2048];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        let _ = socket.send_to(&buffer[..length], from);
    }
}
