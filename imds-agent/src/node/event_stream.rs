//! Stream of rtnetlink events in bounded memory.
//!
//! The connection of the library decodes every event at once and queues it without a limit. This stream receives a datagram only
//! after the events of the previous one are taken, so that the receive buffer of the socket is the only queue. While the buffer is
//! full, the kernel drops events, and reports ENOBUFS.

use std::io;

use futures_util::{Stream, StreamExt as _, stream};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use rtnetlink::{
    MulticastGroup,
    sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE},
};

use super::{
    datagram::{Content, messages},
    link_event::Event,
};

/// Size of the receive buffer in bytes, which the kernel doubles (socket(7)). The default of 208 KiB holds about 90 events of
/// interfaces, and this one 900. A CNI plugin causes about ten for a pod.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Subscribes to the events of these groups, which must be among the first 32. The stream ends only if the socket fails.
pub(super) fn subscribe(groups: &[MulticastGroup]) -> io::Result<impl Stream<Item = Event> + Unpin + use<>> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    let groups = groups.iter().fold(0, |bits, &group| bits | 1 << (group as u32 - 1));
    socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
    // Without CAP_NET_ADMIN in the initial user namespace, the default size stays.
    if let Err(error) = setsockopt(socket.socket_ref(), RcvBufForce, &RECEIVE_BUFFER) {
        log::debug!("failed to enlarge the receive buffer of rtnetlink events: {error}");
    }
    Ok(events(socket))
}

fn events(socket: TokioSocket) -> impl Stream<Item = Event> + Unpin {
    let datagrams = stream::unfold(socket, async |socket| Some((receive(&socket).await?, socket)));
    Box::pin(datagrams.flat_map(stream::iter))
}

/// Receives the events of the next datagram. Returns `None` if the socket fails.
async fn receive(socket: &TokioSocket) -> Option<Vec<Event>> {
    match socket.recv_from_full().await {
        Ok((datagram, _)) => Some(decode(&datagram)),
        Err(error) if is_overrun(&error) => {
            discard(socket);
            Some(vec![Event::Overrun])
        }
        Err(error) => {
            log::error!("failed to receive rtnetlink events: {error}");
            None
        }
    }
}

/// Discards the events in the receive buffer. After an overrun the kernel drops every event until the buffer is empty, without
/// another error (`netlink_overrun` in `net/netlink/af_netlink.c`): a resync that begins earlier would miss them.
fn discard(socket: &TokioSocket) {
    let mut datagram = Vec::new();
    while socket.socket_ref().recv(&mut datagram, 0).as_ref().err().is_none_or(is_overrun) {
        datagram.clear();
    }
}

fn is_overrun(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOBUFS)
}

/// Returns the events of a datagram. A message that cannot be decoded is left out, unless it describes an interface.
fn decode(datagram: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    for message in messages(datagram) {
        match message.map(|message| message.content) {
            Ok(Content::Payload(payload)) => events.extend(Event::from_payload(payload)),
            Ok(Content::UnreadableLink(link)) => events.extend(link.map(Event::Link)),
            Err(error) => log::warn!("failed to decode an rtnetlink event: {error}"),
        }
    }
    events
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use nix::unistd::geteuid;
    use rtnetlink::{
        packet_core::NetlinkMessage,
        packet_route::{RouteNetlinkMessage, link::LinkMessage},
        sys::{Socket, protocols::NETLINK_USERSOCK},
    };
    use tokio::task::yield_now;

    use super::*;

    fn link(index: u32) -> Vec<u8> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let mut message = NetlinkMessage::from(RouteNetlinkMessage::NewLink(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    #[track_caller]
    fn index(event: Option<Event>) -> u32 {
        match event {
            Some(Event::Link(link)) => link.index,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn events_wait_in_the_receive_buffer() {
        if !geteuid().is_root() {
            eprintln!("SKIPPED: only root can receive multicasts of processes");
            return;
        }
        let group = SocketAddr::new(0, 1);
        let mut receiver = TokioSocket::new(NETLINK_USERSOCK).unwrap();
        receiver.socket_mut().bind(&group).unwrap();
        let sender = Socket::new(NETLINK_USERSOCK).unwrap();
        // The call fails after the multicast, because port 0 is that of the kernel, which has no socket of this protocol.
        let send = |index| drop(sender.send_to(&link(index), &group, 0));
        let mut events = events(receiver);
        (1..=5).for_each(send);
        for expected in 1..=5 {
            assert_eq!(index(events.next().await), expected);
        }
        for index in 1..=10_000 {
            send(index);
            if index % 100 == 0 {
                // No background task may receive events.
                yield_now().await;
            }
        }
        assert!(matches!(events.next().await, Some(Event::Overrun)));
        // The events before the overrun are older than the resync that follows it.
        assert!(events.next().now_or_never().is_none());
        send(7);
        assert_eq!(index(events.next().await), 7);
    }

    #[test]
    fn undecodable_messages_do_not_hide_others() {
        // The name ends in the middle of a character.
        let name = [8, 0, 3, 0, b'a', 0xc3, 0, 0];
        let mut unreadable = [&link(1)[..], &name].concat();
        unreadable[0] += 8;
        let mut of_bridge = unreadable.clone();
        of_bridge[16] = 7;
        let events = decode(&[&link(3)[..], &unreadable, &of_bridge, &link(4), &[1, 2, 3]].concat());
        let indexes: Vec<_> = events.into_iter().map(|event| index(Some(event))).collect();
        assert_eq!(indexes, [3, 1, 4]);
    }
}
