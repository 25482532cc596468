//! What the programs log of themselves, by aya-log: never of a packet, which is what events are for.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use aya_log_ebpf_macros::warn;

/// Timer ticks between two messages: some seconds, at as many a second as distributions choose (100 to 1000).
const PAUSE: u64 = 2500;

/// When the last message was. Not zero, with which it would be in the section that is the filter's alone.
#[unsafe(no_mangle)]
static mut LAST: u64 = u64::MAX / 2;

/// A packet or call that was judged, but of which nothing can be kept: a map is full.
///
/// A function of its own, so that the verifier follows it apart from what it is called for.
#[inline(never)]
pub(crate) fn unaccounted(hook: u32) {
    // SAFETY: the helper takes no arguments; the verifier makes a load of the call.
    let now = unsafe { bpf_jiffies64() };
    let last = &raw mut LAST;
    // SAFETY: of this variable alone; two CPUs that write it at once log twice.
    if now.wrapping_sub(unsafe { last.read_volatile() }) < PAUSE {
        return;
    }
    // SAFETY: as above.
    unsafe { last.write_volatile(now) };
    warn!((), target: "bpf", "a map is full: hook {}", hook);
}

/// What the macros of aya-log-ebpf expect of that crate. Its own has the ring buffer as a legacy map, which libbpf refuses,
/// and with it `bpftool prog loadall`.
pub(crate) mod macro_support {
    use aya_ebpf::{btf_maps::RingBuf, macros::btf_map, maps::ring_buf::RingBufBytes};
    pub(crate) use aya_log_common::{
        Argument, DefaultFormatter, DisplayHint, Field, Header, Level, LogValueLength,
    };

    const BYTES: usize = 64 * 1024;
    /// What a record takes, at most and at least.
    const RECORD: usize = 512;

    /// By this name aya-log finds it.
    #[btf_map(name = "AYA_LOGS")]
    static RING: RingBuf<(), BYTES> = RingBuf::new();

    pub(crate) struct Logs;

    pub(crate) static AYA_LOGS: Logs = Logs;

    impl Logs {
        /// The macros double a size until a record fits: to the verifier that is as many ways as there are sizes, each
        /// to be followed through the whole record. One size is one way.
        #[inline(always)]
        #[expect(clippy::unused_self, reason = "the macros call it so")]
        pub(crate) fn reserve_bytes(&self, _size: usize, flags: u64) -> Option<RingBufBytes<'_>> {
            RING.reserve_bytes(RECORD, flags)
        }
    }

    /// All is logged: there is little of it.
    #[inline(always)]
    pub(crate) const fn level_enabled(_level: Level) -> bool {
        true
    }
}
