//! The configuration file: TOML to a validated [`Config`].

mod endpoints;
mod exempt;
mod hooks;
mod kubernetes;
mod names;
mod selector;

use std::{
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
};

use globset::{Glob, GlobSet, GlobSetBuilder};
use imds_ebpf_common::{Answer, Mode};
use serde::Deserialize;
use thiserror::Error;
use toml::Spanned;

use self::{endpoints::EndpointTable, exempt::ExemptTable, hooks::HooksTable, kubernetes::KubernetesTable};
pub use self::{
    endpoints::Endpoints,
    exempt::{Exempt, Exemptions, NameGlob, Pods, Scope, Subject},
    hooks::Hooks,
    kubernetes::{Access, Enabled, Kubernetes, Surroundings},
    selector::Selector,
};

/// What the operator wants. The default is what runs without a file: enforce, the endpoints of the provider whose machine
/// this is, interfaces as classified.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// What happens to a packet from a pod to a guarded endpoint.
    pub mode: Mode,
    /// What its sender is told where it is denied.
    pub answer: Answer,
    /// Where packets and calls are judged.
    pub hooks: Hooks,
    /// What is guarded.
    pub endpoints: Endpoints,
    /// Which interfaces are pods'.
    pub interfaces: Interfaces,
    /// Who is exempt.
    pub exempt: Exemptions,
    /// How pods are known.
    pub kubernetes: Kubernetes,
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
        let source = Source { text, path };
        let mode = file.mode.into();
        let endpoints = Endpoints::parse(file.provider.as_ref(), &file.extras, &file.endpoint, source)?;
        if endpoints.are_none() && mode != Mode::Off {
            let span = file.provider.map(|provider| provider.span()).unwrap_or_default();
            let message =
                "provider: \"none\" and no [[endpoint]] would guard nothing; say mode = \"off\" for that";
            return Err(source.error(span, message.to_owned()));
        }
        let hooks = Hooks::from(file.hooks);
        if hooks.bits() == 0 {
            return Err(ConfigError::NoHook { path: path.to_owned() });
        }
        let kubernetes = Kubernetes::parse(&file.kubernetes, source)?;
        let exempt = Exemptions::parse(&file.exempt, kubernetes.enabled == Enabled::No, source)?;
        let interfaces = Interfaces { include, exclude };
        Ok(Self { mode, answer: file.answer.into(), hooks, endpoints, interfaces, exempt, kubernetes })
    }
}

