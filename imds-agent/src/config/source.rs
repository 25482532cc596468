//! Places in a configuration file, and what is wrong there.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use toml::Spanned;

use super::ConfigError;

/// A file that is being parsed.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) text: &'a str,
    pub(super) path: &'a Path,
}

impl Source<'_> {
    pub(super) fn place(self, span: Range<usize>) -> Place {
        let before = self.text.get(..span.start).unwrap_or_default();
        let line = before.rsplit('\n').next().unwrap_or_default();
        Place {
            path: self.path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: line.chars().count() + 1,
        }
    }

    pub(super) fn error(self, span: Range<usize>, message: String) -> ConfigError {
        self.place(span).error(message)
    }
}

/// Refuses a name under `key` that has other than plain characters, or more than `most` of them.
pub(super) fn check_name(
    name: &Spanned<String>,
    key: &str,
    most: usize,
    source: Source<'_>,
) -> Result<(), ConfigError> {
    let text = name.get_ref();
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !text.is_empty() && text.len() <= most && text.bytes().all(is_plain) {
        return Ok(());
    }
    let message = format!("{key}: {text:?} is not 1 to {most} letters, digits, '-', '_' or '.'");
    Err(source.error(name.span(), message))
}

/// Where in a file something is said.
#[derive(Clone, Debug)]
pub(super) struct Place {
    path: PathBuf,
    line: usize,
    column: usize,
}

impl Place {
    pub(super) fn error(&self, message: String) -> ConfigError {
        let Self { path, line, column } = self.clone();
        ConfigError::Parse { path, line, column, message }
    }
}

/// What is wrong with a file, as it is found.
#[derive(Default)]
pub(super) struct Mistakes {
    found: Vec<ConfigError>,
}

impl Mistakes {
    pub(super) fn note(&mut self, mistake: ConfigError) {
        self.found.push(mistake);
    }

    /// What could be made of a part of the file; its mistake is noted.
    pub(super) fn take<T>(&mut self, part: Result<T, ConfigError>) -> Option<T> {
        part.map_err(|mistake| self.note(mistake)).ok()
    }

    pub(super) fn are_none(&self) -> bool {
        self.found.is_empty()
    }

    pub(super) fn count(&self) -> usize {
        self.found.len()
    }

    /// All of them by line, if there are any.
    pub(super) fn into_vec(mut self) -> Vec<ConfigError> {
        self.found.sort_by_key(ConfigError::position);
        self.found
    }
}
