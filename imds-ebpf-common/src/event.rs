//! Events of packets and calls to protected endpoints, and the rate limiter of events.

use crate::opaque::opaque;

/// One packet or call. All integers are in host byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Event {
    /// Time in nanoseconds since boot (`CLOCK_BOOTTIME`).
    pub time: u64,
    /// Cookie of the network namespace of the socket; 0 if unknown.
    pub netns_cookie: u64,
    /// Id of the cgroup v2 of the caller, or of the packet's socket at [`Hook::HostNetwork`](crate::Hook::HostNetwork) and
    /// [`Hook::NodeAllow`](crate::Hook::NodeAllow); 0 for other packets.
    pub cgroup: u64,
    /// Number of events of this source on this CPU that were suppressed since the previous emitted one.
    pub suppressed: u64,
    /// Bytes of this packet and of the suppressed ones, counted like [`Counter::bytes`](crate::Counter::bytes).
    pub bytes: u64,
    /// Source address, IPv4 as IPv4-mapped IPv6; unspecified (`::`) if unknown.
    pub source: [u8; 16],
    /// Destination address, IPv4 as IPv4-mapped IPv6.
    pub destination: [u8; 16],
    /// Index of the interface at whose hook the packet was seen; 0 for calls.
    pub ifindex: u32,
    /// Index of the interface by which the packet entered the node; 0 if the kernel has recorded none, and for calls. The
    /// kernel records none for packets of local sockets, and for some packets of pods (macvlan, ipvlan, and IPv6 packets that
    /// the node fragments again).
    pub ingress_ifindex: u32,
    /// Process id of the caller, in the initial pid namespace; 0 for packets.
    pub pid: u32,
    /// Source port; 0 if the packet has none or the parser can't find it.
    pub source_port: u16,
    /// Destination port; 0 if the packet has none or the parser can't find it.
    pub destination_port: u16,
    /// Number of the [`Hook`](crate::Hook) that saw the packet or call.
    pub hook: u8,
    /// Number of the [`Verdict`](crate::Verdict) on the packet or call.
    pub verdict: u8,
    /// IP protocol number; 255 if the parser can't find it.
    pub protocol: u8,
    /// Explicit padding, always written as 0.
    pub reserved: u8,
    /// Explicit padding, always written as 0.
    pub padding: u32,
    /// Name of the caller's thread, padded with zero bytes; empty for packets.
    pub comm: [u8; 16],
}

const _: () = assert!(size_of::<Event>() == 112);

/// Key of the rate limiter: events of one source share a [`RateLimiter`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RateLimitKey {
    /// Ingress interface index for packets; id of the cgroup of the pod or unit for calls, and for packets at
    /// [`Hook::HostNetwork`](crate::Hook::HostNetwork) and [`Hook::NodeAllow`](crate::Hook::NodeAllow). A pod can create none of
    /// these. The cookie of the network namespace for calls of senders without a cgroup v2.
    pub id: u64,
    /// Number of the [`Hook`](crate::Hook) that saw the packets or calls.
    pub hook: u32,
    /// Number of their [`Verdict`](crate::Verdict): suppressed events are added to an event with the same verdict.
    pub verdict: u32,
}

impl RateLimitKey {
    /// Returns the key of the source with this id.
    #[inline(always)]
    #[must_use]
    pub const fn new(id: u64, hook: crate::Hook, verdict: crate::Verdict) -> Self {
        Self { id, hook: hook as u32, verdict: verdict as u32 }
    }
}

/// Number of entries of the LRU map of sources. Sources at `from_pod` need no entry: the [`Counter`](crate::Counter) of the
/// interface contains their rate limiter.
pub const MAX_RATE_LIMITERS: usize = 4096;

/// Rate limiter for the events, replies and request lines of one source on one CPU: a fixed window of one second.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RateLimiter {
    /// Start of the window, in nanoseconds since boot.
    pub start: u64,
    /// Timer tick (jiffies) at which the clock was last read.
    pub tick: u64,
    /// Number of events since the last emitted one.
    pub pending: u64,
    /// Bytes of the events since the last emitted one; 0 for calls.
    pub bytes: u64,
    /// Number of events emitted in this window.
    pub emitted: u32,
    /// Number of replies sent in this window, or for verdicts without replies, of starts of requests emitted in it.
    pub sent: u32,
}

impl RateLimiter {
    /// Length of a window, in nanoseconds.
    pub const WINDOW: u64 = 1_000_000_000;
    /// Largest number of events of one source on one CPU in a window.
    pub const MAX_EVENTS: u32 = 10;
    /// Largest number of replies to one source from one CPU in a window: the default of the kernel's global limit of ICMP
    /// errors (`icmp_msgs_per_sec`, Linux 5.10).
    pub const MAX_REPLIES: u32 = 1000;
    /// Largest number of starts of requests of one source on one CPU in a window.
    pub const MAX_REQUESTS: u32 = 10;

    /// Returns a rate limiter without events, for BPF programs. The zeros are hidden from the compiler, because LLVM writes
    /// many zeros with a call to memset, which BPF does not have.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "zero")]
    pub fn new() -> Self {
        let zero = opaque(0);
        Self { start: zero, tick: zero, pending: zero, bytes: zero, emitted: zero as u32, sent: zero as u32 }
    }

    /// Counts an event of `bytes` bytes at timer tick `tick`. Returns `true` if the caller should emit the event; the
    /// caller must call [`RateLimiter::clear`] after it did.
    ///
    /// `clock` returns the nanoseconds since boot. At the limit it is read once per tick and not per event, because
    /// reading it costs more than the rest of the function.
    #[inline(always)]
    #[must_use]
    pub fn allow(&mut self, bytes: u32, tick: u64, clock: impl FnOnce() -> u64) -> bool {
        self.pending += 1;
        self.bytes += u64::from(bytes);
        if self.emitted >= Self::MAX_EVENTS && self.tick == tick {
            return false;
        }
        self.roll_window(tick, clock());
        if self.emitted >= Self::MAX_EVENTS {
            return false;
        }
        self.emitted += 1;
        true
    }

