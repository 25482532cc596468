//! Network namespaces of pods behind host-side interfaces.
//!
//! They are searched only while an interface leads to a namespace that no other source knows: first those with a name, then those of
//! processes.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    link::Link,
    namespace_paths::inode_at,
    netlink::Netlink,
    netns,
    sender_resolver::{NAMED, Namespace, entries, process_namespaces},
};

/// Shortest and longest interval between two searches for the same interfaces.
const SEARCH_DELAYS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));

/// Host-side interface by its index, and the ID of the network namespace of its peer.
type Peer = (u32, i32);

/// Network namespaces of pods that were found.
#[derive(Debug, Default)]
pub struct PodNamespaces {
    /// Cookie and inode number of the namespaces.
    found: BTreeMap<Peer, (u64, u64)>,
    /// Interfaces for which the last search found nothing.
    unknown: BTreeSet<Peer>,
    /// Time of the next search for them, and the delay before it.
    next_search: Option<(Instant, Duration)>,
}

impl PodNamespaces {
    /// Searches the namespaces behind `links`, which are links of pods. Returns the inode numbers by netns cookie; empty on kernels
    /// without cookies (before Linux 5.14).
    pub async fn update(&mut self, netlink: &Netlink, links: &[&Link]) -> BTreeMap<u64, u64> {
        let peers: BTreeSet<Peer> =
            links.iter().filter_map(|link| Some((link.index, link.peer_netns?))).collect();
        self.found.retain(|peer, _| peers.contains(peer));
        let missing = self.missing(&peers);
        if let Some(delay) = self.delay_after(&missing, Instant::now()) {
            self.search(netlink, &missing).await;
            self.next_search = Some((Instant::now() + delay, delay));
            self.unknown = self.missing(&peers);
        }
        self.found.values().copied().collect()
    }

    fn missing(&self, peers: &BTreeSet<Peer>) -> BTreeSet<Peer> {
        peers.iter().filter(|peer| !self.found.contains_key(peer)).copied().collect()
    }

    /// Returns the delay before the search after this one; `None` if no search is due. New interfaces have the shortest delay.
    fn delay_after(&self, missing: &BTreeSet<Peer>, now: Instant) -> Option<Duration> {
        let (shortest, longest) = SEARCH_DELAYS;
        match self.next_search {
            _ if missing.is_empty() => None,
            Some((at, delay)) if missing.is_subset(&self.unknown) => {
                (at <= now).then(|| (2 * delay).min(longest))
            }
            Some(_) | None => Some(shortest),
        }
    }

    /// Searches for the namespaces behind these interfaces.
    async fn search(&mut self, netlink: &Netlink, missing: &BTreeSet<Peer>) {
        let mut seen: BTreeSet<u64> = self.found.values().map(|(_, inode)| *inode).collect();
        seen.extend(netns::this_inode().map(u64::from));
        let mut ids: BTreeSet<i32> = missing.iter().map(|(_, id)| *id).collect();
        for path in NAMED.into_iter().flat_map(entries).chain(process_namespaces()) {
            if ids.is_empty() {
                break;
            }
            // A namespace may end at any time, and the name of a new one is another file at first.
            let Some(inode) = inode_at(&path).filter(|&inode| seen.insert(inode)) else { continue };
            let Ok(Namespace { file, .. }) = Namespace::open(&path) else { continue };
            let Ok(Some(id)) = netlink.netns_id(&file).await else { continue };
            if ids.remove(&id)
                && let Ok(Some(cookie)) = netns::cookie_of(&file)
            {
                let peers = missing.iter().filter(|peer| peer.1 == id);
                self.found.extend(peers.map(|&peer| (peer, (cookie, inode))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn searches_for_the_same_interfaces_become_rare() {
        let [first, second, third] = [(11, 1), (12, 2), (13, 3)];
        let now = Instant::now();
        let mut namespaces = PodNamespaces { found: [(first, (5, 6))].into(), ..PodNamespaces::default() };
        assert_eq!(namespaces.delay_after(&namespaces.missing(&[first].into()), now), None);
        let missing = namespaces.missing(&[first, second].into());
        assert_eq!(missing, [second].into());
        let mut delays = Vec::new();
        let mut time = now;
        for _ in 0..8 {
            let delay = namespaces.delay_after(&missing, time).expect("a search");
            namespaces.next_search = Some((time + delay, delay));
            namespaces.unknown.clone_from(&missing);
            assert_eq!(namespaces.delay_after(&missing, time), None);
            delays.push(delay.as_secs());
            time += delay;
        }
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60]);
        let with_new = [second, third].into();
        assert_eq!(namespaces.delay_after(&with_new, time - SEARCH_DELAYS.0), Some(SEARCH_DELAYS.0));
    }
}
