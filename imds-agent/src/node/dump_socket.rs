//! Dumps of rtnetlink in bounded memory.
//!
//! The connection of the library queues a whole dump in decoded form: about 14 KiB for each interface, and a node can have a
//! million routes. Here the caller reads a datagram of the kernel before the next one is received.

use std::io;

use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
    sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE},
};

use super::{
    datagram::{Content, Message, messages},
    link::Link,
};

/// Entry of a dump.
#[derive(Debug)]
pub(super) enum Entry {
    /// The decoded message.
    Decoded(RouteNetlinkMessage),
    /// Interface of a message that the library cannot decode; `None` if the interface is deleted by now.
    UnreadableLink(Option<Link>),
}

/// Requests a dump, and passes each entry to `keep`, or the error if it cannot be decoded. With `is_strict`, the kernel filters by the
/// fields of the request if it can (`NETLINK_GET_STRICT_CHK`, Linux 4.20).
///
/// Returns true if the dumped table changed between two datagrams, so that entries may be missing. Fails with the errors of the kernel
/// and of `keep`.
pub(super) async fn dump(
    request: RouteNetlinkMessage,
    is_strict: bool,
    mut keep: impl FnMut(io::Result<Entry>) -> io::Result<()>,
) -> io::Result<bool> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    if is_strict {
        match socket.socket_mut().set_netlink_get_strict_chk(true) {
            Err(error) if error.raw_os_error() != Some(libc::ENOPROTOOPT) => return Err(error),
            _ => {}
        }
    }
    socket.socket_ref().connect(&SocketAddr::new(0, 0))?;
    socket.send(&serialize(request)).await?;
    let mut progress = Progress::default();
    while !progress.is_complete {
        let (datagram, _) = socket.recv_from_full().await?;
        progress.read(&datagram, &mut keep)?;
    }
    Ok(progress.is_interrupted)
}

fn serialize(request: RouteNetlinkMessage) -> Vec<u8> {
    let mut request = NetlinkMessage::from(request);
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    bytes
}

/// State of a dump between two datagrams.
#[derive(Debug, Default)]
struct Progress {
    is_interrupted: bool,
    is_complete: bool,
}

impl Progress {
    /// Passes the entries of a datagram to `keep`.
    fn read(
        &mut self,
        datagram: &[u8],
        keep: &mut impl FnMut(io::Result<Entry>) -> io::Result<()>,
    ) -> io::Result<()> {
        for message in messages(datagram) {
            let entry = match message {
                Ok(Message { flags, content }) => {
                    self.is_interrupted |= flags & NLM_F_DUMP_INTR != 0;
                    self.entry(content)?.map(Ok)
                }
                Err(error) => Some(Err(error)),
            };
            entry.map_or(Ok(()), &mut *keep)?;
        }
        Ok(())
    }

    /// Returns the entry of a message; `None` if the message has none.
    fn entry(&mut self, content: Content) -> io::Result<Option<Entry>> {
        match content {
            Content::Payload(NetlinkPayload::InnerMessage(message)) => Ok(Some(Entry::Decoded(message))),
            Content::Payload(NetlinkPayload::Done(done)) if done.code < 0 => {
                Err(io::Error::from_raw_os_error(done.code.saturating_neg()))
            }
            Content::Payload(NetlinkPayload::Done(_)) => {
                self.is_complete = true;
                Ok(None)
            }
            Content::Payload(NetlinkPayload::Error(error)) if error.code.is_some() => Err(error.to_io()),
            Content::Payload(_) => Ok(None),
            Content::UnreadableLink(link) => Ok(Some(Entry::UnreadableLink(link))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::datagram::{ALIGNMENT, NEW_LINK};

    /// Reads a datagram, and fails with the first error.
    fn read(datagram: &[u8]) -> io::Result<(Progress, Vec<Entry>)> {
        let (mut progress, mut entries) = (Progress::default(), Vec::new());
        progress.read(datagram, &mut |entry| {
            entries.push(entry?);
            Ok(())
        })?;
        Ok((progress, entries))
    }

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + payload.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes
    }

    /// Returns a description of the loopback interface that ends with `attribute`.
    fn loopback(attribute: &[u8]) -> Vec<u8> {
        let mut payload = vec![0; 16];
        payload[4..8].copy_from_slice(&1_u32.to_ne_bytes());
        payload.extend(attribute);
        message(NEW_LINK, &payload)
    }

    fn done(code: i32) -> Vec<u8> {
        message(3, &code.to_ne_bytes())
    }

    #[test]
    fn undecodable_interface_is_kept() {
        // A name that ends in the middle of a character.
        let name = [8, 0, 3, 0, b'a', 0xc3, 0, 0];
        let (progress, entries) = read(&[loopback(&name), done(0)].concat()).unwrap();
        let [Entry::UnreadableLink(Some(link))] = &entries[..] else { panic!("{entries:?}") };
        assert_eq!(*link, Link::unreadable(1, "lo".to_owned()));
        assert!(progress.is_complete && !progress.is_interrupted);
    }

    #[test]
    fn interrupted_dump_is_marked() {
        let mut datagram = [done(0), loopback(&[])].concat();
        datagram[6..8].copy_from_slice(&NLM_F_DUMP_INTR.to_ne_bytes());
        let (progress, entries) = read(&datagram).unwrap();
        assert!(progress.is_complete && progress.is_interrupted);
        assert!(matches!(entries[..], [Entry::Decoded(RouteNetlinkMessage::NewLink(_))]), "{entries:?}");
    }

    #[test]
    fn errors_end_the_dump() {
        assert_eq!(read(&done(-libc::EBUSY)).unwrap_err().raw_os_error(), Some(libc::EBUSY));
        let denied = message(2, &[&(-libc::EPERM).to_ne_bytes()[..], &[0; 16]].concat());
        assert_eq!(read(&denied).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert!(read(&[1, 2, 3]).is_err());
        assert!(!read(&[]).unwrap().0.is_complete);
    }

    #[test]
    fn undecodable_entry_does_not_end_the_dump() {
        let route = 24;
        let (mut progress, mut entries) = (Progress::default(), Vec::new());
        let datagram = [message(route, &[0; 2]), done(0)].concat();
        progress
            .read(&datagram, &mut |entry| {
                entries.push(entry);
                Ok(())
            })
            .unwrap();
        assert!(progress.is_complete && matches!(entries[..], [Err(_)]), "{entries:?}");
    }

    #[test]
    fn short_lengths_do_not_repeat_a_message() {
        for length in 0..16_u32 {
            let mut datagram = loopback(&[]);
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(read(&datagram).is_err(), "{length}");
        }
    }
}
