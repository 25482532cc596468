//! Locations in a configuration file, and the errors found there.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use toml::Spanned;

use super::{ConfigError, ConfigErrors};

/// Text and path of the file that is being parsed.
#[derive(Clone, Copy)]
pub(super) struct SourceFile<'a> {
    pub(super) text: &'a str,
    pub(super) path: &'a Path,
}

impl SourceFile<'_> {
    pub(super) fn location(self, span: Range<usize>) -> Location {
        let before = self.text.get(..span.start).unwrap_or_default();
        let line = before.rsplit('\n').next().unwrap_or_default();
        Location {
            path: self.path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: line.chars().count() + 1,
        }
    }

    pub(super) fn error(self, span: Range<usize>, message: impl Into<String>) -> ConfigError {
        self.location(span).error(message.into())
    }

    /// Returns an error message if the string at `span` is in double quotes and has an escape such as `\x2d`, which TOML
    /// decodes. The names of systemd's cgroups contain such escapes literally.
    pub(super) fn check_systemd_escapes(self, span: Range<usize>) -> Result<(), String> {
        let Some(inner) = self.text.get(span).and_then(|text| text.strip_prefix('"')?.strip_suffix('"'))
        else {
            return Ok(());
        };
        // An escaped backslash is one character of the name.
        let mut escapes = inner.split(r"\\").filter_map(|part| part.split_once(r"\x"));
        let Some((_, after)) = escapes.next() else { return Ok(()) };
        let escape: String = after.chars().take(2).collect();
        Err(format!(
            r"TOML reads \x{escape} in double quotes as another character; in single quotes it is part of the name: '{inner}'"
        ))
    }
}

/// Location in a configuration file.
#[derive(Clone, Debug)]
pub(super) struct Location {
    path: PathBuf,
    line: usize,
    column: usize,
}

impl Location {
    pub(super) fn error(&self, message: String) -> ConfigError {
        let Self { path, line, column } = self.clone();
        ConfigError::Parse { path, line, column, message }
    }
}

/// A file, and the errors found in it so far.
pub(super) struct Diagnostics<'a> {
    pub(super) source: SourceFile<'a>,
    found: Vec<ConfigError>,
}

impl<'a> Diagnostics<'a> {
    pub(super) fn new(text: &'a str, path: &'a Path) -> Self {
        Self { source: SourceFile { text, path }, found: Vec::new() }
    }

    /// Records an error of the part at `span`.
    pub(super) fn error(&mut self, span: Range<usize>, message: impl Into<String>) {
        self.found.push(self.source.error(span, message));
    }

    /// Returns the parsed part of the file at `span`, or records its error and returns `None`.
    pub(super) fn ok<T>(&mut self, span: Range<usize>, part: Result<T, String>) -> Option<T> {
        part.map_err(|message| self.error(span, message)).ok()
    }

    /// Returns a name that has only letters, digits, `-`, `_` and `.`, and at most `most` of them. Records an error of `key`
    /// for another name.
    pub(super) fn plain_name(&mut self, name: &Spanned<String>, key: &str, most: usize) -> Option<String> {
        let text = name.get_ref();
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !text.is_empty() && text.len() <= most && text.bytes().all(is_plain) {
            return Some(text.clone());
        }
        let message = format!("{key}: {text:?} is not 1 to {most} letters, digits, '-', '_' or '.'");
        self.error(name.span(), message);
        None
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    pub(super) fn count(&self) -> usize {
        self.found.len()
    }

    /// Fails if an error was recorded.
    pub(super) fn finish(self) -> Result<(), ConfigErrors> {
        ConfigErrors::check(self.found)
    }
}
