//! Test senders (probes) of `imds-agent verify`. They have separate counters and no events, so that reports do not show them.

use imds_ebpf_common::{Hook, ProbeRecord, Subject, Verdict, opaque::opaque};

use crate::maps;

/// Result for a packet or call of a probe.
pub(crate) struct Probed {
    pub(crate) verdict: Verdict,
    /// True if `node_egress` recognizes the packet by its hash.
    pub(crate) passes: bool,
}

/// Reports whether only packets that `from_pod` has let pass belong to the probe, which is a bridge.
#[inline(always)]
pub(crate) fn is_bridge(probe: *mut ProbeRecord) -> bool {
    // SAFETY: the map owns the value, and frees it only after an RCU grace period.
    unsafe { (*probe).flags & ProbeRecord::BRIDGE != 0 }
}

/// Counts a packet or call with this `verdict` if the sender is a probe. Returns `None` for all other senders, and for a bridge,
/// which is a probe at `node_egress` only.
#[inline(always)]
pub(crate) fn classify(subject: Subject, hook: Hook, verdict: Verdict) -> Option<Probed> {
    if !maps::has_probes() {
        return None;
    }
    maps::probe(&subject).filter(|&probe| !is_bridge(probe)).map(|probe| count(probe, hook, verdict))
}

/// Counts a packet or call of a probe, and returns the verdict on it.
#[inline(always)]
pub(crate) fn count(probe: *mut ProbeRecord, hook: Hook, verdict: Verdict) -> Probed {
    // The verdict in the lower 8 bits and the flags above them, because a BPF function returns one register.
    let packed = count_number(probe, hook as u32, verdict as u32);
    // SAFETY: the lower bits are the number of a verdict.
    let verdict = unsafe { Verdict::from_u32_unchecked(packed & 0xff) };
    Probed { verdict, passes: packed & ProbeRecord::PASSES << 8 != 0 }
}

#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits on BPF")]
fn count_number(probe: *mut ProbeRecord, hook: u32, verdict: u32) -> u32 {
    // SAFETY: the map owns the value, and frees it only after an RCU grace period.
    let ProbeRecord { flags, verdicts, .. } = unsafe { &mut *probe };
    let denied = Verdict::Denied as u32;
    let is_exempt =
        *flags & ProbeRecord::EXEMPT != 0 && (verdict == denied || verdict == Verdict::Audited as u32);
    let verdict = if is_exempt { Verdict::Exempt as u32 } else { verdict };
    // Opaque, because the compiler knows the range of both numbers and would remove the bounds checks that the verifier needs.
    let (row, column) = (opaque(hook.into()) as usize, opaque(verdict.into()) as usize);
    if let Some(count) = verdicts.get_mut(row).and_then(|row| row.get_mut(column)) {
        *count += 1;
    }
    verdict | *flags << 8
}
