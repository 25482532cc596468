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

/// Logs that a map of counters or rate limits is full. The packet or call has a verdict, but is not counted or reported.
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

/// Text of the message, before the name of the hook.
const MESSAGE: &[u8] = b"failed to count a request, a map is full: hook ";

/// Maximum length in bytes of a hook's name.
const MAX_NAME: usize = 16;

/// Size in bytes of a record.
const RECORD: usize = 2 + (3 + 3) + (3 + 1) + 3 + 3 + (3 + 4) + (3 + 4) + (3 + MESSAGE.len() + MAX_NAME);
type Record = [u8; RECORD];

/// Records of the message, indexed by the number of the hook. No hook has the number 0.
static MAP_FULL_MESSAGE: [Record; Hook::ALL.len() + 1] = {
    let mut records = [[0; RECORD]; Hook::ALL.len() + 1];
    let mut index = 0;
    while index < Hook::ALL.len() {
        let hook = Hook::ALL[index];
        records[hook as usize] = record(hook.name().as_bytes());
        index += 1;
    }
    records
};

/// Builds the record of the message for a hook: its length, then fields of kind, length and value in native byte order. The
/// file, which the agent does not print, pads the record.
#[expect(clippy::cast_possible_truncation, reason = "a record is short")]
const fn record(hook: &[u8]) -> Record {
    let mut record = [0; RECORD];
    let mut at = put(&mut record, 0, &(RECORD as u16).to_ne_bytes());
    at = put_field(&mut record, at, RecordFieldKind::Target as u8, &[b"bpf"]);
    at = put_field(&mut record, at, RecordFieldKind::Level as u8, &[&[Level::Warn as u8]]);
    at = put_field(&mut record, at, RecordFieldKind::Module as u8, &[]);
    let (padding, _) = [b' '; MAX_NAME].split_at(MAX_NAME - hook.len());
    at = put_field(&mut record, at, RecordFieldKind::File as u8, &[padding]);
    at = put_field(&mut record, at, RecordFieldKind::Line as u8, &[&0_u32.to_ne_bytes()]);
    at = put_field(&mut record, at, RecordFieldKind::NumArgs as u8, &[&1_u32.to_ne_bytes()]);
    at = put_field(&mut record, at, ArgumentKind::Str as u8, &[MESSAGE, hook]);
    assert!(at == RECORD);
    record
}

/// Writes a field whose value consists of parts.
#[expect(clippy::cast_possible_truncation, reason = "a record is short")]
const fn put_field(record: &mut Record, at: usize, kind: u8, parts: &[&[u8]]) -> usize {
    let header = at;
    let value = header + 3;
    let (mut at, mut part) = (value, 0);
    while part < parts.len() {
        at = put(record, at, parts[part]);
        part += 1;
    }
    put(record, header, &[kind]);
    put(record, header + 1, &((at - value) as u16).to_ne_bytes());
    at
}

const fn put(record: &mut Record, at: usize, bytes: &[u8]) -> usize {
    let mut index = 0;
    while index < bytes.len() {
        record[at + index] = bytes[index];
        index += 1;
    }
    at + bytes.len()
}
