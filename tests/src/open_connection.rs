//! A TCP connection that is open before the agent starts. The test controls both ends.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use crate::{
    METADATA, Netns, TestEnv,
    probe::{LONG, SHORT},
};

/// A connection of a pod to the metadata service, on a port of its own.
#[derive(Debug)]
pub struct OpenConnection {
    pod: TcpStream,
    service: TcpStream,
}

impl TestEnv {
    /// Opens a connection from `netns` to the metadata service, by a call in the environment's cgroup.
    #[track_caller]
    pub fn open_connection(&self, netns: &Netns) -> OpenConnection {
        let listener = self.fabric.run(|| TcpListener::bind((METADATA, 0))).expect("bind a service");
        let address = listener.local_addr().expect("the address of a bound socket");
        let pod = self.in_cgroup(|| netns.run(|| TcpStream::connect_timeout(&address, LONG)));
        let (service, _) = listener.accept().expect("accept a connection that is open");
        OpenConnection { pod: pod.expect("connect to the service"), service }
    }
}

impl OpenConnection {
    /// Sends a request of the pod. Reports whether it arrives at the service within `deadline`, retransmissions
    /// included.
    pub fn request(&mut self, request: &[u8], deadline: Duration) -> bool {
        self.pod.write_all(request).expect("write to a connection");
        self.has_arrived(request, deadline)
    }

    /// Reports whether the service receives this request, which the pod has sent before, within `deadline`.
    pub fn has_arrived(&mut self, request: &[u8], deadline: Duration) -> bool {
        receives(&mut self.service, request, deadline)
    }

    /// Sends a response of the service. Reports whether the pod receives it.
    pub fn respond(&mut self, response: &[u8]) -> bool {
        self.service.write_all(response).expect("write to a connection");
        receives(&mut self.pod, response, LONG)
    }

    /// Sends a long response of the service. Returns the number of bytes that the pod receives.
    pub fn respond_at_length(&mut self) -> usize {
        const LENGTH: usize = 1 << 20;
        self.service.set_write_timeout(Some(SHORT)).expect("a timeout");
        // The send buffer can be smaller than the response.
        let _timed_out = self.service.write_all(&vec![0; LENGTH]);
        self.pod.set_read_timeout(Some(SHORT)).expect("a timeout");
        let (mut received, mut buffer) = (0, [0; 4096]);
        while let Ok(length @ 1..) = self.pod.read(&mut buffer) {
            received += length;
        }
        received
    }

    /// Reports whether the kernel has aborted the pod's end.
    #[must_use]
    pub fn is_aborted(&mut self) -> bool {
        self.pod.set_read_timeout(Some(SHORT)).expect("a timeout");
        self.pod.read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::ConnectionAborted)
    }
}

fn receives(stream: &mut TcpStream, expected: &[u8], deadline: Duration) -> bool {
    stream.set_read_timeout(Some(deadline)).expect("a timeout");
    let mut found = vec![0; expected.len()];
    match stream.read_exact(&mut found) {
        Ok(()) => found == expected,
        Err(error) => {
            let is_timeout = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            assert!(is_timeout, "read from a connection: {error}");
            false
        }
    }
}
