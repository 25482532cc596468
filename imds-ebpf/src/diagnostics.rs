//! Log messages of the programs about their own failures, which the agent prints through aya-log. Denied packets have events
//! instead.
//!
//! The macros of aya-log build a record byte by byte in each program, which costs the verifier hundreds of instructions. The
//! records in this module are constants in the wire format of aya-log-common.

use aya_ebpf::{btf_maps::RingBuf, helpers::generated::bpf_jiffies64, macros::btf_map};
use aya_log_common::{ArgumentKind, Level, RecordFieldKind};
use imds_ebpf_common::{Hook, opaque::opaque};

/// Size of the ring buffer in bytes.
const LOG_BYTES: usize = 64 * 1024;

/// Ring buffer of log records. aya-log finds it by this name.
#[btf_map(name = "AYA_LOGS")]
static LOGS: RingBuf<(), LOG_BYTES> = RingBuf::new();

/// Minimum interval between two messages, in timer ticks (100 to 1000 per second, depending on `CONFIG_HZ`).
const MIN_INTERVAL: u64 = 2500;

/// Time of the last message, in timer ticks. The initial value is not zero, because zero variables would be placed in the
/// section of the filter (`.bss`).
#[unsafe(no_mangle)]
static mut LAST_WARNING: u64 = u64::MAX / 2;

/// Logs that a map is full. The packet or call at this hook got a verdict, but is neither counted nor reported.
///
/// A separate function, so that the verifier checks it apart from its callers.
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits on BPF")]
pub(crate) fn warn_map_full(hook: u32) {
    // SAFETY: the helper takes no arguments.
    let now = unsafe { bpf_jiffies64() };
    let last = &raw mut LAST_WARNING;
    // SAFETY: the pointer to a static is always valid; two CPUs that write at once cause two messages.
    if now.wrapping_sub(unsafe { last.read_volatile() }) < MIN_INTERVAL {
        return;
    }
    // SAFETY: the pointer to a static is always valid.
    unsafe { last.write_volatile(now) };
    // Opaque, because the compiler knows the range of the number and would remove the bounds check that the verifier needs.
    if let Some(record) = MAP_FULL_MESSAGE.get(opaque(hook.into()) as usize) {
        let _no_room = LOGS.output_untyped::<Record>(record, 0);
    }
}

/// Size in bytes of a record with a message of [`MESSAGE`]'s length.
const RECORD: usize = 2 + (3 + 3) + (3 + 1) + 3 + 3 + (3 + 4) + (3 + 4) + (3 + MESSAGE.len());
type Record = [u8; RECORD];

/// Text of the message. The number of the hook replaces the last character.
const MESSAGE: &[u8] = b"a map is full: hook ?";

/// Records of the message, indexed by the number of the hook.
static MAP_FULL_MESSAGE: [Record; Hook::ALL.len() + 1] = {
    let mut records = [[0; RECORD]; Hook::ALL.len() + 1];
    let mut hook = 0;
    while hook < records.len() {
        records[hook] = record(hook);
        hook += 1;
    }
    records
};

/// Builds the record of the message for a hook: its length, then fields of kind, length and value in native byte order.
#[expect(clippy::cast_possible_truncation, reason = "a record is short, and a hook has one digit")]
const fn record(hook: usize) -> Record {
    let mut record = [0; RECORD];
    let mut at = put(&mut record, 0, &(RECORD as u16).to_ne_bytes());
    at = put_field(&mut record, at, RecordFieldKind::Target as u8, b"bpf");
    at = put_field(&mut record, at, RecordFieldKind::Level as u8, &[Level::Warn as u8]);
    at = put_field(&mut record, at, RecordFieldKind::Module as u8, b"");
    at = put_field(&mut record, at, RecordFieldKind::File as u8, b"");
    at = put_field(&mut record, at, RecordFieldKind::Line as u8, &0_u32.to_ne_bytes());
    at = put_field(&mut record, at, RecordFieldKind::NumArgs as u8, &1_u32.to_ne_bytes());
    at = put_field(&mut record, at, ArgumentKind::Str as u8, MESSAGE);
    assert!(at == RECORD && hook < 10);
    record[RECORD - 1] = b'0' + hook as u8;
    record
}

#[expect(clippy::cast_possible_truncation, reason = "a record is short")]
const fn put_field(record: &mut Record, at: usize, kind: u8, value: &[u8]) -> usize {
    let at = put(record, at, &[kind]);
    let at = put(record, at, &(value.len() as u16).to_ne_bytes());
    put(record, at, value)
}

const fn put(record: &mut Record, at: usize, bytes: &[u8]) -> usize {
    let mut index = 0;
    while index < bytes.len() {
        record[at + index] = bytes[index];
        index += 1;
    }
    at + bytes.len()
}
