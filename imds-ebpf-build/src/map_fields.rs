//! Types of the fields in keys and values of the maps, so that `bpftool` prints names instead of numbers.
//!
//! The programs and the agent declare text as `[u8; N]` and variants of enums as integers, because every bit pattern must be a
//! value. BTF contains types of the same size, so that the layouts stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail, ensure};
use imds_ebpf_common::{
    AllowedKind, AttachMode, DenyAction, DenyErrno, ExemptionRecord, Hook, Mode, OwnPackets, Role,
    SubjectKind, Verdict,
    endpoint::{TCP, UDP},
};

use crate::btf::{ARRAY, Btf, DATASEC, ENUM, INT, Member, PTR, RESTRICT, STRUCT, TYPEDEF, UNION, VAR};

/// Data section of the map definitions.
const MAPS: &str = ".maps";

/// Meaning of a field that Rust declares as an integer or as an array of bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Meaning {
    /// Text, padded with zero bytes.
    Text,
    /// An address.
    Bytes,
    /// Number of a variant, or an array of them.
    Number(Enum),
}

/// Enum of `imds-ebpf-common`.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Enum {
    AllowedKind,
    AttachMode,
    DenyAction,
    DenyErrno,
    ExemptionFlag,
    Hook,
    Mode,
    OwnPackets,
    Protocol,
    Role,
    SubjectKind,
    Verdict,
}

use Meaning::{Bytes, Number, Text};

/// All fields with a meaning, by the struct that contains them. The build fails if a field does not exist, and if an array of
/// bytes is missing here.
const FIELDS: &[(&str, &[&str], Meaning)] = &[
    ("Address", &["octets"], Bytes),
    ("AllowedProcess", &["kind"], Number(Enum::AllowedKind)),
    ("ConfigRecord", &["path", "error", "exemption_errors", "text"], Text),
    ("CounterKey", &["hook"], Number(Enum::Hook)),
    ("CounterKey", &["verdict"], Number(Enum::Verdict)),
    ("DenialKey", &["hook"], Number(Enum::Hook)),
    ("DenialKey", &["verdict"], Number(Enum::Verdict)),
    ("DenialRecord", &["namespace", "service_account", "label", "pod", "interface", "comm", "cgroup"], Text),
    ("Endpoint", &["name"], Text),
    ("Event", &["source", "destination"], Bytes),
    ("Event", &["hook"], Number(Enum::Hook)),
    ("Event", &["verdict"], Number(Enum::Verdict)),
    ("Event", &["comm"], Text),
    ("ExemptionRecord", &["verdict"], Number(Enum::Verdict)),
    ("ExemptionRecord", &["flags"], Number(Enum::ExemptionFlag)),
    ("InterfaceRecord", &["name"], Text),
    ("InterfaceRecord", &["role"], Number(Enum::Role)),
    ("InterfaceRecord", &["attach_modes"], Number(Enum::AttachMode)),
    ("InterfaceRecord", &["own_packets"], Number(Enum::OwnPackets)),
    ("KubernetesRecord", &["node", "error"], Text),
    ("PodRecord", &["namespace", "name", "service_account", "container", "label", "uid"], Text),
    ("Policy", &["mode"], Number(Enum::Mode)),
    ("Policy", &["on_deny"], Number(Enum::DenyAction)),
    ("Policy", &["on_deny_errno"], Number(Enum::DenyErrno)),
    ("ProviderRecord", &["configured", "effective"], Text),
    ("RateLimitKey", &["hook"], Number(Enum::Hook)),
    ("RateLimitKey", &["verdict"], Number(Enum::Verdict)),
    ("Service", &["protocol"], Number(Enum::Protocol)),
    ("Subject", &["kind"], Number(Enum::SubjectKind)),
];

/// Names of fields that fill gaps. `bpftool` would print them as zeros.
const PADDING: [&str; 2] = ["padding", "reserved"];
/// Struct and field of the rate limiter in each counter. It is state of the programs, not a count.
const LIMITER: (&str, &str) = ("Counter", "limiter");

