//! Encoding of map entries: addresses, zero-padded text and times.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use imds_ebpf_common::{Address, Hook, endpoint::NAME_LEN};
use jiff::Timestamp;

use crate::escape::escape_bytes;

/// Returns the name of the hook with this number in a map.
pub(crate) fn hook_name(number: u32) -> &'static str {
    Hook::ALL.into_iter().find(|&hook| hook as u32 == number).map_or("unknown", Hook::name)
}

/// Returns the map key of an address.
pub(crate) fn address_key(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => Address::from_ipv4(address.octets()),
        IpAddr::V6(address) => Address::from_ipv6(address.octets()),
    }
}

/// Returns the address of a map key. IPv4-mapped addresses become IPv4 addresses.
pub(crate) fn ip_address(key: Address) -> IpAddr {
    key.ipv4().map_or_else(|| Ipv6Addr::from(key.octets()).into(), |octets| Ipv4Addr::from(octets).into())
}

/// Returns a name padded with zeros, or truncated to 15 bytes.
pub(crate) fn name_field(name: &str) -> [u8; NAME_LEN] {
    bytes_field(name.as_bytes().get(..NAME_LEN - 1).unwrap_or(name.as_bytes()))
}

/// Returns `text` padded with zeros, or truncated at a character boundary.
pub(crate) fn text_field<const LEN: usize>(text: &str) -> [u8; LEN] {
    let mut field = [0; LEN];
    write_text(&mut field, text);
    field
}

/// Replaces the content of a field by `text`, padded with zeros, or truncated at a character boundary.
pub(crate) fn write_text(field: &mut [u8], text: &str) {
    let (start, _) = text.split_at(text.floor_char_boundary(field.len()));
    field.fill(0);
    for (to, from) in field.iter_mut().zip(start.bytes()) {
        *to = from;
    }
}

/// Returns `bytes` padded with zeros, or truncated.
pub(crate) fn bytes_field<const LEN: usize>(bytes: &[u8]) -> [u8; LEN] {
    let mut field = [0; LEN];
    for (to, from) in field.iter_mut().zip(bytes) {
        *to = *from;
    }
    field
}

/// Returns the text of a zero-padded field, escaped for output.
pub(crate) fn field_text(field: &[u8]) -> String {
    escape_bytes(without_padding(field))
}

/// Returns the escaped text of a zero-padded field, or `None` if the field is empty.
pub(crate) fn nonempty_text(field: &[u8]) -> Option<String> {
    Some(field_text(field)).filter(|text| !text.is_empty())
}

/// Returns the text of a zero-padded field without escaping, or `None` if it is not UTF-8.
pub(crate) fn raw_field_text(field: &[u8]) -> Option<&str> {
    str::from_utf8(without_padding(field)).ok()
}

fn without_padding(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Returns the nanoseconds since the epoch.
pub(crate) fn nanoseconds(time: Timestamp) -> u64 {
    time.as_nanosecond().try_into().unwrap_or_default()
}

/// Returns the time that is `nanoseconds` after the epoch.
pub(crate) fn timestamp(nanoseconds: u64) -> Timestamp {
    Timestamp::from_nanosecond(nanoseconds.into()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_for_terminals() {
        assert_eq!(field_text(b"curl\0\0x"), "curl");
        assert_eq!(field_text(b"a\x1b[2J\nb"), r"a\u{1b}[2J\nb");
        assert_eq!(field_text(b"\xff"), r"\xff");
        assert_eq!((raw_field_text(b"a\nb\0"), raw_field_text(b"\xff")), (Some("a\nb"), None));
    }

    #[test]
    fn long_text_is_cut_at_a_character() {
        assert_eq!(text_field::<4>("a"), *b"a\0\0\0");
        assert_eq!(text_field::<4>("abcde"), *b"abcd");
        assert_eq!(text_field::<4>("abc\u{e4}"), *b"abc\0");
        assert_eq!(field_text(&text_field::<6>("abc\u{e4}")), "abc\u{e4}");
        assert_eq!(name_field("a name of 20 letters"), *b"a name of 20 le\0");
    }
}
