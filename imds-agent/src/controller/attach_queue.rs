//! Queue of attachments that wait for their turn.
//!
//! The kernel attaches a TCX link with RTNL held, and waits for a grace period (`tcx_entry_sync`, include/net/tcx.h):
//! about 15 ms with `CONFIG_HZ=250`. A burst of attachments would delay each CNI plugin that needs the same lock. The
//! agent therefore attaches to the link of a new pod immediately if it made no other attachment just before. Otherwise
//! the link waits for its turn, with pauses for other users of the lock. The hooks `socket` and `node_egress` (on the
//! uplinks) deny the pod's packets until then. They are called node-wide hooks below.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use imds_ebpf_common::TcHook;
use tokio::time::Instant;

use crate::datapath::pin::dir::AttachPoint;

/// Time without link events after which the queue is drained without pauses.
const QUIET_INTERVAL: Duration = Duration::from_millis(250);
/// Number of pods in the queue that are a backlog.
const BACKLOG: usize = 3;
/// Pause after an attachment without a backlog. Pods that are created more than 55 ms apart (pause and attachment) are
/// attached without a delay.
const PAUSE: Duration = Duration::from_millis(40);
/// Shorter pause with a backlog: slow attachments on a busy node must not let the queue grow without bound.
const BACKLOG_PAUSE: Duration = Duration::from_millis(10);
/// New pods within [`BURST_INTERVAL`] that are a burst. The kubelet creates about 10 pods per second.
const BURST: usize = 16;
/// Interval in which the pods of a burst are created.
const BURST_INTERVAL: Duration = Duration::from_secs(1);
/// Pause with a backlog in a burst: pods are created faster than links can be attached without delaying CNI plugins.
const BURST_PAUSE: Duration = Duration::from_millis(250);
/// Longest time that an attachment of low priority waits for a quiet period.
const MAX_DELAY: Duration = Duration::from_secs(10);

/// Attachments that wait, and the time of the next turn.
#[derive(Debug)]
pub(super) struct AttachQueue {
    waiting: BTreeMap<AttachPoint, Waiting>,
    /// Times at which the last [`BURST`] attachments of `from_pod` were queued, the last one first.
    arrivals: VecDeque<Instant>,
    last_link_event: Instant,
    next_turn: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    since: Instant,
    not_before: Instant,
    /// True for `node_egress` of a link of unknown role, which is not needed if Kubernetes names a pod behind the link.
    is_optional: bool,
}

