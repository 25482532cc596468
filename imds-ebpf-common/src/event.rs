//! Events of packets and calls to protected endpoints, and their rate limits.

use crate::opaque::opaque;

/// One packet or call. All integers are in host byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Event {
    /// When, in nanoseconds since boot (`CLOCK_BOOTTIME`).
    pub time: u64,
    /// Cookie of the network namespace of the socket; 0 where that is not known.
    pub netns_cookie: u64,
    /// Id of the cgroup v2 of the caller, or of the socket of a packet at [`Hook::HostNetwork`](crate::Hook::HostNetwork); 0 for other
    /// packets.
    pub cgroup: u64,
    /// Events of the same source and CPU that were left out since the one before.
    pub suppressed: u64,
    /// Bytes of this packet and of those that were left out, as [`Counter::bytes`](crate::Counter::bytes) has them.
    pub bytes: u64,
    /// Source, IPv4 as IPv4-mapped IPv6; unspecified where that is not known.
    pub source: [u8; 16],
    /// Destination, likewise.
    pub destination: [u8; 16],
    /// Index of the interface at which a packet was judged; 0 for calls.
    pub ifindex: u32,
    /// Index of the interface by which the packet entered the node; 0 if the kernel has recorded none, and for calls. The
    /// kernel records none for packets of local sockets, and for some packets of pods (macvlan, ipvlan, and IPv6 packets that
    /// the node fragments again).
    pub ingress_ifindex: u32,
    /// Process id of the caller, in the initial pid namespace; 0 for packets.
    pub pid: u32,
    /// Source port; 0 where there is none or it can't be found.
    pub source_port: u16,
    /// Destination port, likewise.
    pub destination_port: u16,
    /// A [`Hook`](crate::Hook).
    pub hook: u8,
    /// A [`Verdict`](crate::Verdict).
    pub verdict: u8,
    /// IP protocol number; 255 where it can't be found.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
    /// Zero.
    pub padding: u32,
    /// Name of the caller's thread, padded with zero bytes; empty for packets.
    pub comm: [u8; 16],
}

const _: () = assert!(size_of::<Event>() == 112);

/// Whose events are counted together.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Source {
    /// Index of the interface by which packets came in; cookie of the network namespace of calls; id of the cgroup of
    /// both at [`Hook::HostNetwork`](crate::Hook::HostNetwork).
    pub id: u64,
    /// A [`Hook`](crate::Hook).
    pub hook: u64,
}

/// How many sources are known at a time, but for those whose interface's [`Counter`](crate::Counter) has their window. One
/// that was not heard of for long is forgotten.
pub const SOURCES: usize = 4096;

/// Events and answers of one source on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Window {
    /// When it began, in nanoseconds since boot.
    pub start: u64,
    /// The kernel's timer tick at which the clock was last read.
    pub tick: u64,
    /// Events since the last one that was told.
    pub untold: u64,
    /// Bytes of these; 0 for calls.
    pub bytes: u64,
    /// Events that were told since it began.
    pub told: u32,
    /// Answers that were sent since it began.
    pub answered: u32,
}

impl Window {
    /// Length of a window, in nanoseconds.
    pub const LENGTH: u64 = 1_000_000_000;
    /// Most events that are told of one source on one CPU in a window.
    pub const MOST: u32 = 10;
    /// Most answers that are sent to one source by one CPU in a window: so many as the kernel sends ICMP errors in all
    /// (`icmp_msgs_per_sec`, Linux 5.10).
    pub const MOST_ANSWERS: u32 = 1000;

    /// In which nothing was told. For the programs: of many zeros in a row the compiler makes a call that the verifier
    /// refuses, so that they are hidden from it.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "zero")]
    pub fn new() -> Self {
        let zero = opaque(0);
        Self { start: zero, tick: zero, untold: zero, bytes: zero, told: zero as u32, answered: zero as u32 }
    }

