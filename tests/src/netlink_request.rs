//! Netlink requests that the programs of a test machine cannot send.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};

/// Length of `struct nlmsghdr` in bytes.
const HEADER_LEN: usize = 16;

/// Sends a request in the calling thread's network namespace. Returns the first message of the reply without its
/// header, or an empty vector for an acknowledgement.
pub(crate) fn request(
    protocol: SockProtocol,
    kind: u16,
    flags: libc::c_int,
    body: &[u8],
) -> io::Result<Vec<u8>> {
    const NLMSG_ERROR: u16 = 2;
    let socket = open(protocol)?;
    let length = u32::try_from(HEADER_LEN + body.len()).expect("a short message");
    let flags = u16::try_from(flags | libc::NLM_F_REQUEST).expect("flags of 16 bits");
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let received = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let (header, payload) = answer[..received].split_at(HEADER_LEN);
    if header[4..6] != NLMSG_ERROR.to_ne_bytes() {
        return Ok(payload.to_vec());
    }
    // A message of type NLMSG_ERROR has the negative error number after its header.
    match i32::from_ne_bytes(*payload.first_chunk().expect("an error number")) {
        0 => Ok(Vec::new()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}

fn open(protocol: SockProtocol) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(5, 0))?;
    Ok(socket)
}

/// Encodes a netlink attribute, padded to 4 bytes.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("a short attribute");
    let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// Returns the value of the first attribute of this kind.
pub(crate) fn find_attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    while let [a, b, c, d, ..] = *attributes {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = attributes.get(4..length)?;
        if u16::from_ne_bytes([c, d]) == kind {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

pub(crate) fn c_string(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}
