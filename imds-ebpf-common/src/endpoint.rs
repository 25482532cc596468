//! The guarded endpoints.

/// The instance metadata service of nearly every cloud, in network byte order (RFC 3927 link-local block).
pub const IMDS_IPV4: [u8; 4] = [169, 254, 169, 254];

/// Whether `destination`, in network byte order, is a guarded endpoint.
///
/// One 32-bit compare: this runs for every packet of every pod.
#[inline(always)]
#[must_use]
pub fn is_guarded(destination: [u8; 4]) -> bool {
    u32::from_ne_bytes(destination) == u32::from_ne_bytes(IMDS_IPV4)
}
