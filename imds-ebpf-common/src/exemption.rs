//! Exemptions: identities of senders that may reach protected endpoints.

use crate::{address::Address, opaque::opaque, policy::Verdict, policy_lookup::PolicyLookup};

/// Number of bits in [`PolicyFilter::subjects`](crate::PolicyFilter::subjects).
pub const SUBJECT_SLOTS: usize = 1 << 14;

/// Largest number of entries of the map of exemptions: several for each pod on a large node with 1,000 pods.
pub const MAX_EXEMPTIONS: usize = 1 << 14;

/// Index in the map of source addresses for the node's own addresses. No interface has it.
pub const NODE_SOURCES: u32 = 0;

/// Index in the map of source addresses for those of the node and of all exempt pods, while the node has a device whose packets
/// pass a second `node_egress` hook ([`OwnPackets::Passed`](crate::OwnPackets::Passed)). No interface has it: ifindexes are
/// below 2^31.
pub const PASSED_SOURCES: u32 = u32::MAX;

/// Identity of a sender, as the programs know it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Subject {
    /// Interface index, netns cookie or cgroup id, depending on `kind`.
    pub id: u64,
    /// Number of the [`SubjectKind`] of `id`.
    pub kind: u64,
}

/// Kind of the id in a [`Subject`].
#[repr(u64)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SubjectKind {
    /// Index of the host-side interface of a pod, or of a bridge with such a port ([`ExemptionRecord::BRIDGE`]).
    Interface = 1,
    /// Cookie of a network namespace.
    Netns = 2,
    /// Id of a cgroup v2.
    Cgroup = 3,
}

impl SubjectKind {
    /// Returns the kind with this number, or `None` for an unknown number.
    #[must_use]
    pub const fn from_u64(kind: u64) -> Option<Self> {
        match kind {
            1 => Some(Self::Interface),
            2 => Some(Self::Netns),
            3 => Some(Self::Cgroup),
            _ => None,
        }
    }
}

impl Subject {
    /// No identity: no interface has the index 0.
    pub const NONE: Self = Self::new(SubjectKind::Interface, 0);

    /// Creates an identity from its kind and its index, cookie or id.
    #[inline(always)]
    #[must_use]
    pub const fn new(kind: SubjectKind, id: u64) -> Self {
        Self { id, kind: kind as u64 }
    }

    /// Returns the bit in [`PolicyFilter::subjects`](crate::PolicyFilter::subjects). The kernel assigns indices and cookies
    /// in sequence, and consecutive ids get different bits.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the remainder is less than the number of slots")]
    pub const fn slot(self) -> u16 {
        ((self.id ^ (self.id >> 14) ^ (self.kind << 12)) % SUBJECT_SLOTS as u64) as u16
    }
}

/// Key of the map of exemptions: one identity at one endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ExemptionKey {
    /// Address of the endpoint; [`Address::ANY`] for all endpoints.
    pub address: Address,
    /// Identity of the exempt sender.
    pub subject: Subject,
}

/// Value of the map of exemptions.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ExemptionRecord {
    /// [`Verdict::Exempt`] or [`Verdict::Audited`], which replaces [`Verdict::Denied`]. Other values do not exempt.
    pub verdict: u32,
    /// Number of the exemption rule in the configuration, from 1.
    pub rule: u32,
    /// Flag: [`ExemptionRecord::PASSES`], [`ExemptionRecord::BRIDGE`] or 0.
    pub flags: u32,
    /// Explicit padding, always written as 0.
    pub reserved: u32,
}

/// Value of the map of probes: a test sender of `imds-agent verify`, and the verdicts on its packets and calls.
///
/// The programs count a probe here and nowhere else, and emit no event for it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ProbeRecord {
    /// Flags: [`ProbeRecord::EXEMPT`], [`ProbeRecord::PASSES`] and [`ProbeRecord::BRIDGE`].
    pub flags: u32,
    /// Explicit padding, always written as 0.
    pub reserved: u32,
    /// Number of packets and calls at each hook by verdict: `verdicts[hook][verdict]`.
    pub verdicts: [[u64; 7]; 7],
}

impl ProbeRecord {
    /// Flag: the programs treat the probe as an exempt sender.
    pub const EXEMPT: u32 = 1;
    /// Flag: `from_pod` sets [`PASSED_HASH`](crate::PASSED_HASH) on packets of the probe.
    pub const PASSES: u32 = 2;
    /// Flag: the probe is a bridge, and only packets that `from_pod` has let pass belong to the probe.
    pub const BRIDGE: u32 = 4;
}

impl ExemptionRecord {
    /// Flag: `from_pod` sets [`PASSED_HASH`](crate::PASSED_HASH) on packets of this subject. Needed for a pod behind a bridge of the node,
    /// because the ingress interface at `node_egress` is then the bridge.
    pub const PASSES: u32 = 1;
    /// Flag: the subject is a bridge of the node with the host-side interface of an exempt pod as a port. Only packets
    /// that `from_pod` has let pass with an address of an exempt pod or of the node as their source are exempt.
    pub const BRIDGE: u32 = 2;

    /// Creates the record of an exemption with this `verdict` by the rule with the number `rule`, from 1.
    #[must_use]
    pub const fn new(verdict: Verdict, rule: u32) -> Self {
        Self { verdict: verdict as u32, rule, flags: 0, reserved: 0 }
    }