    /// Takes in an event of so many `bytes` at timer tick `tick`. Whether it is to be told, and once it was,
    /// [`Window::clear`] is to be called.
    ///
    /// `clock` tells the nanoseconds since boot. Once enough was told it is asked with each tick and not with each
    /// event: reading it costs more than all else that an event costs.
    #[inline(always)]
    #[must_use]
    pub fn admit(&mut self, bytes: u32, tick: u64, clock: impl FnOnce() -> u64) -> bool {
        self.untold += 1;
        self.bytes += u64::from(bytes);
        if self.told >= Self::MOST && self.tick == tick {
            return false;
        }
        self.turn(tick, clock());
        if self.told >= Self::MOST {
            return false;
        }
        self.told += 1;
        true
    }

    /// All that was taken in up to now is known to user space.
    #[inline(always)]
    pub fn clear(&mut self) {
        // Hidden from the compiler, which makes a call of two zeros in a row.
        self.untold = opaque(0);
        self.bytes = opaque(0);
    }

    /// Whether one more answer may be sent in the window that [`Window::admit`] left.
    #[inline(always)]
    pub fn may_answer(&mut self) -> bool {
        let may = self.answered < Self::MOST_ANSWERS;
        self.answered += u32::from(may);
        may
    }

    #[inline(always)]
    fn turn(&mut self, tick: u64, time: u64) {
        self.tick = tick;
        if time.wrapping_sub(self.start) >= Self::LENGTH {
            self.start = time;
            self.told = 0;
            self.answered = 0;
        }
    }
}

const _: () = assert!(size_of::<Window>() == 40);

#[cfg(feature = "user")]
mod pod {
    use super::{Source, Window};

    // SAFETY: repr(C), integers only, no padding: every bit pattern is a value.
    unsafe impl aya::Pod for Source {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Window {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many ticks a second, as most distributions have it.
    const HZ: u64 = 250;

    const BYTES: u32 = 74;

    /// How many events were told with one at this time, where it was.
    fn admit(window: &mut Window, time: u64) -> Option<u64> {
        window.admit(BYTES, time / (Window::LENGTH / HZ), || time).then(|| {
            assert_eq!(window.bytes, window.untold * u64::from(BYTES));
            let told = window.untold;
            window.clear();
            told
        })
    }

    #[test]
    fn window_limit_loses_no_event_from_the_sum() {
        let mut window = Window::default();
        let told: u64 = (0..25).filter_map(|time| admit(&mut window, Window::LENGTH + time)).sum();
        assert_eq!((told, window.untold), (u64::from(Window::MOST), 15));
        assert_eq!(admit(&mut window, 2 * Window::LENGTH + 1), Some(16));
        assert_eq!(admit(&mut window, 2 * Window::LENGTH + 2), Some(1));
    }

    #[test]
    fn suppressed_events_are_added_to_the_next() {
        let mut window = Window::default();
        assert!(window.admit(BYTES, 0, || Window::LENGTH));
        assert_eq!(admit(&mut window, Window::LENGTH + 1), Some(2));
    }

    #[test]
    fn clock_is_read_once_per_tick_at_the_limit() {
        let mut window = Window::default();
        let mut reads = 0;
        for _ in 0..1000 {
            let is_told = window.admit(BYTES, 7, || {
                reads += 1;
                Window::LENGTH
            });
            if is_told {
                window.clear();
            }
        }
        assert_eq!((reads, window.untold), (Window::MOST, 990));
        assert!(!window.admit(BYTES, 8, || Window::LENGTH + 1));
        assert_eq!(window.untold, 991);
    }

    #[test]
    fn backward_clock_does_not_block_events() {
        let mut window =
            Window { start: 5 * Window::LENGTH, tick: 1, told: Window::MOST, ..Window::default() };
        assert_eq!(admit(&mut window, 0), Some(1));
    }

    #[test]
    fn replies_are_limited_per_window() {
        let mut window = Window::default();
        for second in 1..3 {
            admit(&mut window, second * Window::LENGTH);
            let sent = (0..2 * Window::MOST_ANSWERS).filter(|_| window.may_answer()).count();
            assert_eq!(sent, Window::MOST_ANSWERS as usize);
        }
    }
}
