//! Messages of a datagram from rtnetlink.

use std::{io, iter};

use rtnetlink::{
    packet_core::{DecodeError, NetlinkBuffer, NetlinkMessage, NetlinkPayload},
    packet_route::{AddressFamily, RouteNetlinkMessage},
};

use super::link::{self, Link};

/// Alignment of netlink messages in bytes (`NLMSG_ALIGNTO`, include/uapi/linux/netlink.h).
pub(super) const ALIGNMENT: usize = 4;
/// Type of the messages that describe an interface (`RTM_NEWLINK`, include/uapi/linux/rtnetlink.h).
pub(super) const NEW_LINK: u16 = 16;

/// Message of a datagram.
pub(super) struct Message {
    /// Flags of the header (`NLM_F_…`).
    pub(super) flags: u16,
    /// Content of the message.
    pub(super) content: Content,
}

/// Content of a [`Message`].
pub(super) enum Content {
    /// The decoded message.
    Payload(NetlinkPayload<RouteNetlinkMessage>),
    /// Interface of a message that the library cannot decode; `None` if the interface is deleted by now.
    UnreadableLink(Option<Link>),
}

/// Returns the messages of a datagram. No message follows one without a valid length.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = io::Result<Message>> {
    iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let message = NetlinkBuffer::new_checked(datagram);
        let length = message.as_ref().map_or(usize::MAX, |message| message.length() as usize);
        let end = length.checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX);
        let decoded = message.and_then(|message| decode(&message, datagram)).map_err(io::Error::other);
        datagram = datagram.get(end..).unwrap_or_default();
        Some(decoded)
    })
}

/// Decodes the first message of `datagram`, of which `header` has the fields.
fn decode(header: &NetlinkBuffer<&[u8]>, datagram: &[u8]) -> Result<Message, DecodeError> {
    let content = match NetlinkMessage::deserialize(datagram) {
        Ok(message) => Content::Payload(message.payload),
        Err(_) if header.message_type() == NEW_LINK => Content::UnreadableLink(unreadable(header.payload())),
        Err(error) => return Err(error),
    };
    Ok(Message { flags: header.flags(), content })
}

/// Returns the interface of a message that the library cannot decode, or `None` if the interface is deleted by now.
fn unreadable(message: &[u8]) -> Option<Link> {
    // The messages of a bridge about its ports have the same type but another family.
    if message.first().copied() != Some(AddressFamily::Unspec.into()) {
        return None;
    }
    // The field `ifi_index` of `struct ifinfomsg` (include/uapi/linux/rtnetlink.h).
    let index = message.get(4..8)?.try_into().ok().map(u32::from_ne_bytes)?;
    let name =
        link::name_of(index).or_else(|| (!link::is_deleted(index)).then(|| format!("ifindex {index}")));
    Some(Link::unreadable(index, name?))
}
