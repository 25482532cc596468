//! Single denied and audited requests, as the collector hands them to sinks.

use std::{
    collections::VecDeque,
    rc::Rc,
    time::{Duration, Instant},
};

use imds_ebpf_common::Event;
use jiff::Timestamp;

use crate::kube::pod_ref::PodRef;

/// Time for which a denial waits for the pod of its sender. A new pod can send its first packet before the agent has found its
/// sandbox.
const MAX_WAIT: Duration = Duration::from_secs(2);
/// Maximum number of denials that wait. Beyond it, the oldest one waits no longer.
const MAX_WAITING: usize = 1024;

/// A denied or audited request, and its sender as far as it is known.
#[derive(Clone, Debug)]
pub(crate) struct Denial {
    pub event: Event,
    pub time: Timestamp,
    /// Name of the interface through which the packet entered the node; empty for calls and deleted interfaces.
    pub interface: String,
    pub pod: Option<PodRef>,
    /// Path of the cgroup of the sender's unit; empty if unknown.
    pub unit: Rc<[u8]>,
    /// Number of the exemption rule that audits the request, from 1.
    pub rule: Option<u32>,
}

/// Denials that wait for the pods of their senders.
#[derive(Debug, Default)]
pub(super) struct WaitingDenials(VecDeque<(Instant, Denial)>);

impl WaitingDenials {
    /// Adds a denial. Returns the oldest one if too many wait.
    pub(super) fn add(&mut self, denial: Denial, now: Instant) -> Option<Denial> {
        self.0.push_back((now + MAX_WAIT, denial));
        if self.0.len() > MAX_WAITING { self.0.pop_front().map(|(_, oldest)| oldest) } else { None }
    }

    /// Returns the time at which the wait of the oldest denial ends.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.0.front().map(|(due, _)| *due)
    }

    /// Removes and returns the denials whose wait has ended, and those for which `resolve` finds the pod.
    pub(super) fn take_ready(
        &mut self,
        now: Instant,
        resolve: impl Fn(&Denial) -> Option<PodRef>,
    ) -> Vec<Denial> {
        let mut ready = Vec::new();
        for (due, mut denial) in std::mem::take(&mut self.0) {
            denial.pod = resolve(&denial);
            if denial.pod.is_some() || due <= now {
                ready.push(denial);
            } else {
                self.0.push_back((due, denial));
            }
        }
        ready
    }

    /// Removes and returns all denials.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Denial> {
        std::mem::take(&mut self.0).into_iter().map(|(_, denial)| denial)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denial(number: u64) -> Denial {
        let event = Event { cgroup: number, ..Event::default() };
        let (interface, unit) = (String::new(), Rc::default());
        Denial { event, time: Timestamp::UNIX_EPOCH, interface, pod: None, unit, rule: None }
    }

    fn numbers(denials: impl IntoIterator<Item = Denial>) -> Vec<u64> {
        denials.into_iter().map(|denial| denial.event.cgroup).collect()
    }

    #[test]
    fn denials_wait_for_their_pod() {
        let pod = PodRef {
            namespace: "n".to_owned(),
            pod: "p".to_owned(),
            service_account: String::new(),
            container: None,
            label: None,
            uid: String::new(),
        };
        let (mut waiting, start) = (WaitingDenials::default(), Instant::now());
        for number in 0..3 {
            assert!(waiting.add(denial(number), start + Duration::from_secs(number)).is_none());
        }
        assert_eq!(waiting.next_due(), Some(start + MAX_WAIT));
        let resolve = |denial: &Denial| (denial.event.cgroup == 1).then(|| pod.clone());
        let ready = waiting.take_ready(start, resolve);
        assert_eq!(ready.iter().map(|denial| denial.pod.is_some()).collect::<Vec<_>>(), [true]);
        assert_eq!(numbers(ready), [1]);
        assert_eq!(numbers(waiting.take_ready(start + MAX_WAIT, |_| None)), [0]);
        assert_eq!(numbers(waiting.take_all()), [2]);
        assert_eq!(waiting.next_due(), None);
    }

    #[test]
    fn number_of_waiting_denials_is_limited() {
        let (mut waiting, now) = (WaitingDenials::default(), Instant::now());
        let displaced = (0..MAX_WAITING as u64 + 2).filter_map(|number| waiting.add(denial(number), now));
        assert_eq!(numbers(displaced), [0, 1]);
        assert_eq!(waiting.take_all().count(), MAX_WAITING);
    }
}
