//! Socket between the agent and the broker.

use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd as _, OwnedFd},
};

use imds_broker::protocol::{FromBroker, MAX_MESSAGE, ToBroker};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, recv, sendmsg, shutdown,
    socketpair,
};
use tokio::io::unix::AsyncFd;

/// The agent's end of the socket.
#[derive(Debug)]
pub(super) struct Channel {
    socket: AsyncFd<OwnedFd>,
}

/// Result of a read.
pub(super) enum Received {
    Message(FromBroker),
    /// A packet that is no message of this version.
    Invalid(String),
    /// The broker has closed its end.
    Ended,
}

impl Channel {
    /// Creates the socket pair. Returns the agent's end and the broker's.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (own, brokers) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: an owned descriptor stays open and unchanged until it is dropped, which also ends the registration.
        let socket = unsafe { AsyncFd::register(own) }?;
        Ok((Self { socket }, brokers))
    }

    /// Sends a message with at most one descriptor. Returns `false` if the socket is full.
    pub(super) fn send(&self, message: &ToBroker, descriptor: Option<&OwnedFd>) -> io::Result<bool> {
        let text = encode(message)?;
        let descriptors: Vec<_> = descriptor.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let rights = if descriptors.is_empty() { &rights[..0] } else { &rights[..] };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let socket = self.socket.get_ref().as_raw_fd();
        match sendmsg::<()>(socket, &[IoSlice::new(&text)], rights, flags, None) {
            Ok(_) => Ok(true),
            Err(nix::errno::Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Reads a message, or returns `None` if there is none.
    pub(super) fn receive(&self) -> io::Result<Option<Received>> {
        let mut buffer = vec![0; MAX_MESSAGE + 1];
        let length = match recv(self.socket.get_ref().as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(nix::errno::Errno::ECONNRESET) => return Ok(Some(Received::Ended)),
            Ok(length) => length,
            Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let text = buffer.get(..length.min(MAX_MESSAGE)).unwrap_or_default();
        let decoded = serde_json::from_slice(text);
        Ok(Some(decoded.map_or_else(|error| Received::Invalid(error.to_string()), Received::Message)))
    }

    /// Closes the connection, after which the broker ends.
    pub(super) fn shut_down(&self) {
        // The connection may be closed already.
        let _closed = shutdown(self.socket.get_ref().as_raw_fd(), Shutdown::Both);
    }

    /// Waits until there may be a message.
    pub(super) async fn readable(&self) {
        if let Ok(mut ready) = self.socket.readable().await {
            // Clear before reading: a message that arrives during the read then makes it ready again.
            ready.clear_ready();
        }
    }

    /// Waits until the socket may have room.
    pub(super) async fn writable(&self) {
        if let Ok(mut ready) = self.socket.writable().await {
            ready.clear_ready();
        }
    }
}

/// Encodes a message. Returns an error if it is too long for the broker.
fn encode(message: &ToBroker) -> io::Result<Vec<u8>> {
    let text = serde_json::to_vec(message)?;
    if text.len() > MAX_MESSAGE {
        return Err(io::Error::other(format!("the message has more than {MAX_MESSAGE} bytes")));
    }
    Ok(text)
}

/// Reports whether the broker accepts a message of this length.
pub(in crate::controller) fn fits(message: &ToBroker) -> bool {
    encode(message).is_ok()
}
