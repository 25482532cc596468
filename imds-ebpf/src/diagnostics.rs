//! What the programs log of themselves, by aya-log: never of a packet, which is what events are for.

use aya_log_ebpf_macros::warn;

/// A packet or call that was judged, but of which nothing can be kept: a map is full.
///
/// A function of its own, so that the verifier follows it apart from what it is called for.
#[inline(never)]
pub(crate) fn unaccounted(hook: u32, ifindex: u32) {
    warn!(
        (),
        "a map is full: what hook {} denies or lets pass at interface {} is not counted", hook, ifindex
    );
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