impl AttachQueue {
    /// Returns a queue without attachments.
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { waiting: BTreeMap::new(), arrivals: VecDeque::new(), last_link_event: now, next_turn: now }
    }

    /// Adds an attachment. One that is queued already keeps its times, unless `is_optional` changes: the link does not need an
    /// optional attachment once Kubernetes names the pod behind it.
    pub(super) fn push(&mut self, point: AttachPoint, not_before: Instant, is_optional: bool) {
        let now = Instant::now();
        if point.hook == TcHook::FromPod && !self.contains(point) {
            self.arrivals.truncate(BURST - 1);
            self.arrivals.push_front(now);
        }
        let waiting = self.waiting.entry(point).or_insert(Waiting { since: now, not_before, is_optional });
        if waiting.is_optional != is_optional {
            (waiting.not_before, waiting.is_optional) = (not_before, is_optional);
        }
    }

    /// Removes an attachment that has been made or is no longer desired.
    pub(super) fn remove(&mut self, point: AttachPoint) {
        self.waiting.remove(&point);
    }

    /// Removes the attachments of a deleted interface.
    pub(super) fn remove_link(&mut self, ifindex: u32) {
        self.waiting.retain(|point, _| point.ifindex != ifindex);
    }

    /// Lets the attachments of these interfaces run immediately, before their `not_before` time.
    pub(super) fn release(&mut self, is_released: impl Fn(u32) -> bool) {
        for (_, waiting) in self.waiting.iter_mut().filter(|(point, _)| is_released(point.ifindex)) {
            waiting.not_before = waiting.since;
        }
    }

    /// Returns the interfaces with an attachment whose `not_before` is in the future, and the time since which it waits.
    pub(super) fn delayed(&self) -> impl Iterator<Item = (u32, Instant)> {
        let now = Instant::now();
        self.waiting
            .iter()
            .filter(move |(_, waiting)| waiting.not_before > now)
            .map(move |(point, waiting)| (point.ifindex, waiting.since))
    }

    /// Reports whether this attachment is queued.
    pub(super) fn contains(&self, point: AttachPoint) -> bool {
        self.waiting.contains_key(&point)
    }

    /// Returns the queued attachments that are part of the initial sync: all but the optional ones.
    ///
    /// A link without `node_egress` is not enforced from the moment at which a route makes it an uplink, until the
    /// attachment.
    pub(super) fn initial(&self) -> impl Iterator<Item = AttachPoint> {
        self.waiting.iter().filter(|(_, waiting)| !waiting.is_optional).map(|(point, _)| *point)
    }

    /// Records a link event that another program caused.
    pub(super) fn on_link_event(&mut self) {
        self.last_link_event = Instant::now();
    }

    /// Records that an attachment was made.
    pub(super) fn on_attached(&mut self) {
        let now = Instant::now();
        let is_burst = self.arrivals.get(BURST - 1).is_some_and(|&first| now - first < BURST_INTERVAL);
        let is_pod = |(point, waiting): &(&AttachPoint, &Waiting)| {
            point.hook == TcHook::FromPod && waiting.not_before <= now
        };
        let has_backlog = self.waiting.iter().filter(is_pod).count() >= BACKLOG;
        self.next_turn = now
            + match (has_backlog, is_burst) {
                (false, _) => PAUSE,
                (true, false) => BACKLOG_PAUSE,
                (true, true) => BURST_PAUSE,
            };
    }

    /// Returns the next attachment and its time. `from_pod` comes first: on an interface that has it, `node_egress` matters
    /// only if the interface turns out to be an uplink.
    pub(super) fn next(&self) -> Option<(AttachPoint, Instant)> {
        let quiet_from = self.last_link_event + QUIET_INTERVAL;
        let due = |(&point, waiting): (&AttachPoint, &Waiting)| {
            let turn = self.next_turn.min(quiet_from);
            let earliest = match point.hook {
                TcHook::FromPod => turn,
                TcHook::NodeEgress => turn.max(quiet_from.min(waiting.since + MAX_DELAY)),
            };
            (point, waiting.since, waiting.not_before.max(earliest))
        };
        let next = self.waiting.iter().map(due).min_by_key(|&(point, since, due)| (due, point.hook, since));
        next.map(|(point, _, due)| (point, due))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(ifindex: u32, hook: TcHook) -> AttachPoint {
        AttachPoint { ifindex, hook }
    }

    #[tokio::test(start_paused = true)]
    async fn single_pod_is_attached_immediately() {
        let mut queue = AttachQueue::new();
        assert_eq!(queue.next(), None);
        queue.on_link_event();
        let pod = point(7, TcHook::FromPod);
        queue.push(pod, Instant::now(), false);
        assert_eq!(queue.next(), Some((pod, Instant::now())));
        queue.remove(pod);
        assert_eq!(queue.next(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn bursts_leave_pauses() {
        let mut queue = AttachQueue::new();
        queue.push(point(7, TcHook::FromPod), Instant::now(), false);
        queue.push(point(8, TcHook::FromPod), Instant::now(), false);
        queue.on_link_event();
        queue.remove(point(7, TcHook::FromPod));
        queue.on_attached();
        assert_eq!(queue.next(), Some((point(8, TcHook::FromPod), Instant::now() + PAUSE)));
        for index in 9..8 + 16 {
            queue.push(point(index, TcHook::FromPod), Instant::now(), false);
        }
        queue.on_link_event();
        queue.on_attached();
        assert_eq!(queue.next(), Some((point(8, TcHook::FromPod), Instant::now() + BURST_PAUSE)));
        tokio::time::advance(QUIET_INTERVAL).await;
        queue.on_attached();
        let (_, due) = queue.next().unwrap();
        assert!(due <= Instant::now());
    }

    /// Creates 200 pods at this interval, and attaches to each within `duration`. Returns the longest wait, and the number of
    /// attachments during that time.
    async fn longest_wait(interval: Duration, duration: Duration) -> (Duration, usize) {
        let (mut queue, start) = (AttachQueue::new(), Instant::now());
        let (mut longest, mut count) = (Duration::ZERO, 0);
        for index in 0..200 {
            let created = start + interval * index;
            while let Some((next, due)) = queue.next().filter(|&(_, due)| due.max(Instant::now()) < created) {
                tokio::time::advance(due - Instant::now()).await;
                queue.remove(next);
                tokio::time::advance(duration).await;
                queue.on_attached();
                longest = longest.max(Instant::now() - (start + interval * next.ifindex));
                count += 1;
            }
            tokio::time::advance(created - Instant::now()).await;
            queue.on_link_event();
            queue.push(point(index, TcHook::FromPod), Instant::now(), false);
        }
        (longest, count)
    }

    #[tokio::test(start_paused = true)]
    async fn slow_attachments_leave_no_backlog() {
        for milliseconds in [15, 60, 85] {
            let (wait, _) =
                longest_wait(Duration::from_millis(100), Duration::from_millis(milliseconds)).await;
            assert!(wait < Duration::from_secs(1), "{wait:?} with {milliseconds} ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn long_bursts_leave_the_lock_to_plugins() {
        let (_, count) = longest_wait(Duration::from_millis(20), Duration::from_millis(15)).await;
        // 4 seconds.
        assert!(count < 35, "{count}");
    }

    #[tokio::test(start_paused = true)]
    async fn node_egress_wait_is_bounded() {
        let mut queue = AttachQueue::new();
        queue.push(point(7, TcHook::NodeEgress), Instant::now(), false);
        queue.on_link_event();
        assert_eq!(queue.next(), Some((point(7, TcHook::NodeEgress), Instant::now() + QUIET_INTERVAL)));
        queue.push(point(8, TcHook::FromPod), Instant::now(), false);
        assert_eq!(queue.next().unwrap().0, point(8, TcHook::FromPod));
        queue.remove(point(8, TcHook::FromPod));
        tokio::time::advance(MAX_DELAY).await;
        queue.on_link_event();
        assert!(queue.next().unwrap().1 <= Instant::now());
    }

    #[tokio::test(start_paused = true)]
    async fn delayed_attachments_are_released() {
        let mut queue = AttachQueue::new();
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(5));
        queue.push(point(7, TcHook::FromPod), later, false);
        assert_eq!(queue.next().unwrap().1, later);
        tokio::time::advance(PAUSE).await;
        assert_eq!(queue.delayed().collect::<Vec<_>>(), [(7, now)]);
        queue.release(|ifindex| ifindex == 7);
        assert!(queue.next().unwrap().1 <= Instant::now());
        queue.remove_link(7);
        assert_eq!(queue.next(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn initial_sync_waits_for_plugins() {
        let mut queue = AttachQueue::new();
        let later = Instant::now() + Duration::from_secs(5);
        queue.push(point(7, TcHook::NodeEgress), later, false);
        queue.push(point(8, TcHook::NodeEgress), later, true);
        assert_eq!(queue.initial().collect::<Vec<_>>(), [point(7, TcHook::NodeEgress)]);
    }

    #[tokio::test(start_paused = true)]
    async fn attachment_becomes_mandatory() {
        let mut queue = AttachQueue::new();
        let (uplink, later) = (point(7, TcHook::NodeEgress), Instant::now() + Duration::from_secs(5));
        tokio::time::advance(QUIET_INTERVAL).await;
        queue.push(uplink, later, true);
        queue.push(uplink, later + Duration::from_secs(5), true);
        assert_eq!(queue.next(), Some((uplink, later)));
        queue.push(uplink, Instant::now(), false);
        assert_eq!(queue.initial().count(), 1);
        assert_eq!(queue.next(), Some((uplink, Instant::now())));
        queue.push(uplink, later, true);
        assert_eq!((queue.initial().count(), queue.next()), (0, Some((uplink, later))));
    }
}
