//! What the programs tell of a packet or call to a guarded endpoint, and how often.

/// One packet or call. All integers are in host byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Event {
    /// When, in nanoseconds since boot (`CLOCK_BOOTTIME`).
    pub time: u64,
    /// Cookie of the network namespace of the socket; 0 where that is not known.
    pub netns_cookie: u64,
    /// Id of the cgroup v2 of the caller; 0 for packets.
    pub cgroup: u64,
    /// Events of the same source and CPU that were left out since the one before.
    pub suppressed: u64,
    /// Source, IPv4 as IPv4-mapped IPv6; unspecified where that is not known.
    pub source: [u8; 16],
    /// Destination, likewise.
    pub destination: [u8; 16],
    /// Index of the interface at which a packet was judged; 0 for calls.
    pub ifindex: u32,
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
    /// Name of the caller's thread, padded with zero bytes; empty for packets.
    pub comm: [u8; 16],
}

const _: () = assert!(size_of::<Event>() == 96);

/// Whose events are counted together.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Source {
    /// Index of the interface by which packets came in; cookie of the network namespace of calls.
    pub id: u64,
    /// A [`Hook`](crate::Hook).
    pub hook: u64,
}

/// Events of one source on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Window {
    /// When it began, in nanoseconds since boot.
    pub start: u64,
    /// Events that were told since.
    pub told: u64,
    /// Events that were left out since the last one that was told.
    pub suppressed: u64,
}

impl Window {
    /// Length of a window, in nanoseconds.
    pub const LENGTH: u64 = 1_000_000_000;
    /// Most events that are told of one source on one CPU in a window.
    pub const MOST: u64 = 10;

    /// Takes in an event at `now`: the number of those that were left out before, where this one may be told.
    #[inline(always)]
    pub fn admit(&mut self, now: u64) -> Option<u64> {
        if now.wrapping_sub(self.start) >= Self::LENGTH {
            self.start = now;
            self.told = 0;
        }
        if self.told >= Self::MOST {
            self.suppressed += 1;
            return None;
        }
        self.told += 1;
        Some(core::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_tells_so_many_and_no_event_is_lost_from_the_sum() {
        let mut window = Window::default();
        let mut sum = 0;
        for time in 0..25 {
            if let Some(suppressed) = window.admit(Window::LENGTH + time) {
                sum += 1 + suppressed;
            }
        }
        assert_eq!((sum, window.suppressed), (Window::MOST, 15));
        assert_eq!(window.admit(2 * Window::LENGTH + 1), Some(15));
        assert_eq!(window.admit(2 * Window::LENGTH + 2), Some(0));
    }

    #[test]
    fn a_clock_that_goes_back_stops_nothing_for_good() {
        let mut window = Window { start: 5 * Window::LENGTH, told: Window::MOST, suppressed: 0 };
        assert_eq!(window.admit(0), Some(0));
    }
}