impl Enum {
    /// Returns the name of the type, and name and number of each variant.
    fn variants(self) -> (&'static str, Vec<(&'static str, u32)>) {
        match self {
            Self::AllowedKind => (
                "allowed_kind",
                vec![("uid", AllowedKind::Uid as u32), ("cgroup", AllowedKind::Cgroup as u32)],
            ),
            Self::AttachMode => {
                use AttachMode::{Clsact, Netkit, None, Tcx};
                ("attach_mode", [None, Tcx, Clsact, Netkit].map(|mode| (mode.name(), mode as u32)).into())
            }
            Self::DenyAction => {
                use DenyAction::{Drop, Explain, Reject};
                ("on_deny", [Drop, Reject, Explain].map(|action| (action.name(), action as u32)).into())
            }
            Self::DenyErrno => {
                use DenyErrno::{Econnrefused, Ehostunreach, Enetunreach, Eperm};
                let all = [Eperm, Enetunreach, Econnrefused, Ehostunreach];
                ("on_deny_errno", all.map(|errno| (errno.name(), errno as u32)).into())
            }
            Self::ExemptionFlag => (
                "exemption_flag",
                vec![("none", 0), ("passes", ExemptionRecord::PASSES), ("bridge", ExemptionRecord::BRIDGE)],
            ),
            Self::Hook => ("hook", Hook::ALL.map(|hook| (hook.name(), hook as u32)).into()),
            Self::Mode => {
                use Mode::{Audit, Enforce, Off};
                ("mode", [Enforce, Audit, Off].map(|mode| (mode.name(), mode as u32)).into())
            }
            Self::OwnPackets => (
                "own_packets",
                vec![
                    ("none", OwnPackets::None as u32),
                    ("with_socket", OwnPackets::WithSocket as u32),
                    ("passed", OwnPackets::Passed as u32),
                ],
            ),
            Self::Protocol => {
                ("protocol", vec![("none", 0), ("tcp", u32::from(TCP)), ("udp", u32::from(UDP))])
            }
            Self::Role => {
                let roles = (0..=u8::MAX).map_while(Role::from_u8);
                ("role", roles.map(|role| (role.name(), role as u32)).collect())
            }
            Self::SubjectKind => (
                "subject_kind",
                vec![
                    ("interface", SubjectKind::Interface as u32),
                    ("netns", SubjectKind::Netns as u32),
                    ("cgroup", SubjectKind::Cgroup as u32),
                ],
            ),
            Self::Verdict => {
                ("verdict", Verdict::COUNTED.map(|verdict| (verdict.name(), verdict as u32)).into())
            }
        }
    }
}

/// Gives the [`FIELDS`] of the maps in `btf`, the content of the section `.BTF`, the types of their meanings, and removes
/// fields without a meaning for users.
pub(crate) fn retype(btf: &[u8]) -> Result<Vec<u8>> {
    let mut types = Types::new(Btf::parse(btf)?)?;
    let mut missing: BTreeSet<_> =
        FIELDS.iter().flat_map(|&(of, fields, _)| fields.iter().map(move |&field| (of, field))).collect();
    for id in types.map_value_types()? {
        types.btf.retain_members(id, |of, field| !PADDING.contains(&field) && (of, field) != LIMITER);
        for member in types.btf.members(id) {
            let (of, field) = (types.btf.name(id), types.btf.string(member.name));
            let found = FIELDS.iter().find(|(name, fields, _)| *name == of && fields.contains(&field));
            let Some(&(_, _, meaning)) = found else {
                ensure!(
                    !types.is_bytes(member.type_id),
                    "{of}.{field} is an array of bytes: list it as Text or Bytes in map_fields.rs"
                );
                continue;
            };
            missing.retain(|&listed| listed != (of, field));
            let context = format!("{of}.{field}");
            types.set_meaning(member, meaning).context(context)?;
        }
    }
    ensure!(missing.is_empty(), "no map has these fields of map_fields.rs: {missing:?}");
    types.btf.to_bytes()
}

struct Types {
    btf: Btf,
    /// The type `char`.
    char_type: u32,
    /// Type of the indices of arrays.
    index_type: u32,
    /// Appended types of enums by their size.
    enums: BTreeMap<(Enum, u32), u32>,
}

