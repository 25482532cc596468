//! Keys of the file whose value is true, false or a word.

use std::fmt;

use serde::de::{Error, Unexpected, Visitor};

/// Reads a value of such a key.
pub(super) struct Switch<'w, T> {
    pub(super) off: T,
    pub(super) on: T,
    pub(super) words: &'w [(&'static str, T)],
    /// Valid values, as an error names them.
    pub(super) expected: &'static str,
}

impl<T: Copy> Visitor<'_> for Switch<'_, T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_bool<E>(self, is_on: bool) -> Result<T, E> {
        Ok(if is_on { self.on } else { self.off })
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        let known = self.words.iter().find(|(word, _)| *word == text);
        known.map(|(_, value)| *value).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
    }
}