/// A file that is being parsed.
#[derive(Clone, Copy)]
struct Source<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Source<'_> {
    fn place(self, span: Range<usize>) -> Place {
        let before = self.text.get(..span.start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Place {
            path: self.path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }

    fn error(self, span: Range<usize>, message: String) -> ConfigError {
        self.place(span).error(message)
    }
}

/// Where in a file something is said.
#[derive(Clone, Debug)]
struct Place {
    path: PathBuf,
    line: usize,
    column: usize,
}

impl Place {
    fn error(&self, message: String) -> ConfigError {
        let Self { path, line, column } = self.clone();
        ConfigError::Parse { path, line, column, message }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    mode: ModeName,
    #[serde(default)]
    answer: AnswerName,
    provider: Option<Spanned<String>>,
    #[serde(default)]
    extras: Vec<Spanned<String>>,
    #[serde(default)]
    endpoint: Vec<EndpointTable>,
    #[serde(default)]
    hooks: HooksTable,
    #[serde(default)]
    interfaces: InterfacesTable,
    #[serde(default)]
    exempt: Vec<ExemptTable>,
    #[serde(default)]
    kubernetes: KubernetesTable,
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

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum AnswerName {
    #[default]
    Drop,
    Reject,
}

impl From<AnswerName> for Answer {
    fn from(answer: AnswerName) -> Self {
        match answer {
            AnswerName::Drop => Self::Drop,
            AnswerName::Reject => Self::Reject,
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
    let there = text.get(span.clone()).unwrap_or_default();
    let message = error.message().lines().collect::<Vec<_>>().join("; ");
    let message = if there.is_empty() || there.contains('\n') || message.contains(there) {
        message
    } else {
        format!("{message}: {there}")
    };
    Source { text, path }.error(span, message)
}

#[cfg(test)]
mod tests {
    use imds_ebpf_common::Hook;
    use proptest::prelude::*;

    use super::*;
    use crate::{endpoints::Guarded, provider::Dmi};

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("imds.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_enforces() {
        let config = parse("").unwrap();
        assert_eq!((config.mode, config.answer), (Mode::Enforce, Answer::Drop));
        assert!(!config.interfaces.includes("veth0") && !config.interfaces.excludes("veth0"));
    }

    #[test]
    fn mode_and_globs() {
        let config = parse(
            "mode = 'audit'\nanswer = 'reject'\n[interfaces]\ninclude = ['tun*']\nexclude = ['veth[0-3]']",
        )
        .unwrap();
        assert_eq!((config.mode, config.answer), (Mode::Audit, Answer::Reject));
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

    fn resolve(text: &str, vendor: &str) -> Result<Guarded, String> {
        let dmi = Dmi { sys_vendor: vendor.to_owned(), ..Dmi::default() };
        let config = parse(text)?;
        config.endpoints.resolve(&dmi).map_err(|error| error.to_string())
    }

    #[test]
    fn endpoints_are_the_providers_and_the_operators() {
        let guarded = resolve("", "").unwrap();
        assert_eq!(
            (guarded.configured(), guarded.provider(), guarded.endpoints().len()),
            ("auto", "generic", 1)
        );
        let guarded = resolve("", "Amazon EC2").unwrap();
        assert_eq!((guarded.configured(), guarded.provider(), guarded.endpoints().len()), ("auto", "aws", 2));
        let text = "provider = 'azure'\nextras = ['ecs']\n[[endpoint]]\nname = 'vault'\naddress = '::ffff:10.0.0.9'\n\
                    keep = ['tcp/443', 'udp/443']";
        let guarded = resolve(text, "Amazon EC2").unwrap();
        assert_eq!((guarded.configured(), guarded.provider()), ("azure", "azure"));
        let names: Vec<_> = guarded.endpoints().iter().map(|endpoint| endpoint.name.as_str()).collect();
        assert_eq!(names, ["imds", "wireserver", "ecs", "vault"]);
        let vault = &guarded.endpoints()[3];
        assert_eq!(vault.address.to_string(), "10.0.0.9");
        assert_eq!(vault.keep.iter().map(ToString::to_string).collect::<Vec<_>>(), ["tcp/443", "udp/443"]);
        assert!(resolve("provider = 'none'\nmode = 'off'", "").unwrap().endpoints().is_empty());
    }

    #[test]
    fn endpoints_that_make_no_sense_are_named() {
        let one =
            |address: &str, rest: &str| format!("\n[[endpoint]]\nname = 'a'\naddress = '{address}'\n{rest}");
        let own = |n| format!("[[endpoint]]\nname = 'n{n}'\naddress = '10.1.0.{n}'\n");
        let many = (0..256).map(own).collect::<Vec<_>>().concat();
        let nine = "keep = ['tcp/1', 'tcp/2', 'tcp/3', 'tcp/4', 'tcp/5', 'tcp/6', 'tcp/7', 'tcp/8', 'tcp/9']";
        for (text, place, part) in [
            ("provider = 'gpc'".to_owned(), "1:12", "gcp"),
            ("mode = 'audit'\nprovider = 'none'".to_owned(), "2:12", "guard nothing"),
            ("extras = ['eks']".to_owned(), "1:11", "ecs"),
            (one("169.254.169.254", ""), "4:11", "already guarded as \"imds\""),
            (one("64:ff9b::169.254.169.254", ""), "4:11", "already guarded"),
            (one("10.0.0.1", "[[endpoint]]\nname = 'a'\naddress = '10.0.0.2'"), "7:11", "endpoint.name"),
            (one("10.0.0", ""), "4:11", "no IPv4 or IPv6 address"),
            (one("10.0.0.0/8", ""), "4:11", "no IPv4 or IPv6 address"),
            (one("224.0.0.1", ""), "4:11", "multicast"),
            (one("ff02::1", ""), "4:11", "multicast"),
            (one("127.0.0.1", ""), "4:11", "loopback"),
            (one("::1", ""), "4:11", "loopback"),
            (one("::ffff:127.0.0.1", ""), "4:11", "loopback"),
            (one("0.0.0.0", ""), "4:11", "unspecified"),
            (one("::", ""), "4:11", "unspecified"),
            (one("255.255.255.255", ""), "4:11", "broadcast"),
            (one("10.0.0.1", nine), "5:8", "at most 8"),
            (one("10.0.0.1", "keep = ['udp/53', 'sctp/1']"), "5:19", "sctp/1"),
            (one("10.0.0.1", "keep = ['udp/0']"), "5:9", "udp/0"),
            (one("10.0.0.1", "keep = ['udp/+53']"), "5:9", "udp/+53"),
            (one("10.0.0.1", "keep = ['udp/65536']"), "5:9", "udp/65536"),
            (one("10.0.0.1", "keep = ['udp/53', 'udp/53']"), "5:19", "twice"),
            (
                "[[endpoint]]\nname = 'a-name-too-long-'\naddress = '10.0.0.1'".to_owned(),
                "2:8",
                "endpoint.name",
            ),
            ("[[endpoint]]\nname = 'a b'\naddress = '10.0.0.1'".to_owned(), "2:8", "endpoint.name"),
            ("[[endpoint]]\nname = 'a'".to_owned(), "1:1", "address"),
            (many, "768:11", "more than 256"),
        ] {
            let error = resolve(&text, "").unwrap_err();
            assert!(
                error.starts_with(&format!("imds.toml:{place}: ")) && error.contains(part),
                "{text}: {error}"
            );
        }
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