impl Types {
    fn new(mut btf: Btf) -> Result<Self> {
        let array = btf.ids().find(|&id| btf.kind(id) == ARRAY).context("no array")?;
        let index_type = btf.extra(array, 1);
        let name = btf.add_string("char")?;
        // No encoding, like C's `char` where it is unsigned. bpftool also prints arrays of integers with BTF_INT_CHAR as
        // strings, but if the text has other characters than printable ASCII, it prints each one, and `"` as `"""`, which is
        // no JSON.
        let char_type = btf.add_type(name, INT, 0, 1, &[8])?;
        Ok(Self { btf, char_type, index_type, enums: BTreeMap::new() })
    }

    /// Returns the structs and unions in keys and values of the maps.
    fn map_value_types(&self) -> Result<BTreeSet<u32>> {
        let is_maps = |&id: &u32| self.btf.kind(id) == DATASEC && self.btf.name(id) == MAPS;
        let mut queue = vec![self.btf.ids().find(is_maps).context("no section .maps")?];
        let mut seen = BTreeSet::new();
        while let Some(id) = queue.pop() {
            if !seen.insert(id) {
                continue;
            }
            match self.btf.kind(id) {
                STRUCT | UNION | DATASEC => {
                    queue.extend(self.btf.members(id).iter().map(|member| member.type_id));
                }
                ARRAY => queue.push(self.btf.extra(id, 0)),
                PTR | VAR | TYPEDEF..=RESTRICT => queue.push(self.btf.size_or_type(id)),
                _ => {}
            }
        }
        seen.retain(|&id| matches!(self.btf.kind(id), STRUCT | UNION));
        Ok(seen)
    }

    /// Reports whether a type is an integer without sign, and returns its size.
    fn unsigned(&self, id: u32) -> Option<u32> {
        let encoding = self.btf.extra(id, 0) >> 24;
        (self.btf.kind(id) == INT && encoding == 0).then(|| self.btf.size_or_type(id))
    }

    fn is_bytes(&self, id: u32) -> bool {
        self.btf.kind(id) == ARRAY && self.unsigned(self.btf.extra(id, 0)) == Some(1)
    }

    fn set_meaning(&mut self, member: Member, meaning: Meaning) -> Result<()> {
        let id = member.type_id;
        let element = match meaning {
            Text | Bytes if !self.is_bytes(id) => bail!("is no array of bytes"),
            Bytes => return Ok(()),
            Text => self.char_type,
            Number(number) => {
                let element = if self.btf.kind(id) == ARRAY { self.btf.extra(id, 0) } else { id };
                let size =
                    self.unsigned(element).context("is neither an unsigned integer nor an array of them")?;
                self.enum_type(number, size)?
            }
        };
        let new = match self.btf.kind(id) {
            ARRAY => {
                let len = self.btf.extra(id, 2);
                self.btf.add_type(0, ARRAY, 0, 0, &[element, self.index_type, len])?
            }
            _ => element,
        };
        self.btf.set_type(member, new);
        Ok(())
    }