    /// Returns the verdict on a request with this exemption. `verdict` is the verdict without it.
    #[inline(always)]
    #[must_use]
    pub const fn apply(self, verdict: Verdict) -> Verdict {
        const EXEMPT: u32 = Verdict::Exempt as u32;
        const AUDIT: u32 = Verdict::Audited as u32;
        match self.verdict {
            EXEMPT => Verdict::Exempt,
            AUDIT => Verdict::Audited,
            _ => verdict,
        }
    }
}

/// Reports whether an exemption can change `verdict`.
#[inline(always)]
#[must_use]
pub const fn can_be_exempted(verdict: Verdict) -> bool {
    match verdict {
        Verdict::Denied | Verdict::Audited => true,
        Verdict::Unrelated | Verdict::Off | Verdict::Allowed | Verdict::Exempt | Verdict::Redirected => false,
    }
}

/// Returns the verdict on a request of `subject` to `address`. `verdict` is the verdict without an exemption.
#[inline(always)]
pub fn apply_exemption<T: PolicyLookup + ?Sized>(
    verdict: Verdict,
    subject: Subject,
    address: &Address,
    policy: &T,
) -> Verdict {
    if !policy.may_be_exempt(subject.slot()) {
        return verdict;
    }
    find_exemption(verdict, subject, address, policy).map_or(verdict, |exemption| exemption.apply(verdict))
}

/// Returns the exemption that changes `verdict` on packets of `subject` to `address`.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the value is zero")]
pub fn find_exemption<T: PolicyLookup + ?Sized>(
    verdict: Verdict,
    subject: Subject,
    address: &Address,
    policy: &T,
) -> Option<ExemptionRecord> {
    if !can_be_exempted(verdict) {
        return None;
    }
    let of_one = policy.exemption(&ExemptionKey { address: *address, subject });
    // Address::ANY, hidden from the compiler: it puts constants of that size in a section, and loaders create a map for
    // each section.
    let any = || Address::from_ipv4((opaque(0) as u32).to_be_bytes());
    of_one.or_else(|| policy.exemption(&ExemptionKey { address: any(), subject }))
}

const _: () = assert!(size_of::<Subject>() == 16);
const _: () = assert!(size_of::<ExemptionKey>() == 32);
const _: () = assert!(size_of::<ExemptionRecord>() == 16);
const _: () = assert!(size_of::<ProbeRecord>() == 8 + 7 * 7 * 8);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{InMemoryPolicy, Mode, PolicyFilter};

    const ONE: Address = Address::from_ipv4([10, 0, 0, 1]);
    const OTHER: Address = Address::from_ipv4([10, 0, 0, 2]);

    const POD: Subject = Subject::new(SubjectKind::Interface, 7);

    fn verdicts(
        exemptions: &[(ExemptionKey, ExemptionRecord)],
        verdict: Verdict,
        subject: Subject,
    ) -> [Verdict; 2] {
        let mut filter = PolicyFilter::EMPTY;
        filter.set_subjects(exemptions.iter().map(|(exemption, _)| exemption.subject));
        let policy = InMemoryPolicy { filter: &filter, endpoints: &[], exemptions, mode: Mode::Enforce };
        [ONE, OTHER].map(|address| apply_exemption(verdict, subject, &address, &policy))
    }

    #[test]
    fn exemption_affects_denials_only() {
        use Verdict::{Allowed, Audited, Denied, Exempt, Off, Unrelated};
        let record = |verdict| ExemptionRecord::new(verdict, 1);
        let at = |address, verdict| (ExemptionKey { address, subject: POD }, record(verdict));
        for (exemptions, denied) in [
            (&[][..], [Denied, Denied]),
            (&[at(ONE, Exempt)], [Exempt, Denied]),
            (&[at(ONE, Audited)], [Audited, Denied]),
            (&[at(Address::ANY, Exempt)], [Exempt, Exempt]),
            (&[at(Address::ANY, Audited), at(OTHER, Exempt)], [Audited, Exempt]),
            // Verdicts that the agent never writes do not exempt.
            (&[at(ONE, Unrelated), at(OTHER, Off)], [Denied, Denied]),
        ] {
            assert_eq!(verdicts(exemptions, Denied, POD), denied, "{exemptions:?}");
            let audited = denied.map(|verdict| if verdict == Denied { Audited } else { verdict });
            assert_eq!(verdicts(exemptions, Audited, POD), audited, "{exemptions:?}");
            for verdict in [Unrelated, Off, Allowed] {
                assert_eq!(verdicts(exemptions, verdict, POD), [verdict; 2], "{exemptions:?}");
            }
            for kind in [SubjectKind::Netns, SubjectKind::Cgroup] {
                assert_eq!(
                    verdicts(exemptions, Denied, Subject::new(kind, 7)),
                    [Denied; 2],
                    "{exemptions:?}"
                );
            }
            assert_eq!(
                verdicts(exemptions, Denied, Subject::new(SubjectKind::Interface, 8)),
                [Denied; 2],
                "{exemptions:?}"
            );
        }
    }

    #[test]
    fn adjacent_rules_have_separate_slots() {
        for kind in [SubjectKind::Interface, SubjectKind::Netns, SubjectKind::Cgroup] {
            let mut seen = [false; SUBJECT_SLOTS];
            for id in 4000..4000 + SUBJECT_SLOTS as u64 {
                let slot = usize::from(Subject::new(kind, id).slot());
                seen[slot] = true;
            }
            assert!(seen.iter().filter(|&&seen| seen).count() > SUBJECT_SLOTS / 2);
        }
    }
}
