//! Ranges of IP addresses, as firewall rules match them.

use std::{collections::BTreeSet, fmt, net::IpAddr};

/// Addresses from the first to the last. Both are of one family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct AddressRange {
    first: IpAddr,
    last: IpAddr,
}

impl AddressRange {
    /// Returns the range, or `None` if the families differ or the order is wrong.
    pub(crate) fn new(first: IpAddr, last: IpAddr) -> Option<Self> {
        (first.is_ipv4() == last.is_ipv4() && first <= last).then_some(Self { first, last })
    }

    /// Returns the addresses that share the first `bits` bits with `address`.
    pub(crate) fn from_prefix(address: IpAddr, bits: u32) -> Option<Self> {
        let host_bits = width(address).checked_sub(bits)?;
        let mask = u128::MAX.checked_shl(host_bits).map_or(u128::MAX, |mask| !mask);
        let number = to_number(address);
        Self::new(from_number(number & !mask, address)?, from_number(number | mask, address)?)
    }

    /// Reads `address`, `address/bits`, `address/mask` or `first-last`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if let Some((first, last)) = text.split_once('-') {
            return Self::new(first.parse().ok()?, last.parse().ok()?);
        }
        let (address, length) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
        let address = address.parse().ok()?;
        let bits = match length {
            None => width(address),
            Some(length) => length.parse().ok().or_else(|| prefix_length(length.parse().ok()?))?,
        };
        Self::from_prefix(address, bits)
    }

    pub(crate) fn contains(self, address: IpAddr) -> bool {
        self.first <= address && address <= self.last
    }

    pub(crate) fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.first.max(other.first), self.last.min(other.last))
    }

    /// Reports whether the range is wider than a prefix of 8 bits. A rule for it is not specific to a metadata service.
    pub(crate) fn is_about_everything(self) -> bool {
        let host_bits = width(self.first) - 8;
        to_number(self.last) - to_number(self.first) >= 1 << host_bits
    }

    pub(crate) fn is_within(self, addresses: &BTreeSet<IpAddr>) -> bool {
        let count = addresses.range(self.first..=self.last).count() as u128;
        count > to_number(self.last) - to_number(self.first)
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last } = *self;
        if first == last {
            return first.fmt(f);
        }
        let (mask, start) = (to_number(first) ^ to_number(last), to_number(first));
        let is_prefix = mask & mask.wrapping_add(1) == 0 && start & mask == 0;
        if is_prefix {
            return write!(f, "{first}/{}", width(first) - mask.trailing_ones());
        }
        write!(f, "{first}-{last}")
    }
}

fn width(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn to_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// Returns the address with this number in the family of `like`. Bits beyond the width of an IPv4 address are cut off.
fn from_number(number: u128, like: IpAddr) -> Option<IpAddr> {
    Some(match like {
        IpAddr::V4(_) => {
            IpAddr::V4(std::net::Ipv4Addr::from_bits(u32::try_from(number & u128::from(u32::MAX)).ok()?))
        }
        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::from_bits(number)),
    })
}

/// Returns the number of leading ones of a netmask without holes.
fn prefix_length(mask: IpAddr) -> Option<u32> {
    let bits = match mask {
        IpAddr::V4(mask) => mask.to_bits().leading_ones(),
        IpAddr::V6(mask) => mask.to_bits().leading_ones(),
    };
    let whole = AddressRange::from_prefix(from_number(u128::MAX, mask)?, bits)?;
    (whole.first == mask).then_some(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> AddressRange {
        AddressRange::parse(text).unwrap_or_else(|| panic!("{text}"))
    }

    #[test]
    fn ranges_parse_and_print() {
        for (text, shown) in [
            ("169.254.169.254", "169.254.169.254"),
            ("169.254.169.254/32", "169.254.169.254"),
            ("169.254.1.2/16", "169.254.0.0/16"),
            ("169.254.1.2/255.255.0.0", "169.254.0.0/16"),
            ("10.0.0.0-10.0.0.255", "10.0.0.0/24"),
            ("10.0.0.1-10.0.0.9", "10.0.0.1-10.0.0.9"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("::/0", "::/0"),
            ("fd00:ec2::254/128", "fd00:ec2::254"),
            ("fd00:ec2::254/32", "fd00:ec2::/32"),
        ] {
            assert_eq!(range(text).to_string(), shown, "{text}");
        }
        for text in ["", "a", "1.1.1.1/33", "::/129", "1.1.1.1/255.0.255.0", "1.1.1.2-1.1.1.1", "1.1.1.1-::1"]
        {
            assert_eq!(AddressRange::parse(text), None, "{text}");
        }
    }

    #[test]
    fn every_address_must_be_protected() {
        let is_within = |text: &str, addresses: &[&str]| {
            range(text).is_within(&addresses.iter().map(|address| address.parse().unwrap()).collect())
        };
        assert!(is_within("169.254.169.254", &["169.254.169.254"]));
        assert!(!is_within("169.254.169.254", &["fd00:ec2::254", "1.1.1.1"]));
        assert!(!is_within("169.254.169.252/30", &["169.254.169.254"]));
        assert!(is_within("255.255.255.254/31", &["255.255.255.255", "255.255.255.254"]));
        assert!(!is_within("0.0.0.0/31", &["0.0.0.0"]) && !is_within("::/0", &["::1"]));
        assert!(is_within("::/127", &["::1", "::"]) && !is_within("::/127", &["::1"]));
    }

    #[test]
    fn wide_ranges_count_as_any() {
        assert!(range("0.0.0.0/0").is_about_everything() && range("::/0").is_about_everything());
        assert!(range("168.0.0.0/7").is_about_everything() && !range("169.0.0.0/8").is_about_everything());
        assert!(range("fc00::/7").is_about_everything() && !range("fd00::/8").is_about_everything());
    }
}
