//! BTF (`Documentation/bpf/btf.rst`) of the object: reads it, and appends types and strings.

use anyhow::{Context as _, Result, bail, ensure};

/// `BTF_MAGIC`, as a little-endian object contains it.
const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
/// Size of `struct btf_header`.
const HEADER_LEN: usize = 24;
/// Number of words of `struct btf_type`.
const TYPE_WORDS: usize = 3;
/// Number of words of `struct btf_member`.
const MEMBER_WORDS: usize = 3;

pub(crate) const INT: u32 = 1;
pub(crate) const PTR: u32 = 2;
pub(crate) const ARRAY: u32 = 3;
pub(crate) const STRUCT: u32 = 4;
pub(crate) const UNION: u32 = 5;
pub(crate) const ENUM: u32 = 6;
pub(crate) const TYPEDEF: u32 = 8;
pub(crate) const RESTRICT: u32 = 11;
const FUNC_PROTO: u32 = 13;
pub(crate) const VAR: u32 = 14;
pub(crate) const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// Type section and strings of an object. Ids of types and offsets of strings stay valid, because types and strings are only
/// appended.
#[derive(Debug)]
pub(crate) struct Btf {
    /// The type section, which consists of 32-bit words.
    words: Vec<u32>,
    /// Index of the first word of each type. The ids of types start with 1.
    starts: Vec<usize>,
    strings: Vec<u8>,
}

/// Member of a struct or union.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    /// Offset of the name.
    pub name: u32,
    /// Type of the member.
    pub type_id: u32,
    /// Index of the word that contains the type.
    type_word: usize,
}

impl Btf {
    /// Returns BTF without types.
    #[cfg(test)]
    pub(crate) fn empty() -> Self {
        Self { words: Vec::new(), starts: Vec::new(), strings: vec![0] }
    }

