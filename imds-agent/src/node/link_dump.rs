//! Dump of the node's interfaces, of which only the [`Link`]s are kept.

use std::{collections::BTreeMap, io};

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkExtentMask, LinkMessage},
};

use super::{
    dump_socket::{Entry, dump},
    link::Link,
};

/// Maximum number of dumps, if interfaces come and go during each of them.
const MAX_ATTEMPTS: usize = 5;

/// Lists all interfaces of the calling thread's network namespace. If interfaces are deleted during the dump, the list may
/// still have them.
pub(super) async fn links() -> io::Result<Vec<Link>> {
    let mut found = BTreeMap::new();
    for _ in 0..MAX_ATTEMPTS {
        let mut links = Vec::new();
        let is_interrupted = dump(request(), false, |entry| {
            links.extend(link(entry?));
            Ok(())
        })
        .await?;
        if !is_interrupted {
            return Ok(links);
        }
        // An interface that one dump leaves out is in another one.
        found.extend(links.into_iter().map(|link| (link.index, link)));
    }
    Ok(found.into_values().collect())
}

/// Returns the request for a dump of all interfaces without their statistics, which the kernel sums over all CPUs.
fn request() -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    RouteNetlinkMessage::GetLink(message)
}

/// Returns the interface of an entry; `None` if the entry has none.
fn link(entry: Entry) -> Option<Link> {
    match entry {
        Entry::Decoded(RouteNetlinkMessage::NewLink(link)) => Link::from_message(link),
        Entry::Decoded(_) => None,
        Entry::UnreadableLink(link) => link,
    }
}

#[cfg(test)]
mod tests {
    use nix::net::if_::{Interface, if_nameindex};

    use super::*;

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
}
