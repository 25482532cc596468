//! What the programs tell of a packet or call to a guarded endpoint, and how often.

use crate::opaque::opaque;

/// One packet or call. All integers are in host byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Event {
    /// When, in nanoseconds since boot (`CLOCK_BOOTTIME`).
    pub time: u64,
    /// Cookie of the network namespace of the socket; 0 where that is not known.
    pub netns_cookie: u64,
    /// Id of the cgroup v2 of the caller, or of the socket of a packet at [`Hook::Host`](crate::Hook::Host); 0 for other
    /// packets.
    pub cgroup: u64,
    /// Events of the same source and CPU that were left out since the one before.
    pub suppressed: u64,
    /// Source, IPv4 as IPv4-mapped IPv6; unspecified where that is not known.
    pub source: [u8; 16],
    /// Destination, likewise.
    pub destination: [u8; 16],
    /// Index of the interface at which a packet was judged; 0 for calls.
    pub ifindex: u32,
    /// Index of the interface by which it had come in; 0 where the node itself sent it, and for calls.
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

const _: () = assert!(size_of::<Event>() == 104);

/// Whose events are counted together.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Source {
    /// Index of the interface by which packets came in; cookie of the network namespace of calls; id of the cgroup of
    /// both at [`Hook::Host`](crate::Hook::Host).
    pub id: u64,
    /// A [`Hook`](crate::Hook).
    pub hook: u64,
}

/// Events and answers of one source on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Window {
    /// When it began, in nanoseconds since boot.
    pub start: u64,
    /// The kernel's timer tick at which the clock was last read.
    pub tick: u64,
    /// Events that were left out since the last one that was told.
    pub suppressed: u64,
    /// Events that were told since it began.
    pub told: u32,
    /// Answers that were sent since it began.
    pub answered: u32,
}

/// An event that may be told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Admission {
    /// When, in nanoseconds since boot.
    pub time: u64,
    /// Events of the same source that were left out before it.
    pub suppressed: u64,
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
    pub fn untold() -> Self {
        let zero = opaque(0);
        Self { start: zero, tick: zero, suppressed: zero, told: zero as u32, answered: zero as u32 }
    }

    /// Takes in an event at timer tick `tick`; `None` where it is not to be told.
    ///
    /// `clock` tells the nanoseconds since boot. Once enough was told it is asked with each tick and not with each
    /// event: reading it costs more than all else that an event costs.
    #[inline(always)]
    pub fn admit(&mut self, tick: u64, clock: impl FnOnce() -> u64) -> Option<Admission> {
        if self.told >= Self::MOST && self.tick == tick {
            self.suppressed += 1;
            return None;
        }
        let time = clock();
        self.turn(tick, time);
        if self.told >= Self::MOST {
            self.suppressed += 1;
            return None;
        }
        self.told += 1;
        Some(Admission { time, suppressed: core::mem::take(&mut self.suppressed) })
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

const _: () = assert!(size_of::<Window>() == 32);

#[cfg(test)]
mod tests {
    use super::*;

    /// So many ticks a second, as most distributions have it.
    const HZ: u64 = 250;

    fn admit(window: &mut Window, time: u64) -> Option<u64> {
        window.admit(time / (Window::LENGTH / HZ), || time).map(|admission| {
            assert_eq!(admission.time, time);
            admission.suppressed
        })
    }

    #[test]
    fn a_window_tells_so_many_and_no_event_is_lost_from_the_sum() {
        let mut window = Window::default();
        let mut sum = 0;
        for time in 0..25 {
            if let Some(suppressed) = admit(&mut window, Window::LENGTH + time) {
                sum += 1 + suppressed;
            }
        }
        assert_eq!((sum, window.suppressed), (u64::from(Window::MOST), 15));
        assert_eq!(admit(&mut window, 2 * Window::LENGTH + 1), Some(15));
        assert_eq!(admit(&mut window, 2 * Window::LENGTH + 2), Some(0));
    }

    #[test]
    fn the_clock_is_read_once_a_tick_when_enough_was_told() {
        let mut window = Window::default();
        let mut reads = 0;
        for _ in 0..1000 {
            let _told = window.admit(7, || {
                reads += 1;
                Window::LENGTH
            });
        }
        assert_eq!((reads, window.suppressed), (Window::MOST, 990));
        assert_eq!(window.admit(8, || Window::LENGTH + 1), None);
        assert_eq!(window.suppressed, 991);
    }

    #[test]
    fn a_clock_that_goes_back_stops_nothing_for_good() {
        let mut window =
            Window { start: 5 * Window::LENGTH, tick: 1, told: Window::MOST, ..Window::default() };
        assert_eq!(admit(&mut window, 0), Some(0));
    }

    #[test]
    fn answers_are_limited_in_each_window() {
        let mut window = Window::default();
        for second in 1..3 {
            admit(&mut window, second * Window::LENGTH);
            let sent = (0..2 * Window::MOST_ANSWERS).filter(|_| window.may_answer()).count();
            assert_eq!(sent, Window::MOST_ANSWERS as usize);
        }
    }
}
