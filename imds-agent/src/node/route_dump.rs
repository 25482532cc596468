//! Dump of the node's routes, of which only the selected ones are kept.

use std::io;

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteMessage, RouteType},
};

use super::dump_socket::{Entry, dump};

/// Lists the routes of all tables that match `is_selected`. With `kind`, the kernel sends only routes of that type, if it can
/// filter dumps.
pub(super) async fn routes(
    family: AddressFamily,
    kind: Option<RouteType>,
    is_selected: impl Fn(&RouteMessage) -> bool,
) -> io::Result<Vec<RouteMessage>> {
    // The kernel rejects a strict dump with a scope, and uses the table and the protocol as further filters.
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    request.header.kind = kind.unwrap_or_default();
    let (mut found, mut unreadable) = (Vec::new(), 0_u64);
    dump(RouteNetlinkMessage::GetRoute(request), kind.is_some(), |entry| {
        match entry {
            Ok(Entry::Decoded(RouteNetlinkMessage::NewRoute(route))) => {
                found.extend(Some(route).filter(&is_selected));
            }
            Ok(_) => {}
            Err(_) => unreadable += 1,
        }
        Ok(())
    })
    .await?;
    if unreadable > 0 {
        log::warn!("ignored {unreadable} routes that cannot be decoded");
    }
    Ok(found)
}