    /// Resets the counts of events and bytes since the last emitted event.
    #[inline(always)]
    pub fn clear(&mut self) {
        // Hidden from the compiler, which would write two zeros in a row with a call to memset.
        self.pending = opaque(0);
        self.bytes = opaque(0);
    }

    /// Reports whether one more reply may be sent in this window, and counts it. Call it after [`RateLimiter::allow`], which
    /// starts a new window when the old one has ended.
    #[inline(always)]
    pub fn allow_reply(&mut self) -> bool {
        self.allow_one(Self::MAX_REPLIES)
    }

    /// Reports whether one more start of a request may be emitted in this window, and counts it. Shares the counter of
    /// [`RateLimiter::allow_reply`]: a source whose requests pass gets no replies.
    #[inline(always)]
    pub fn allow_request(&mut self) -> bool {
        self.allow_one(Self::MAX_REQUESTS)
    }

    #[inline(always)]
    fn allow_one(&mut self, limit: u32) -> bool {
        let is_allowed = self.sent < limit;
        self.sent += u32::from(is_allowed);
        is_allowed
    }

    #[inline(always)]
    fn roll_window(&mut self, tick: u64, time: u64) {
        self.tick = tick;
        if time.wrapping_sub(self.start) >= Self::WINDOW {
            self.start = time;
            self.emitted = 0;
            self.sent = 0;
        }
    }
}

const _: () = assert!(size_of::<RateLimiter>() == 40);

#[cfg(feature = "user")]
mod pod {
    use super::{RateLimitKey, RateLimiter};

    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for RateLimitKey {}
    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for RateLimiter {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Timer ticks per second (`CONFIG_HZ`) of most distributions.
    const HZ: u64 = 250;

    const BYTES: u32 = 74;

    /// Adds an event at `time`. Returns the number of events that the emitted one accounts for, or `None` if it is
    /// suppressed.
    fn allow(limiter: &mut RateLimiter, time: u64) -> Option<u64> {
        limiter.allow(BYTES, time / (RateLimiter::WINDOW / HZ), || time).then(|| {
            assert_eq!(limiter.bytes, limiter.pending * u64::from(BYTES));
            let emitted = limiter.pending;
            limiter.clear();
            emitted
        })
    }

    #[test]
    fn verdicts_have_separate_limiters() {
        use crate::{Hook, Verdict};
        let key = |hook, verdict| RateLimitKey::new(7, hook, verdict);
        assert_ne!(key(Hook::NodeAllow, Verdict::Denied), key(Hook::NodeAllow, Verdict::Exempt));
        assert_ne!(key(Hook::NodeAllow, Verdict::Denied), key(Hook::Socket, Verdict::Denied));
    }

    #[test]
    fn window_limit_loses_no_event_from_the_sum() {
        let mut limiter = RateLimiter::default();
        let emitted: u64 = (0..25).filter_map(|time| allow(&mut limiter, RateLimiter::WINDOW + time)).sum();
        assert_eq!((emitted, limiter.pending), (u64::from(RateLimiter::MAX_EVENTS), 15));
        assert_eq!(allow(&mut limiter, 2 * RateLimiter::WINDOW + 1), Some(16));
        assert_eq!(allow(&mut limiter, 2 * RateLimiter::WINDOW + 2), Some(1));
    }

    #[test]
    fn suppressed_events_are_added_to_the_next() {
        let mut limiter = RateLimiter::default();
        assert!(limiter.allow(BYTES, 0, || RateLimiter::WINDOW));
        assert_eq!(allow(&mut limiter, RateLimiter::WINDOW + 1), Some(2));
    }

    #[test]
    fn clock_is_read_once_per_tick_at_the_limit() {
        let mut limiter = RateLimiter::default();
        let mut reads = 0;
        for _ in 0..1000 {
            let is_emitted = limiter.allow(BYTES, 7, || {
                reads += 1;
                RateLimiter::WINDOW
            });
            if is_emitted {
                limiter.clear();
            }
        }
        assert_eq!((reads, limiter.pending), (RateLimiter::MAX_EVENTS, 990));
        assert!(!limiter.allow(BYTES, 8, || RateLimiter::WINDOW + 1));
        assert_eq!(limiter.pending, 991);
    }

    #[test]
    fn backward_clock_does_not_block_events() {
        let mut limiter = RateLimiter {
            start: 5 * RateLimiter::WINDOW,
            tick: 1,
            emitted: RateLimiter::MAX_EVENTS,
            ..RateLimiter::default()
        };
        assert_eq!(allow(&mut limiter, 0), Some(1));
    }

    #[test]
    fn replies_are_limited_per_window() {
        let mut limiter = RateLimiter::default();
        for second in 1..3 {
            allow(&mut limiter, second * RateLimiter::WINDOW);
            let sent = (0..2 * RateLimiter::MAX_REPLIES).filter(|_| limiter.allow_reply()).count();
            assert_eq!(sent, RateLimiter::MAX_REPLIES as usize);
        }
    }

    #[test]
    fn requests_are_limited_per_window() {
        let mut limiter = RateLimiter::default();
        for second in 1..3 {
            allow(&mut limiter, second * RateLimiter::WINDOW);
            let sent = (0..2 * RateLimiter::MAX_REQUESTS).filter(|_| limiter.allow_request()).count();
            assert_eq!(sent, RateLimiter::MAX_REQUESTS as usize);
        }
    }
}
