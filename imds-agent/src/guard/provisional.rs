//! Filters that hold pods' links until there is time for TCX.
//!
//! The kernel attaches to TCX under the lock of all network devices and waits, with that held, until no CPU runs the list
//! of programs that was there before (`tcx_entry_sync`, include/net/tcx.h): some 15 ms with `CONFIG_HZ=250`. Of a thousand
//! pods, the last would be attached after 15 s, and whoever makes pods meanwhile would wait for the same lock. A filter
//! takes no such wait. So each link gets one at once, and its TCX link in its place when nothing else is going on.

use std::{collections::BTreeMap, future::pending, time::Duration};

use imds_ebpf_common::{AttachMode, Role, TcHook};
use tokio::time::{Instant, sleep_until};

use super::Guard;
use crate::{
    datapath::{Datapath, DatapathError},
    node::links::Link,
    reconcile::{Attachment, Order},
};

/// How long there was no news of links where nothing is going on.
const CALM: Duration = Duration::from_millis(250);
/// Between two links that get theirs, for others to have the lock.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a link waits for calm at most.
const PATIENCE: Duration = Duration::from_secs(10);

/// Links that are held by a filter for now.
#[derive(Debug)]
pub(super) struct Provisional {
    /// Since when, by index.
    since: BTreeMap<u32, Instant>,
    last_news: Instant,
    last_raised: Instant,
}

impl Provisional {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { since: BTreeMap::new(), last_news: now, last_raised: now }
    }

    /// How the link with this index is to be attached for now, where TCX is what it is to have. `actual`: what of ours is
    /// there, `has_company`: whether there are TCX programs of others, which run before all filters.
    pub(super) fn choose(&mut self, index: u32, actual: &[Attachment], has_company: bool) -> AttachMode {
        let is_held_first = |attachment: &Attachment| {
            attachment.backend == AttachMode::Clsact && attachment.place == Order::First
        };
        if has_company || !actual.iter().all(is_held_first) {
            self.forget(index);
            return AttachMode::Tcx;
        }
        self.since.entry(index).or_insert_with(Instant::now);
        AttachMode::Clsact
    }

    /// There was news of links.
    pub(super) fn hear(&mut self) {
        self.last_news = Instant::now();
    }

    /// The link that is next to get TCX, and when.
    pub(super) fn next(&self) -> Option<(u32, Instant)> {
        let (&index, &since) = self.since.iter().min_by_key(|(_, since)| **since)?;
        let calm = self.last_news + CALM;
        Some((index, calm.min(since + PATIENCE).max(self.last_raised + PAUSE)))
    }

    /// The link has its turn.
    pub(super) fn raise(&mut self, index: u32) {
        self.last_raised = Instant::now();
        self.forget(index);
    }

    /// The link is gone, or held as it is to be.
    pub(super) fn forget(&mut self, index: u32) {
        self.since.remove(&index);
    }
}

impl Guard {
    /// Waits for the turn of a link that a filter holds for now.
    pub async fn link_due(&self) -> u32 {
        match self.provisional.as_ref().and_then(Provisional::next) {
            Some((index, due)) => {
                sleep_until(due).await;
                index
            }
            None => pending().await,
        }
    }

    /// Puts TCX in the place of the filter that holds this link.
    pub async fn raise(&mut self, index: u32) {
        if let Some(provisional) = &mut self.provisional {
            provisional.raise(index);
        }
        if let Some(link) = self.links.get(&index).cloned() {
            self.raising = Some(index);
            self.see(link).await;
            self.raising = None;
        }
    }

    /// Does so for all links, without waiting for anything.
    pub async fn raise_all(&mut self) {
        while let Some((index, _)) = self.provisional.as_ref().and_then(Provisional::next) {
            self.raise(index).await;
        }
    }

    /// How an edge of this link is to be attached now.
    pub(super) fn choose(
        &mut self,
        link: &Link,
        role: Role,
        edge: TcHook,
        actual: &[Attachment],
    ) -> Result<AttachMode, DatapathError> {
        let wanted = self.datapath.wanted(link, role, edge);
        match &mut self.provisional {
            Some(provisional)
                if (edge, wanted) == (TcHook::FromPod, AttachMode::Tcx)
                    && self.raising != Some(link.index) =>
            {
                let has_company = actual.is_empty() && Datapath::has_company(link)?;
                Ok(provisional.choose(link.index, actual, has_company))
            }
            _ => Ok(wanted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILTER: Attachment =
        Attachment { backend: AttachMode::Clsact, current: true, pinned: true, place: Order::First };

    #[tokio::test(start_paused = true)]
    async fn a_filter_comes_first_and_stays_until_its_turn() {
        let mut provisional = Provisional::new();
        assert_eq!(provisional.next(), None);
        assert_eq!(provisional.choose(7, &[], false), AttachMode::Clsact);
        assert_eq!(provisional.choose(7, &[FILTER], false), AttachMode::Clsact);
        let (index, due) = provisional.next().unwrap();
        assert_eq!((index, due), (7, Instant::now() + CALM));
        provisional.raise(7);
        assert_eq!(provisional.next(), None);
    }

    #[test]
    fn where_others_would_run_before_a_filter_there_is_none() {
        let mut provisional = Provisional::new();
        assert_eq!(provisional.choose(7, &[], true), AttachMode::Tcx);
        for place in [Order::NotFirst, Order::Blocked] {
            assert_eq!(provisional.choose(7, &[Attachment { place, ..FILTER }], false), AttachMode::Tcx);
        }
        let link = Attachment { backend: AttachMode::Tcx, ..FILTER };
        assert_eq!(provisional.choose(7, &[FILTER, link], false), AttachMode::Tcx);
        assert_eq!(provisional.next(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn links_take_turns_with_pauses_and_do_not_wait_for_calm_for_ever() {
        let mut provisional = Provisional::new();
        for index in [7, 8] {
            provisional.choose(index, &[], false);
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        provisional.raise(7);
        provisional.last_news -= CALM;
        assert_eq!(provisional.next(), Some((8, Instant::now() + PAUSE)));
        tokio::time::advance(PATIENCE).await;
        provisional.hear();
        let (_, due) = provisional.next().unwrap();
        assert!(due <= Instant::now());
    }
}
