//! The configuration file: TOML to a validated [`Config`].

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use globset::{Glob, GlobSet, GlobSetBuilder};
use imds_ebpf_common::{Hook, Mode};
use serde::Deserialize;
use thiserror::Error;

/// What the operator wants. The default is what runs without a file: enforce, interfaces as classified.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// What happens to a packet from a pod to a guarded endpoint.
    pub mode: Mode,
    /// Where packets and calls are judged.
    pub hooks: Hooks,
    /// Which interfaces are pods'.
    pub interfaces: Interfaces,
}

/// The hooks that are on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hooks {
    bits: u32,
}

impl Hooks {
    /// The hooks of [`Policy::hooks`](imds_ebpf_common::Policy::hooks).
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self { bits }
    }

    /// As [`Policy::hooks`](imds_ebpf_common::Policy::hooks) has them.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.bits
    }

    /// Whether this one is on.
    #[must_use]
    pub const fn has(self, hook: Hook) -> bool {
        self.bits & hook.bit() != 0
    }
}

impl Default for Hooks {
    /// All.
    fn default() -> Self {
        HooksTable::default().into()
    }
}

/// Exceptions from the classification of interfaces, by name.
#[derive(Clone, Debug, Default)]
pub struct Interfaces {
    include: Globs,
    exclude: Globs,
}

impl Interfaces {
    /// Whether the operator wants this interface guarded, whatever it is.
    #[must_use]
    pub fn includes(&self, name: &str) -> bool {
        self.include.set.is_match(name)
    }

    /// Whether the operator wants this interface left alone.
    #[must_use]
    pub fn excludes(&self, name: &str) -> bool {
        self.exclude.set.is_match(name)
    }
}

/// Why a configuration can't be used. Nothing of it is in force then.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not TOML, or has a key or value that is not known.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line of the mistake, from 1.
        line: usize,
        /// Column of the mistake in characters, from 1.
        column: usize,
        /// What is wrong, on one line.
        message: String,
    },
    /// Nothing would be guarded.
    #[error("{}: every one of the hooks is off, so that nothing would be guarded; use mode = \"off\" for that", path.display())]
    NoHook {
        /// The file.
        path: PathBuf,
    },
    /// A glob is in both lists.
    #[error("{}: interfaces.include and interfaces.exclude both have {glob:?}: it can only be in one", path.display())]
    Contradiction {
        /// The file.
        path: PathBuf,
        /// The glob.
        glob: String,
    },
}

impl Config {
    /// Reads and validates `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Validates `text`, which was read from `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let file: File = toml::from_str(text).map_err(|error| parse_error(&error, text, path))?;
        let InterfacesTable { include, exclude } = file.interfaces;
        if let Some(glob) = include.patterns.iter().find(|glob| exclude.patterns.contains(glob)) {
            return Err(ConfigError::Contradiction { path: path.to_owned(), glob: glob.clone() });
        }
        let hooks = Hooks::from(file.hooks);
        if hooks.bits() == 0 {
            return Err(ConfigError::NoHook { path: path.to_owned() });
        }
        Ok(Self { mode: file.mode.into(), hooks, interfaces: Interfaces { include, exclude } })
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    mode: ModeName,
    #[serde(default)]
    hooks: HooksTable,
    #[serde(default)]
    interfaces: InterfacesTable,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct HooksTable {
    pod_edge: bool,
    node_edge: bool,
    socket: bool,
}

impl Default for HooksTable {
    fn default() -> Self {
        Self { pod_edge: true, node_edge: true, socket: true }
    }
}

impl From<HooksTable> for Hooks {
    fn from(HooksTable { pod_edge, node_edge, socket }: HooksTable) -> Self {
        let switches = [(Hook::PodEdge, pod_edge), (Hook::NodeEdge, node_edge), (Hook::Socket, socket)];
        Self::from_bits(switches.iter().filter(|(_, on)| *on).map(|(hook, _)| hook.bit()).sum())
    }
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ModeName {
    #[default]
    Enforce,
    Audit,
    Off,
}

impl From<ModeName> for Mode {
    fn from(mode: ModeName) -> Self {
        match mode {
            ModeName::Enforce => Self::Enforce,
            ModeName::Audit => Self::Audit,
            ModeName::Off => Self::Off,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct InterfacesTable {
    #[serde(default)]
    include: Globs,
    #[serde(default)]
    exclude: Globs,
}

/// Globs as written, and compiled.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "Vec<String>")]
struct Globs {
    patterns: Vec<String>,
    set: GlobSet,
}

impl TryFrom<Vec<String>> for Globs {
    type Error = globset::Error;

    fn try_from(patterns: Vec<String>) -> Result<Self, Self::Error> {
        let mut set = GlobSetBuilder::new();
        for pattern in &patterns {
            set.add(Glob::new(pattern)?);
        }
        Ok(Self { patterns, set: set.build()? })
    }
}

fn parse_error(error: &toml::de::Error, text: &str, path: &Path) -> ConfigError {
    let span = error.span().unwrap_or_default();
    let before = text.get(..span.start).unwrap_or_default();
    let there = text.get(span).unwrap_or_default();
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let message = error.message().lines().collect::<Vec<_>>().join("; ");
    ConfigError::Parse {
        path: path.to_owned(),
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
        message: if there.is_empty() || there.contains('\n') || message.contains(there) {
            message
        } else {
            format!("{message}: {there}")
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("imds.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_enforces() {
        let config = parse("").unwrap();
        assert_eq!(config.mode, Mode::Enforce);
        assert!(!config.interfaces.includes("veth0") && !config.interfaces.excludes("veth0"));
    }

    #[test]
    fn mode_and_globs() {
        let config =
            parse("mode = 'audit'\n[interfaces]\ninclude = ['tun*']\nexclude = ['veth[0-3]']").unwrap();
        assert_eq!(config.mode, Mode::Audit);
        assert!(config.interfaces.includes("tun7") && !config.interfaces.includes("xtun7"));
        assert!(config.interfaces.excludes("veth3") && !config.interfaces.excludes("veth4"));
    }

    #[test]
    fn hooks_are_on_unless_switched_off() {
        let on = |text: &str| Hook::ALL.map(|hook| parse(text).unwrap().hooks.has(hook));
        assert_eq!(on(""), [true; 3]);
        assert_eq!(on("[hooks]\nnode_edge = false"), [true, false, true]);
        assert_eq!(on("[hooks]\npod_edge = false\nsocket = false"), [false, true, false]);
        let all_off = "[hooks]\npod_edge = false\nsocket = false\nnode_edge = false";
        assert!(parse(all_off).unwrap_err().contains("hooks"));
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let error = parse("mode = 'audit'\n\n[interfaces]\n  inlcude = []").unwrap_err();
        assert!(error.starts_with("imds.toml:4:3: ") && error.contains("inlcude"), "{error}");
        let error = parse("mode = 'of'").unwrap_err();
        assert!(error.starts_with("imds.toml:1:8: ") && error.contains("`of`"), "{error}");
        let error = parse("[interfaces]\nexclude = ['veth[']").unwrap_err();
        assert!(error.starts_with("imds.toml:2:11: ") && error.contains("veth["), "{error}");
        let error = parse("[interfaces]\ninclude = ['a*', 'b']\nexclude = ['b']").unwrap_err();
        assert!(error.contains("\"b\""), "{error}");
    }

    proptest! {
        #[test]
        fn no_text_panics_and_every_error_is_one_line(text in "(?s).{0,200}") {
            if let Err(error) = parse(&text) {
                prop_assert!(!error.contains('\n'), "{error}");
            }
        }
    }
}
