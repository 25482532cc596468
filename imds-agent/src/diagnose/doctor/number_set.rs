//! Sets of ports, protocols and user ids, as firewall rules match them.

use std::fmt;

/// Sorted ranges that neither overlap nor touch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct NumberSet(Vec<(u32, u32)>);

impl NumberSet {
    pub(crate) fn all() -> Self {
        Self(vec![(0, u32::MAX)])
    }

    /// Returns the set of these ranges, which may overlap.
    pub(crate) fn new(mut ranges: Vec<(u32, u32)>) -> Self {
        ranges.retain(|(first, last)| first <= last);
        ranges.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    pub(crate) fn is_all(&self) -> bool {
        *self == Self::all()
    }

    pub(crate) fn contains(&self, number: u32) -> bool {
        self.0.iter().any(|&(first, last)| first <= number && number <= last)
    }

    pub(crate) fn complement(&self) -> Self {
        let (mut gaps, mut next) = (Vec::new(), Some(0));
        for &(first, last) in &self.0 {
            if let Some(start) = next
                && start < first
            {
                gaps.push((start, first - 1));
            }
            next = last.checked_add(1);
        }
        gaps.extend(next.map(|start| (start, u32::MAX)));
        Self(gaps)
    }

    /// Keeps only the numbers of the other set, or only those that are not in it.
    pub(crate) fn limit(&mut self, other: &Self, is_negated: bool) {
        *self = if is_negated { self.intersection(&other.complement()) } else { self.intersection(other) };
    }

    pub(crate) fn intersection(&self, other: &Self) -> Self {
        let of_both = self.0.iter().flat_map(|&(first, last)| {
            other.0.iter().map(move |&(from, to)| (first.max(from), last.min(to)))
        });
        Self::new(of_both.collect())
    }

    pub(crate) fn single(&self) -> Option<u32> {
        match self.0[..] {
            [(first, last)] if first == last => Some(first),
            _ => None,
        }
    }
}

impl fmt::Display for NumberSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_merged_shown_and_inverted() {
        let set = NumberSet::new(vec![(80, 80), (443, 443), (81, 90), (5, 3), (85, 100)]);
        assert_eq!(set.to_string(), "80-100,443");
        assert!(set.contains(100) && !set.contains(101) && set.single().is_none());
        assert_eq!(set.complement().to_string(), "0-79,101-442,444-4294967295");
        assert_eq!(set.complement().complement(), set);
        assert_eq!(NumberSet::all().complement(), NumberSet::new(Vec::new()));
        assert!(NumberSet::new(Vec::new()).complement().is_all());
        let low = NumberSet::new(vec![(0, 85)]);
        assert_eq!(set.intersection(&low).to_string(), "80-85");
        assert_eq!(
            NumberSet::new(vec![(u32::MAX, u32::MAX), (7, 7)]).complement().to_string(),
            "0-6,8-4294967294"
        );
    }
}
