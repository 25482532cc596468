//! Dump of the node's interfaces, of which only the [`Link`]s are kept.

use std::{collections::BTreeMap, io};

use rtnetlink::{
    packet_core::{NLM_F_DUMP_INTR, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        link::{LinkAttribute, LinkExtentMask, LinkMessage},
    },
};

use super::{
    datagram::{Content, Message, messages},
    dump_socket,
    link::Link,
};

/// Maximum number of dumps, if interfaces come and go during each of them.
const MAX_ATTEMPTS: usize = 5;

/// Interfaces of a dump.
#[derive(Debug, Default)]
struct Dump {
    links: Vec<Link>,
    /// The list of interfaces changed between two datagrams, so that the kernel may have left out others.
    is_interrupted: bool,
    is_complete: bool,
}

/// Lists all interfaces of the calling thread's network namespace. If interfaces are deleted during the dump, the list may
/// still have them.
pub(super) async fn links() -> io::Result<Vec<Link>> {
    let mut found = BTreeMap::new();
    for _ in 0..MAX_ATTEMPTS {
        let dump = dump().await?;
        if !dump.is_interrupted {
            return Ok(dump.links);
        }
        // An interface that one dump leaves out is in another one.
        found.extend(dump.links.into_iter().map(|link| (link.index, link)));
    }
    Ok(found.into_values().collect())
}

async fn dump() -> io::Result<Dump> {
    let mut dump = Dump::default();
    dump_socket::dump(request(), false, |datagram| {
        dump.read(datagram)?;
        Ok(dump.is_complete)
    })
    .await?;
    Ok(dump)
}

/// Returns the request for a dump of all interfaces without their statistics, which the kernel sums over all CPUs.
fn request() -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    RouteNetlinkMessage::GetLink(message)
}

impl Dump {
    /// Adds the interfaces of a datagram.
    fn read(&mut self, datagram: &[u8]) -> io::Result<()> {
        for message in messages(datagram) {
            let Message { flags, content } = message?;
            self.is_interrupted |= flags & NLM_F_DUMP_INTR != 0;
            match content {
                Content::Payload(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link))) => {
                    self.links.extend(Link::from_message(link));
                }
                Content::Payload(NetlinkPayload::Done(done)) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(done.code.saturating_neg()));
                }
                Content::Payload(NetlinkPayload::Done(_)) => self.is_complete = true,
                Content::Payload(NetlinkPayload::Error(error)) if error.code.is_some() => {
                    return Err(error.to_io());
                }
                Content::Payload(_) => {}
                Content::UnreadableLink(link) => self.links.extend(link),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nix::net::if_::{Interface, if_nameindex};

    use super::*;
    use crate::node::datagram::{ALIGNMENT, NEW_LINK};

    fn read(datagram: &[u8]) -> io::Result<Dump> {
        let mut dump = Dump::default();
        dump.read(datagram).map(|()| dump)
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

    #[tokio::test]
    async fn dump_has_all_interfaces() {
        let links = links().await.unwrap();
        let mut found: Vec<_> = links.iter().map(|link| link.index).collect();
        found.sort_unstable();
        let mut names: Vec<_> = if_nameindex().unwrap().iter().map(Interface::index).collect();
        names.sort_unstable();
        assert_eq!(found, names);
        assert!(links.iter().any(|link| link.index == 1 && link.name == "lo"), "{links:#?}");
    }

    #[test]
    fn undecodable_interface_is_kept() {
        // A name that ends in the middle of a character.
        let name = [8, 0, 3, 0, b'a', 0xc3, 0, 0];
        let datagram = [loopback(&name), done(0)].concat();
        let dump = read(&datagram).unwrap();
        assert_eq!(dump.links, [Link::unreadable(1, "lo".to_owned())]);
        assert!(dump.is_complete && !dump.is_interrupted);
    }

    #[test]
    fn interrupted_dump_is_marked() {
        let mut datagram = [done(0), loopback(&[])].concat();
        datagram[6..8].copy_from_slice(&NLM_F_DUMP_INTR.to_ne_bytes());
        let dump = read(&datagram).unwrap();
        assert!(dump.is_complete && dump.is_interrupted);
    }

    #[test]
    fn errors_end_the_dump() {
        assert_eq!(read(&done(-libc::EBUSY)).unwrap_err().raw_os_error(), Some(libc::EBUSY));
        let denied = message(2, &[&(-libc::EPERM).to_ne_bytes()[..], &[0; 16]].concat());
        assert_eq!(read(&denied).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert!(read(&[1, 2, 3]).is_err());
        assert!(!read(&[]).unwrap().is_complete);
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
