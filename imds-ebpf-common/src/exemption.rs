//! Who may reach guarded endpoints after all, and which of them.

use core::hint;

use crate::{endpoint::MAX_ENDPOINTS, verdict::Verdict};

/// Whom an exemption is for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Subject {
    /// Interface index, cookie or id.
    pub id: u64,
    /// A [`SubjectKind`].
    pub kind: u64,
}

/// What a subject is known by.
#[repr(u64)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SubjectKind {
    /// Index of the node's end of a pod's link.
    Interface = 1,
    /// Cookie of a network namespace.
    Netns = 2,
    /// Id of a cgroup v2.
    Cgroup = 3,
}

impl SubjectKind {
    /// The kind with this number, or `None` where no version of this layout has given it.
    #[must_use]
    pub const fn from_u64(kind: u64) -> Option<Self> {
        match kind {
            1 => Some(Self::Interface),
            2 => Some(Self::Netns),
            3 => Some(Self::Cgroup),
            _ => None,
        }
    }

    /// The name, as users see it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interface => "interface",
            Self::Netns => "netns",
            Self::Cgroup => "cgroup",
        }
    }
}

impl Subject {
    /// The subject of this kind with this number.
    #[inline(always)]
    #[must_use]
    pub const fn new(kind: SubjectKind, id: u64) -> Self {
        Self { id, kind: kind as u64 }
    }
}

/// A bit for each endpoint: that of the endpoint with number `id` is bit `id - 1`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct EndpointSet {
    words: [u64; MAX_ENDPOINTS / 64],
}

impl EndpointSet {
    /// No endpoint.
    pub const NONE: Self = Self { words: [0; MAX_ENDPOINTS / 64] };

    /// Whether the endpoint with this number is in it. No endpoint has the number 0, or one above [`MAX_ENDPOINTS`].
    #[inline(always)]
    #[must_use]
    pub fn has(&self, id: u32) -> bool {
        self.bit(id) == 1
    }

    /// 1 where it is in it, else 0: by arithmetic, so that a verifier has one way through here. What it wants to see of the
    /// index is hidden from the compiler, which else leaves it out.
    #[inline(always)]
    fn bit(&self, id: u32) -> u32 {
        let index = id.wrapping_sub(1);
        let word = self.words[hint::black_box(index as usize / 64) % (MAX_ENDPOINTS / 64)];
        // Above the last number the quotient is not zero, so that its negative has the highest bit.
        let is_beyond = hint::black_box(index / MAX_ENDPOINTS as u32).wrapping_neg() >> 31;
        (word >> (index % 64)) as u32 & 1 & !is_beyond
    }

    /// Puts the endpoint with this number in; one that no endpoint has is left out.
    pub fn insert(&mut self, id: u32) {
        let index = id.wrapping_sub(1) as usize;
        if let Some(word) = self.words.get_mut(index / 64) {
            *word |= 1 << (index % 64);
        }
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::NONE
    }

    /// What is in either.
    #[must_use]
    pub fn union(mut self, other: &Self) -> Self {
        for (to, from) in self.words.iter_mut().zip(other.words) {
            *to |= from;
        }
        self
    }

    /// What is in this one and not in the other.
    #[must_use]
    pub fn without(mut self, other: &Self) -> Self {
        for (to, from) in self.words.iter_mut().zip(other.words) {
            *to &= !from;
        }
        self
    }
}

impl FromIterator<u32> for EndpointSet {
    fn from_iter<T: IntoIterator<Item = u32>>(ids: T) -> Self {
        let mut set = Self::NONE;
        ids.into_iter().for_each(|id| set.insert(id));
        set
    }
}

/// What a subject is granted. An endpoint that is in both is exempt.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Exemption {
    /// The endpoints that it may reach.
    pub exempt: EndpointSet,
    /// The endpoints for which it is judged as in audit mode.
    pub audited: EndpointSet,
}

impl Exemption {
    /// Nothing.
    pub const NONE: Self = Self { exempt: EndpointSet::NONE, audited: EndpointSet::NONE };

    /// The verdict on what its subject sends to the endpoint with this number, where it is `verdict` on anybody else.
    #[inline(always)]
    #[must_use]
    pub fn soften(&self, verdict: Verdict, endpoint: u32) -> Verdict {
        let number = verdict as u32;
        // All ones for that verdict, else zero; without branches, as above.
        let is =
            |other: Verdict| hint::black_box((number ^ other as u32).wrapping_sub(1) >> 31).wrapping_neg();
        let exempt = self.exempt.bit(endpoint).wrapping_neg() & (is(Verdict::Deny) | is(Verdict::Audit));
        let audited = self.audited.bit(endpoint).wrapping_neg() & is(Verdict::Deny) & !exempt;
        let to_exempt = exempt & (number ^ Verdict::Exempt as u32);
        let to_audit = audited & (number ^ Verdict::Audit as u32);
        Verdict::from_u32(number ^ hint::black_box(to_exempt | to_audit))
    }

    /// Whether nothing is granted.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    /// What either grants.
    #[must_use]
    pub fn union(self, other: &Self) -> Self {
        Self { exempt: self.exempt.union(&other.exempt), audited: self.audited.union(&other.audited) }
    }

    /// The same but for these endpoints.
    #[must_use]
    pub fn without(self, endpoints: &EndpointSet) -> Self {
        Self { exempt: self.exempt.without(endpoints), audited: self.audited.without(endpoints) }
    }
}

const _: () = assert!(size_of::<Subject>() == 16);
const _: () = assert!(size_of::<Exemption>() == 64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_the_numbers_that_were_put_in_and_no_other() {
        for id in [1, 2, 64, 65, 255, 256] {
            let set: EndpointSet = [id].into_iter().collect();
            assert!(!set.is_empty());
            for other in 0..1000 {
                assert_eq!(set.has(other), other == id, "{id}: {other}");
            }
            assert!(!set.has(u32::MAX) && set.without(&set).is_empty());
        }
        for nobodys in [0, 257, u32::MAX] {
            assert!([nobodys].into_iter().collect::<EndpointSet>().is_empty(), "{nobodys}");
        }
    }

    #[test]
    fn an_exemption_softens_what_would_be_denied_and_nothing_else() {
        let set = |ids: &[u32]| ids.iter().copied().collect();
        let exemption = Exemption { exempt: set(&[1, 3]), audited: set(&[2, 3]) };
        let after = |verdict| [1, 2, 3, 4].map(|id| exemption.soften(verdict, id));
        use Verdict::{Allow, Audit, Deny, Exempt, Foreign, Kept};
        assert_eq!(after(Deny), [Exempt, Audit, Exempt, Deny]);
        assert_eq!(after(Audit), [Exempt, Audit, Exempt, Audit]);
        for verdict in [Foreign, Allow, Kept] {
            assert_eq!(after(verdict), [verdict; 4]);
        }
        assert_eq!(Exemption::NONE.soften(Deny, 1), Deny);
        assert_eq!(exemption.without(&set(&[1, 2])), Exemption { exempt: set(&[3]), audited: set(&[3]) });
    }
}
