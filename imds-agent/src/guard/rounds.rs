//! Looking at everything again, for what there was no news of.

use std::collections::BTreeSet;

use super::{Guard, unless};
use crate::{datapath::DatapathError, node::links::Link};

/// How many links are looked at before news has its turn: a millisecond's worth.
const LINKS_AT_ONCE: usize = 8;

impl Guard {
    /// Begins to look at everything again, of links at what is attached and pinned: [`Guard::go_on`] does that for a few at
    /// a time, so that news need not wait for all of them. `anew`: whether interfaces and routes are read, too, of which the
    /// kernel sends news.
    pub async fn begin(&mut self, anew: bool) -> Result<(), DatapathError> {
        if self.is_looking() {
            return Ok(());
        }
        let begun = self.look_around();
        if anew {
            for link in self.read_links().await? {
                if self.links.get(&link.index) != Some(&link) {
                    self.see(link).await;
                }
            }
        }
        self.round = self.links.keys().copied().collect();
        begun
    }

    /// Whether there are links to look at.
    #[must_use]
    pub fn is_looking(&self) -> bool {
        !self.round.is_empty()
    }

    /// Looks at the next links.
    pub async fn go_on(&mut self) -> Result<(), DatapathError> {
        for _ in 0..LINKS_AT_ONCE {
            let Some(index) = self.round.pop_front() else { break };
            if let Some(link) = self.links.get(&index).cloned() {
                self.see(link).await;
            }
        }
        if self.is_looking() {
            return Ok(());
        }
        self.restore_exemptions().await?;
        // Once more, where the directory had to be made again.
        self.datapath.announce_ready()
    }

    /// Reads everything anew and puts right what is not as it should be. What fails on one interface is in
    /// [`Guard::failures`] and does not keep the others from it.
    pub(super) async fn resync(&mut self) -> Result<(), DatapathError> {
        // Guarding goes on without pins; what comes of it is said at the end.
        let around = self.look_around();
        for link in self.read_links().await? {
            self.see(link).await;
        }
        self.locate(usize::MAX).await;
        // Who should pass and does not is no reason to guard nobody.
        unless(true, self.restore_exemptions().await)?;
        self.settled = true;
        around?;
        self.datapath.announce_ready()
    }

    /// Looks at all but links.
    fn look_around(&mut self) -> Result<(), DatapathError> {
        let restored = self.datapath.restore_pins();
        if let Ok(true) = restored
            && self.settled
        {
            self.repairs.pinned += 1;
            log::warn!("restored what was missing from {}", self.datapath.pins().root().display());
        }
        let sockets = self.restore_sockets();
        self.datapath.forget_granted();
        self.pods.retry();
        let hosts = self.search_kubepods();
        restored?;
        sockets?;
        hosts
    }

    /// All links of the node. Those that are gone are forgotten.
    async fn read_links(&mut self) -> Result<Vec<Link>, DatapathError> {
        self.uplinks = self.netlink.uplinks().await?;
        let links = self.netlink.links().await?;
        let present: BTreeSet<u32> = links.iter().map(|link| link.index).collect();
        let known = self.links.keys().copied().chain(self.datapath.known());
        for gone in known.filter(|index| !present.contains(index)).collect::<BTreeSet<_>>() {
            self.forget(gone);
        }
        Ok(links)
    }
}
