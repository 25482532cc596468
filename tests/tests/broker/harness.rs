//! Broker of a test, and pods with a listener.

use std::{
    cell::Cell,
    io::{self, IoSlice, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use imds_broker::protocol::{FromBroker, MAX_MESSAGE, Request, ToBroker};
use imds_tests::{Netns, executable::broker_executable, probe::LONG};
use nix::sys::{
    socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, setsockopt, socketpair,
        sockopt,
    },
    time::{TimeVal, TimeValLike as _},
};

/// Metadata service of the node.
pub(crate) const ENDPOINT: &str = "169.254.169.254:80";

/// Node with the address of a metadata service, and a broker.
pub(crate) struct Broker {
    pub(crate) node: Netns,
    pub(crate) child: Child,
    socket: Option<OwnedFd>,
    next_id: Cell<u32>,
}

/// Pod whose connections to the metadata service end at a listener of the broker.
pub(crate) struct BrokerPod {
    pub(crate) netns: Netns,
    pub(crate) address: SocketAddr,
    pub(crate) id: u32,
}

impl Broker {
    /// Starts a broker on a new node, and waits until it is ready.
    pub(crate) fn start() -> Self {
        Self::start_with(|node| node.command(broker_executable()), |_| {})
    }

    /// Starts a broker that may have this number of open descriptors.
    pub(crate) fn start_with_descriptors(limit: u32) -> Self {
        let command = |node: &Netns| {
            let mut command = node.command("sh");
            command.args(["-c", &format!("ulimit -n {limit} && exec \"$0\"")]).arg(broker_executable());
            command
        };
        Self::start_with(command, |_| {})
    }

    /// Starts a broker after `prepare` has changed its end of the socket.
    pub(crate) fn start_with(
        command: impl FnOnce(&Netns) -> Command,
        prepare: impl FnOnce(&OwnedFd),
    ) -> Self {
        let node = Netns::new("broker");
        node.ip("link set lo up\naddr add 169.254.169.254/32 dev lo\naddr add fd00:ec2::254/128 dev lo");
        let (socket, its_socket) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(10)).unwrap();
        prepare(&its_socket);
        let child = command(&node).stdin(Stdio::from(its_socket)).spawn().expect("start the broker");
        let broker = Self { node, child, socket: Some(socket), next_id: Cell::new(1) };
        assert_eq!(broker.receive(), FromBroker::Ready {});
        broker
    }

    fn socket(&self) -> &OwnedFd {
        self.socket.as_ref().expect("an open socket")
    }

    /// Returns the next message.
    pub(crate) fn receive(&self) -> FromBroker {
        let mut bytes = vec![0; MAX_MESSAGE];
        let length =
            recv(self.socket().as_raw_fd(), &mut bytes, MsgFlags::empty()).expect("a message of the broker");
        serde_json::from_slice(&bytes[..length]).expect("a valid message")
    }

    /// Returns the next message about a request.
    pub(crate) fn request(&self) -> Request {
        match self.receive() {
            FromBroker::Request(request) => request,
            other => panic!("{other:?}"),
        }
    }

    /// Returns the next message that is not about a request.
    pub(crate) fn reply(&self) -> FromBroker {
        loop {
            match self.receive() {
                FromBroker::Request(_) => {}
                reply => return reply,
            }
        }
    }

    /// Sends bytes with descriptors.
    pub(crate) fn send_bytes(&self, bytes: &[u8], descriptors: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let rights = if descriptors.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(self.socket().as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::empty(), None)
            .unwrap();
    }

    pub(crate) fn send(&self, message: &ToBroker, descriptors: &[RawFd]) {
        self.send_bytes(&serde_json::to_vec(message).unwrap(), descriptors);
    }

    /// Returns a message that opens a listener with a new number.
    pub(crate) fn listen(&self, provider: &str, allow: &[&str]) -> ToBroker {
        let id = self.next_id.replace(self.next_id.get() + 1);
        let allow = allow.iter().map(|&rule| rule.to_owned()).collect();
        ToBroker::Listen { id, endpoint: ENDPOINT.parse().unwrap(), provider: provider.to_owned(), allow }
    }

    /// Creates a pod with a listener.
    pub(crate) fn pod(&self, provider: &str, allow: &[&str]) -> BrokerPod {
        let netns = Netns::new("pod");
        netns.ip("link set lo up");
        self.pod_in(netns, &self.listen(provider, allow))
    }

    /// Opens a listener in a pod.
    pub(crate) fn pod_in(&self, netns: Netns, listen: &ToBroker) -> BrokerPod {
        let &ToBroker::Listen { id, .. } = listen else { panic!("{listen:?}") };
        let listener = netns.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        self.send(listen, &[listener.as_fd().as_raw_fd()]);
        assert_eq!(self.reply(), FromBroker::Listening { id });
        BrokerPod { netns, address: listener.local_addr().unwrap(), id }
    }

    /// Closes a listener and waits for the confirmation.
    pub(crate) fn close(&self, id: u32) {
        self.send(&ToBroker::Close { id }, &[]);
        assert_eq!(self.reply(), FromBroker::Closed { id, error: None });
    }

    /// Closes the socket, and waits for the end of the broker.
    pub(crate) fn close_socket(&mut self) -> ExitStatus {
        self.socket = None;
        self.child.wait().unwrap()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.socket = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl BrokerPod {
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = self.netns.run(|| TcpStream::connect_timeout(&self.address, LONG)).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
        stream
    }

    /// Sends bytes on a new connection, and returns all that the broker responds.
    pub(crate) fn exchange(&self, request: impl AsRef<[u8]>) -> String {
        let mut stream = self.connect();
        // The broker may respond and close the connection before it has read everything.
        let _ = stream.write_all(request.as_ref());
        read_all(&mut stream)
    }

    /// Sends a request that closes the connection.
    pub(crate) fn request(&self, method: &str, target: &str, headers: &str) -> String {
        self.exchange(format!(
            "{method} {target} HTTP/1.1\r\nHost: 169.254.169.254\r\n{headers}Connection: close\r\n\r\n"
        ))
    }

    pub(crate) fn get(&self, target: &str) -> String {
        self.request("GET", target, "")
    }
}

/// Returns what the broker sends until it closes or resets the connection.
pub(crate) fn read_all(stream: &mut TcpStream) -> String {
    let mut response = Vec::new();
    match stream.read_to_end(&mut response) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&response)),
    }
    String::from_utf8(response).unwrap()
}

/// Returns the status of a response, or 0 for an empty one.
pub(crate) fn status(response: &str) -> u16 {
    response.split(' ').nth(1).map_or(0, |status| status.parse().expect("a status"))
}
