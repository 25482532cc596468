//! Simulated metadata service that responds to each request at once, with a fixed document.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    thread,
};

use imds_tests::TestEnv;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::priority::Priority;

/// Address of the service. The other servers of the environment do not listen there.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 250);
/// Length of the document: about that of the instance document of Azure.
const DOCUMENT: usize = 2048;

/// Starts the service beyond the uplink of the node. The thread ends with the process.
pub(crate) fn start(env: &TestEnv) {
    env.fabric.ip(&format!("addr add {ADDRESS}/32 dev lo"));
    let listener = env.fabric.run(|| TcpListener::bind((ADDRESS, 80))).expect("bind to the endpoint");
    listener.set_nonblocking(true).expect("set O_NONBLOCK");
    let document = "x".repeat(DOCUMENT);
    let response = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {DOCUMENT}\r\n\r\n{document}"
    );
    thread::spawn(move || {
        // The service stands for another machine.
        Priority::RealTime.set(0);
        let mut connections = Vec::new();
        loop {
            wait(&listener, &connections);
            connections.retain_mut(|connection: &mut Connection| connection.serve(response.as_bytes()));
            while let Ok((stream, _)) = listener.accept() {
                stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).expect("set options");
                let mut connection = Connection { stream, request: Vec::new() };
                if connection.serve(response.as_bytes()) {
                    connections.push(connection);
                }
            }
        }
    });
}

fn wait(listener: &TcpListener, connections: &[Connection]) {
    let sources = connections.iter().map(|connection| connection.stream.as_fd()).chain([listener.as_fd()]);
    let mut fds: Vec<_> = sources.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    poll(&mut fds, PollTimeout::NONE).expect("poll");
}

struct Connection {
    stream: TcpStream,
    request: Vec<u8>,
}

impl Connection {
    /// Responds to a request if it is complete. Returns whether the connection stays open.
    fn serve(&mut self, response: &[u8]) -> bool {
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(length @ 1..) => self.request.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Ok(0) | Err(_) => return false,
            }
            if self.request.ends_with(b"\r\n\r\n") {
                self.request.clear();
                if self.stream.write_all(response).is_err() {
                    return false;
                }
            }
        }
    }
}
