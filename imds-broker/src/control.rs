//! Socket between the broker and the agent.

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use imds_broker::protocol::{FromBroker, MAX_MESSAGE, ToBroker};
use nix::{
    cmsg_space,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Socket of type `SOCK_SEQPACKET`. The kernel keeps the boundaries of messages.
#[derive(Debug)]
pub(crate) struct Control(AsyncFd<OwnedFd>);

/// Message of the agent.
#[derive(Debug)]
pub(crate) struct Received {
    /// Message, or an error if its bytes are not one.
    pub(crate) message: Result<ToBroker, String>,
    /// Descriptors that came with the message.
    pub(crate) descriptors: Vec<OwnedFd>,
}

impl Control {
    /// Takes a duplicate of the socket.
    pub(crate) fn new(socket: impl AsFd) -> Result<Self> {
        let socket = socket.as_fd().try_clone_to_owned().context("failed to duplicate the socket")?;
        set_nonblocking(&socket)?;
        // SAFETY: the socket owns its descriptor, and always returns that one.
        let socket = unsafe { AsyncFd::register(socket) }.context("standard input is not a socket")?;
        Ok(Self(socket))
    }

    /// Waits for a message. Returns `None` once the agent has closed the socket.
    pub(crate) async fn receive(&self) -> io::Result<Option<Received>> {
        match self.0.async_io(Interest::READABLE, receive).await {
            // The kernel returns this error if the agent closed the socket with unread messages.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            received => received,
        }
    }

    /// Sends a message, and waits while the socket is full.
    pub(crate) async fn send(&self, message: &FromBroker) -> io::Result<()> {
        self.0.async_io(Interest::WRITABLE, |socket| send_now(socket, message)).await
    }

    /// Sends a message unless the socket is full.
    pub(crate) fn try_send(&self, message: &FromBroker) -> io::Result<()> {
        send_now(self.0.get_ref(), message)
    }
}

/// Makes a descriptor non-blocking with fcntl(2), which seccomp allows. The standard library uses ioctl(2).
pub(crate) fn set_nonblocking(descriptor: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&descriptor, FcntlArg::F_GETFL)?);
    fcntl(&descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn send_now(socket: &OwnedFd, message: &FromBroker) -> io::Result<()> {
    let message = serde_json::to_vec(message)?;
    send(socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> io::Result<Option<Received>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = cmsg_space!([libc::c_int; 4]);
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let received =
        recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let (length, is_cut) = (received.bytes, received.flags.contains(MsgFlags::MSG_TRUNC));
    let mut descriptors = Vec::new();
    for message in received.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just created these descriptors for this process.
            descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    if length == 0 && !is_cut {
        return Ok(None);
    }
    let message = if is_cut {
        Err(format!("longer than {MAX_MESSAGE} bytes"))
    } else {
        serde_json::from_slice(&bytes[..length]).map_err(|error| error.to_string())
    };
    Ok(Some(Received { message, descriptors }))
}