    /// Parses the content of the section `.BTF`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let (header, content) = bytes.split_at_checked(HEADER_LEN).context("the header is truncated")?;
        let [magic_0, magic_1, version, ..] = *header else { bail!("the header is truncated") };
        ensure!(u16::from_le_bytes([magic_0, magic_1]) == MAGIC && version == VERSION, "unknown version");
        let [_, header_len, type_off, type_len, str_off, str_len] = *words(header) else {
            bail!("the header is truncated")
        };
        ensure!(usize::try_from(header_len)? == HEADER_LEN, "the header has {header_len} bytes");
        let part = |offset: u32, len: u32| {
            let (offset, len) = (usize::try_from(offset)?, usize::try_from(len)?);
            let end = offset.checked_add(len).context("a section is too long")?;
            content.get(offset..end).context("a section is truncated")
        };
        let mut btf = Self {
            words: words(part(type_off, type_len)?),
            starts: Vec::new(),
            strings: part(str_off, str_len)?.to_vec(),
        };
        let mut at = 0;
        while at < btf.words.len() {
            btf.starts.push(at);
            at += TYPE_WORDS + btf.extra_words(btf.last_id())?;
        }
        ensure!(at == btf.words.len(), "the last type is truncated");
        Ok(btf)
    }

    /// Returns the content of the section `.BTF`.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let (type_len, str_len) = (u32::try_from(self.words.len() * 4)?, u32::try_from(self.strings.len())?);
        let start = u32::from(MAGIC) | u32::from(VERSION) << 16;
        let header = [start, u32::try_from(HEADER_LEN)?, 0, type_len, type_len, str_len];
        let words = header.iter().chain(&self.words).flat_map(|word| word.to_le_bytes());
        Ok(words.chain(self.strings.iter().copied()).collect())
    }

    /// Returns the ids of all types.
    pub(crate) fn ids(&self) -> impl Iterator<Item = u32> + use<> {
        1..=self.last_id()
    }

    /// Returns the kind of a type; 0 for `void`.
    pub(crate) fn kind(&self, id: u32) -> u32 {
        self.word(id, 1) >> 24 & 0x1f
    }

    /// Returns the size of a type that has one, or the id of the type that it refers to.
    pub(crate) fn size_or_type(&self, id: u32) -> u32 {
        self.word(id, 2)
    }

    /// Returns the word with this index behind the three words that all types have; 0 if the type has no such word.
    pub(crate) fn extra(&self, id: u32, index: usize) -> u32 {
        self.word(id, TYPE_WORDS + index)
    }

    /// Returns the name of a type.
    pub(crate) fn name(&self, id: u32) -> &str {
        self.string(self.word(id, 0))
    }

    /// Returns the string at this offset; an empty string if there is none.
    pub(crate) fn string(&self, offset: u32) -> &str {
        let bytes = usize::try_from(offset).ok().and_then(|offset| self.strings.get(offset..));
        let bytes = bytes.and_then(|bytes| bytes.split(|&byte| byte == 0).next());
        bytes.and_then(|bytes| str::from_utf8(bytes).ok()).unwrap_or_default()
    }

    /// Returns the members of a struct or union, or the variables of a data section; none for other types.
    pub(crate) fn members(&self, id: u32) -> Vec<Member> {
        let (name_at, type_at) = match self.kind(id) {
            STRUCT | UNION => (0, 1),
            DATASEC => (0, 0),
            _ => return Vec::new(),
        };
        let member = |index: usize| {
            let at = index * MEMBER_WORDS;
            Some(Member {
                name: self.extra(id, at + name_at),
                type_id: self.extra(id, at + type_at),
                type_word: self.start(id)? + TYPE_WORDS + at + type_at,
            })
        };
        (0..self.len(id)).filter_map(member).collect()
    }

    /// Changes the type of a member.
    pub(crate) fn set_type(&mut self, member: Member, type_id: u32) {
        if let Some(word) = self.words.get_mut(member.type_word) {
            *word = type_id;
        }
    }

    /// Removes the members of a struct that `is_kept`, which takes the names of struct and member, does not keep. The offsets of
    /// the others and the size of the struct stay.
    pub(crate) fn retain_members(&mut self, id: u32, is_kept: impl Fn(&str, &str) -> bool) {
        for (index, member) in self.members(id).into_iter().enumerate().rev() {
            if !is_kept(self.name(id), self.string(member.name)) {
                self.remove_member(id, index);
            }
        }
    }

    fn remove_member(&mut self, id: u32, index: usize) {
        let (Some(start), true) = (self.start(id), self.kind(id) == STRUCT && index < self.len(id)) else {
            return;
        };
        let at = start + TYPE_WORDS + index * MEMBER_WORDS;
        self.words.drain(at..at + MEMBER_WORDS);
        // The lower 16 bits of this word are the number of members.
        if let Some(info) = self.words.get_mut(start + 1) {
            *info -= 1;
        }
        for later in self.starts.iter_mut().filter(|later| **later > start) {
            *later -= MEMBER_WORDS;
        }
    }

    /// Appends a string, and returns its offset.
    pub(crate) fn add_string(&mut self, string: &str) -> Result<u32> {
        let offset = u32::try_from(self.strings.len())?;
        self.strings.extend_from_slice(string.as_bytes());
        self.strings.push(0);
        Ok(offset)
    }

    /// Appends a type, and returns its id. `extra` follows the three words that all types have.
    pub(crate) fn add_type(
        &mut self,
        name: u32,
        kind: u32,
        len: usize,
        size_or_type: u32,
        extra: &[u32],
    ) -> Result<u32> {
        self.starts.push(self.words.len());
        self.words.extend([name, kind << 24 | u32::from(u16::try_from(len)?), size_or_type]);
        self.words.extend(extra);
        Ok(self.last_id())
    }

    #[expect(clippy::cast_possible_truncation, reason = "the type section has less than 4 GiB")]
    fn last_id(&self) -> u32 {
        self.starts.len() as u32
    }

    fn start(&self, id: u32) -> Option<usize> {
        self.starts.get(usize::try_from(id).ok()?.checked_sub(1)?).copied()
    }

    fn word(&self, id: u32, index: usize) -> u32 {
        self.start(id).and_then(|start| self.words.get(start + index)).copied().unwrap_or(0)
    }

    fn len(&self, id: u32) -> usize {
        (self.word(id, 1) & 0xffff) as usize
    }

    /// Returns the number of words behind the three words that all types have.
    fn extra_words(&self, id: u32) -> Result<usize> {
        let len = self.len(id);
        Ok(match self.kind(id) {
            INT | VAR | DECL_TAG => 1,
            ARRAY => 3,
            STRUCT | UNION | DATASEC | ENUM64 => 3 * len,
            ENUM | FUNC_PROTO => 2 * len,
            PTR..=TYPE_TAG => 0,
            kind => bail!("unknown kind {kind} of type {id}"),
        })
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Btf {
        let mut btf = Btf::empty();
        let names = ["u8", "Record", "name"].map(|name| btf.add_string(name).unwrap());
        let byte = btf.add_type(names[0], INT, 0, 1, &[8]).unwrap();
        let array = btf.add_type(0, ARRAY, 0, 0, &[byte, byte, 16]).unwrap();
        btf.add_type(names[1], STRUCT, 1, 16, &[names[2], array, 0]).unwrap();
        btf
    }

    #[test]
    fn written_btf_is_read_again() {
        let bytes = example().to_bytes().unwrap();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.to_bytes().unwrap(), bytes);
        assert_eq!(btf.ids().map(|id| btf.kind(id)).collect::<Vec<_>>(), [INT, ARRAY, STRUCT]);
        assert_eq!((btf.name(1), btf.size_or_type(1), btf.extra(1, 0)), ("u8", 1, 8));
        assert_eq!((btf.extra(2, 0), btf.extra(2, 2)), (1, 16));
        let [member] = *btf.members(3) else { panic!("one member") };
        assert_eq!((btf.name(3), btf.string(member.name), member.type_id), ("Record", "name", 2));
    }

    #[test]
    fn member_gets_another_type() {
        let mut btf = example();
        let [member] = *btf.members(3) else { panic!("one member") };
        btf.set_type(member, 1);
        assert_eq!(btf.members(3)[0].type_id, 1);
    }

    #[test]
    fn removed_member_leaves_others_in_place() {
        let mut btf = example();
        let names = ["Pair", "first", "second"].map(|name| btf.add_string(name).unwrap());
        let pair = btf.add_type(names[0], STRUCT, 2, 16, &[names[1], 1, 0, names[2], 1, 64]).unwrap();
        let later = btf.add_type(names[1], INT, 0, 1, &[8]).unwrap();
        btf.remove_member(pair, 0);
        btf.remove_member(pair, 1);
        btf.remove_member(later, 0);
        let btf = Btf::parse(&btf.to_bytes().unwrap()).unwrap();
        let [member] = *btf.members(pair) else { panic!("one member") };
        assert_eq!((btf.string(member.name), btf.extra(pair, 2), btf.size_or_type(pair)), ("second", 64, 16));
        assert_eq!((btf.name(later), btf.extra(later, 0)), ("first", 8));
    }

    #[test]
    fn damaged_btf_is_rejected() {
        let bytes = example().to_bytes().unwrap();
        for len in 0..bytes.len() {
            assert!(Btf::parse(&bytes[..len]).is_err(), "{len} bytes");
        }
        let mut other = bytes.clone();
        other[2] = 2;
        assert!(Btf::parse(&other).is_err());
        let mut other = bytes;
        other[HEADER_LEN + 7] = 31;
        assert!(Btf::parse(&other).is_err());
    }
}
