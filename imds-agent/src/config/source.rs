//! Locations in a configuration file, and the errors found there.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use toml::Spanned;

use super::ConfigError;

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

    pub(super) fn error(self, span: Range<usize>, message: String) -> ConfigError {
        self.location(span).error(message)
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

/// Checks that a name under `key` has only letters, digits, `-`, `_` and `.`, and at most `most` of them.
pub(super) fn check_name(
    name: &Spanned<String>,
    key: &str,
    most: usize,
    source: SourceFile<'_>,
) -> Result<(), ConfigError> {
    let text = name.get_ref();
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !text.is_empty() && text.len() <= most && text.bytes().all(is_plain) {
        return Ok(());
    }
    let message = format!("{key}: {text:?} is not 1 to {most} letters, digits, '-', '_' or '.'");
    Err(source.error(name.span(), message))
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

/// Errors found so far in a file.
#[derive(Default)]
pub(super) struct Diagnostics {
    found: Vec<ConfigError>,
}

impl Diagnostics {
    pub(super) fn push(&mut self, error: ConfigError) {
        self.found.push(error);
    }

    /// Returns the parsed part of the file, or records its error and returns `None`.
    pub(super) fn ok<T>(&mut self, part: Result<T, ConfigError>) -> Option<T> {
        part.map_err(|error| self.push(error)).ok()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    pub(super) fn count(&self) -> usize {
        self.found.len()
    }

    /// Returns the errors, ordered by line and column.
    pub(super) fn into_vec(mut self) -> Vec<ConfigError> {
        self.found.sort_by_key(ConfigError::position);
        self.found
    }
}
