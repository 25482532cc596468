//! Dumps of rtnetlink in bounded memory.
//!
//! The connection of the library queues a whole dump in decoded form: about 14 KiB for each interface, and a node can have a
//! million routes. Here the caller reads a datagram of the kernel before the next one is received.

use std::io;

use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage},
    packet_route::RouteNetlinkMessage,
    sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE},
};

/// Requests a dump, and passes each datagram of the answer to `read`, which returns true for the last one. With `is_strict`, the
/// kernel filters by the fields of the request if it can (`NETLINK_GET_STRICT_CHK`, Linux 4.20).
pub(super) async fn dump(
    request: RouteNetlinkMessage,
    is_strict: bool,
    mut read: impl FnMut(&[u8]) -> io::Result<bool>,
) -> io::Result<()> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    if is_strict {
        match socket.socket_mut().set_netlink_get_strict_chk(true) {
            Err(error) if error.raw_os_error() != Some(libc::ENOPROTOOPT) => return Err(error),
            _ => {}
        }
    }
    socket.socket_ref().connect(&SocketAddr::new(0, 0))?;
    socket.send(&serialize(request)).await?;
    loop {
        let (datagram, _) = socket.recv_from_full().await?;
        if read(&datagram)? {
            return Ok(());
        }
    }
}

fn serialize(request: RouteNetlinkMessage) -> Vec<u8> {
    let mut request = NetlinkMessage::from(request);
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    bytes
}