    /// Returns the type of an enum with this size. Linux 5.10 accepts enums of 1 to 8 bytes (`btf_enum_check_meta`,
    /// `btf_enum_check_member` in kernel/bpf/btf.c).
    fn enum_type(&mut self, number: Enum, size: u32) -> Result<u32> {
        if let Some(&id) = self.enums.get(&(number, size)) {
            return Ok(id);
        }
        let (name, variants) = number.variants();
        let mut extra = Vec::new();
        for &(variant, value) in &variants {
            extra.extend([self.btf.add_string(variant)?, value]);
        }
        let name = self.btf.add_string(name)?;
        let id = self.btf.add_type(name, ENUM, variants.len(), size, &extra)?;
        self.enums.insert((number, size), id);
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds the BTF of an object that has a map with all `fields`: text and addresses as `[u8; 16]`, numbers as `u8`.
    fn btf<'a>(fields: impl Iterator<Item = (&'a str, Vec<(&'a str, Meaning)>)>) -> Vec<u8> {
        let mut btf = Btf::empty();
        let string = |btf: &mut Btf, name: &str| btf.add_string(name).unwrap();
        let name = string(&mut btf, "u8");
        let byte = btf.add_type(name, INT, 0, 1, &[8]).unwrap();
        let array = btf.add_type(0, ARRAY, 0, 0, &[byte, byte, 16]).unwrap();
        let mut values = Vec::new();
        for (of, fields) in fields {
            let mut members = Vec::new();
            for &(field, meaning) in &fields {
                let type_id = if matches!(meaning, Number(_)) { byte } else { array };
                members.extend([string(&mut btf, field), type_id, 0]);
            }
            let name = string(&mut btf, of);
            let value = btf.add_type(name, STRUCT, fields.len(), 16, &members).unwrap();
            let pointer = btf.add_type(0, PTR, 0, value, &[]).unwrap();
            values.extend([string(&mut btf, "value"), pointer, 0]);
        }
        let map = btf.add_type(0, STRUCT, values.len() / 3, 8, &values).unwrap();
        let var = btf.add_type(0, VAR, 0, map, &[1]).unwrap();
        let name = string(&mut btf, MAPS);
        btf.add_type(name, DATASEC, 1, 8, &[var, 0, 8]).unwrap();
        btf.to_bytes().unwrap()
    }

    fn all() -> impl Iterator<Item = (&'static str, Vec<(&'static str, Meaning)>)> {
        let mut structs: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for &(of, fields, meaning) in FIELDS {
            structs.entry(of).or_default().extend(fields.iter().map(|&field| (field, meaning)));
        }
        structs.into_iter()
    }

    #[test]
    fn fields_get_types_by_meaning() {
        let btf = Btf::parse(&retype(&btf(all())).unwrap()).unwrap();
        for (of, fields) in all() {
            let id = btf.ids().find(|&id| btf.name(id) == of && btf.kind(id) == STRUCT).unwrap();
            for (member, (field, meaning)) in btf.members(id).into_iter().zip(fields) {
                let id = member.type_id;
                assert_eq!(btf.string(member.name), field);
                match meaning {
                    Number(number) => {
                        let (name, variants) = number.variants();
                        assert_eq!((btf.kind(id), btf.name(id), btf.size_or_type(id)), (ENUM, name, 1));
                        for (index, (name, value)) in variants.into_iter().enumerate() {
                            assert_eq!(btf.string(btf.extra(id, index * 2)), name);
                            assert_eq!(btf.extra(id, index * 2 + 1), value);
                        }
                    }
                    Text | Bytes => {
                        let element = if meaning == Text { "char" } else { "u8" };
                        assert_eq!((btf.kind(id), btf.extra(id, 2)), (ARRAY, 16), "{of}.{field}");
                        assert_eq!(btf.name(btf.extra(id, 0)), element, "{of}.{field}");
                    }
                }
            }
        }
    }

    #[test]
    fn names_of_variants_are_identifiers() {
        for (_, fields) in all() {
            for (_, meaning) in fields {
                let Number(number) = meaning else { continue };
                let (name, variants) = number.variants();
                for name in variants.iter().map(|(name, _)| *name).chain([name]) {
                    assert!(name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'), "{name}");
                }
            }
        }
    }

    #[test]
    fn unlisted_and_missing_fields_fail_the_build() {
        let unlisted = btf(all().chain([("PodRecord", vec![("image", Text)])]));
        let error = retype(&unlisted).unwrap_err().to_string();
        assert!(error.starts_with("PodRecord.image is an array of bytes"), "{error}");

        let missing = btf(all().filter(|(of, _)| *of != "ProviderRecord"));
        let error = retype(&missing).unwrap_err().to_string();
        assert!(error.contains(r#"("ProviderRecord", "configured")"#), "{error}");

        let wrong = btf(all().map(|(of, fields)| {
            let number = |(field, _)| (field, Number(Enum::Hook));
            (of, if of == "Endpoint" { fields.into_iter().map(number).collect() } else { fields })
        }));
        let error = format!("{:#}", retype(&wrong).unwrap_err());
        assert_eq!(error, "Endpoint.name: is no array of bytes");
    }
}
