//! Checksum that stays the same in each version of the agent, unlike the hashes of the standard library.

/// Returns the 64-bit FNV-1a hash of a text. The hash detects accidental damage and changes, but not manipulation.
pub(crate) fn fnv1a(text: &str) -> u64 {
    let step = |sum: u64, byte: u8| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Folds a hash to 48 bits for a metric: Prometheus stores a sample as a float, which represents integers of up to 53 bits
/// exactly.
pub(crate) const fn fold(hash: u64) -> u64 {
    (hash >> 48) ^ (hash & 0xffff_ffff_ffff)
}
