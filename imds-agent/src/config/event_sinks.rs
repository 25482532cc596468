//! `[events]`: sinks that receive a record of each denied or audited request, and of each HTTP request.

mod otlp_target;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt,
    net::Ipv6Addr,
    path::{Path, PathBuf},
};

use http::Uri;
use imds_ebpf_common::Verdict;
use serde::{Deserialize, Serialize};
use toml::Spanned;

pub use self::otlp_target::Otlp;
use super::{source::Diagnostics, suggest::did_you_mean};
use crate::escape::escape_path;

/// Upper bound of the number of sinks. Each has a thread.
const MAX_SINKS: usize = 8;
/// Verdicts that can be recorded. The last two are those of HTTP requests only.
const VERDICTS: [Verdict; 4] = [Verdict::Denied, Verdict::Audited, Verdict::Allowed, Verdict::Exempt];
const DEFAULT_VERDICTS: [Verdict; 2] = [Verdict::Denied, Verdict::Audited];
const TYPES: [&str; 4] = ["stdout", "file", "syslog", "otlp"];
const MIB: u64 = 1 << 20;
const DEFAULT_SIZE_MIB: u32 = 64;
const MAX_SIZE_MIB: u32 = 65_536;
const DEFAULT_KEEP: u32 = 4;
const MAX_KEEP: u32 = 100;
/// Longest path of a Unix socket in bytes (`sun_path` of unix(7), without the byte that ends it).
const MAX_SOCKET_PATH: usize = 107;

/// Sinks for records of denied and audited requests.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Events {
    /// Verdicts of the requests that are recorded.
    pub verdicts: Vec<Verdict>,
    /// Receivers of the records, in the order of the file.
    pub sinks: Vec<Sink>,
}

/// Receiver of records.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Sink {
    /// JSON lines on standard output.
    Stdout,
    /// JSON lines in a file.
    File(LogFile),
    /// Messages of RFC 5424.
    Syslog(SyslogAddress),
    /// OpenTelemetry logs over HTTP.
    Otlp(Box<Otlp>),
}

/// Log file that is rotated by its size.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LogFile {
    /// Absolute path of the file.
    pub path: PathBuf,
    /// Size in bytes that no file exceeds, except with a single record.
    pub max_size: u64,
    /// Number of rotated files, at least one.
    pub keep: u32,
}

/// Address of a syslog receiver.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SyslogAddress {
    /// Unix datagram socket at an absolute path.
    Unix(PathBuf),
    /// One message in each datagram (RFC 5426).
    Udp(HostPort),
    /// Messages with octet counting on one connection (RFC 6587).
    Tcp(HostPort),
}

/// Host name or IP address, and port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostPort {
    /// Host name, or IP address without brackets.
    pub host: String,
    /// Port of the receiver.
    pub port: u16,
}

impl fmt::Display for Sink {
    /// Formats the type and the target, which identify the sink in logs, metrics and the status.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("stdout"),
            Self::File(LogFile { path, .. }) => write!(f, "file:{}", path.display()),
            Self::Syslog(address) => write!(f, "syslog:{address}"),
            Self::Otlp(otlp) => write!(f, "otlp:{otlp}"),
        }
    }
}

impl Sink {
    /// Reports whether both sinks have the same target. Names of OTLP sinks do not contain the whole target.
    fn has_target_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Otlp(one), Self::Otlp(other)) => one.url == other.url,
            _ => self.to_string() == other.to_string(),
        }
    }
}

impl fmt::Display for SyslogAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Udp(to) => write!(f, "udp://{to}"),
            Self::Tcp(to) => write!(f, "tcp://{to}"),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.parse::<Ipv6Addr>().is_ok() {
            write!(f, "[{host}]:{port}")
        } else {
            write!(f, "{host}:{port}")
        }
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct EventsTable {
    verdicts: Spanned<Vec<Spanned<String>>>,
    sinks: Vec<SinkTable>,
}

/// Keys of all types of sinks.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct SinkTable {
    #[serde(rename = "type")]
    kind: Spanned<String>,
    path: Option<Spanned<PathBuf>>,
    max_size_mib: Option<Spanned<u32>>,
    keep: Option<Spanned<u32>>,
    address: Option<Spanned<String>>,
    url: Option<Spanned<String>>,
    ca_file: Option<Spanned<PathBuf>>,
    headers: Option<BTreeMap<Spanned<String>, Spanned<String>>>,
    header_files: Option<BTreeMap<Spanned<String>, Spanned<PathBuf>>>,
}

impl Default for EventsTable {
    fn default() -> Self {
        let verdicts = DEFAULT_VERDICTS.map(|verdict| Spanned::new(0..0, verdict.name().to_owned()));
        Self { verdicts: Spanned::new(0..0, verdicts.into()), sinks: Vec::new() }
    }
}

impl Events {
    pub(super) fn parse(table: &EventsTable, diagnostics: &mut Diagnostics<'_>) -> Self {
        let mut sinks: Vec<Sink> = Vec::new();
        let mut otlp_numbers = BTreeMap::new();
        for table in &table.sinks {
            let Some(mut sink) = table.parse(diagnostics) else { continue };
            if let Sink::Otlp(otlp) = &mut sink {
                otlp.set_number(&mut otlp_numbers);
            }
            if sinks.iter().any(|other| sink.has_target_of(other)) {
                diagnostics.error(table.kind.span(), format!("events.sinks: {sink} is listed twice"));
            }
            sinks.push(sink);
        }
        if let Some(beyond) = table.sinks.get(MAX_SINKS) {
            let message = format!("events.sinks: at most {MAX_SINKS} sinks are supported");
            diagnostics.error(beyond.kind.span(), message);
        }
        Self { verdicts: parse_verdicts(&table.verdicts, diagnostics), sinks }
    }
}

fn parse_verdicts(names: &Spanned<Vec<Spanned<String>>>, diagnostics: &mut Diagnostics<'_>) -> Vec<Verdict> {
    let known = VERDICTS.map(Verdict::name);
    let mut verdicts = Vec::new();
    for name in names.get_ref() {
        let verdict =
            VERDICTS.into_iter().find(|verdict| verdict.name() == name.get_ref()).ok_or_else(|| {
                let suggestion = did_you_mean(name.get_ref(), known);
                format!(
                    "events.verdicts: {:?} is not one of {}{suggestion}",
                    name.get_ref(),
                    known.join(", ")
                )
            });
        verdicts.extend(diagnostics.ok(name.span(), verdict));
    }
    if names.get_ref().is_empty() {
        diagnostics.error(names.span(), "events.verdicts: the list is empty; remove the sinks instead");
    }
    verdicts
}

impl SinkTable {
    /// Parses the keys of the sink's type. Records the errors of all of them.
    fn parse(&self, diagnostics: &mut Diagnostics<'_>) -> Option<Sink> {
        let own: &[&str] = match self.kind.get_ref().as_str() {
            "stdout" => &[],
            "file" => &["path", "max_size_mib", "keep"],
            "syslog" => &["address"],
            "otlp" => &["url", "headers", "header_files", "ca_file"],
            other => {
                let suggestion = did_you_mean(other, TYPES);
                let message =
                    format!("events.sinks.type: {other:?} is not one of {}{suggestion}", TYPES.join(", "));
                diagnostics.error(self.kind.span(), message);
                return None;
            }
        };
        for (key, span) in self.keys() {
            if !own.contains(&key) {
                let message =
                    format!("events.sinks.{key}: a sink of type {:?} has no such key", self.kind.get_ref());
                diagnostics.error(span, message);
            }
        }
        match self.kind.get_ref().as_str() {
            "stdout" => Some(Sink::Stdout),
            "file" => self.parse_file(diagnostics).map(Sink::File),
            "syslog" => {
                let address = self.required(self.address.as_ref(), "address", diagnostics)?;
                diagnostics.ok(address.span(), parse_syslog(address.get_ref())).map(Sink::Syslog)
            }
            _ => self.parse_otlp(diagnostics).map(|otlp| Sink::Otlp(Box::new(otlp))),
        }
    }

    /// Returns the given keys with their locations.
    fn keys(&self) -> impl Iterator<Item = (&'static str, std::ops::Range<usize>)> {
        let Self { path, max_size_mib, keep, address, url, ca_file, headers, header_files, .. } = self;
        let first = |name: Option<&Spanned<String>>| name.map_or(self.kind.span(), Spanned::span);
        [
            ("path", path.as_ref().map(Spanned::span)),
            ("max_size_mib", max_size_mib.as_ref().map(Spanned::span)),
            ("keep", keep.as_ref().map(Spanned::span)),
            ("address", address.as_ref().map(Spanned::span)),
            ("url", url.as_ref().map(Spanned::span)),
            ("ca_file", ca_file.as_ref().map(Spanned::span)),
            ("headers", headers.as_ref().map(|headers| first(headers.keys().next()))),
            ("header_files", header_files.as_ref().map(|files| first(files.keys().next()))),
        ]
        .into_iter()
        .filter_map(|(key, span)| Some((key, span?)))
    }

    fn required<'t, T>(
        &self,
        value: Option<&'t Spanned<T>>,
        key: &str,
        diagnostics: &mut Diagnostics<'_>,
    ) -> Option<&'t Spanned<T>> {
        if value.is_none() {
            let message =
                format!("events.sinks: a sink of type {:?} needs the key `{key}`", self.kind.get_ref());
            diagnostics.error(self.kind.span(), message);
        }
        value
    }

    fn parse_file(&self, diagnostics: &mut Diagnostics<'_>) -> Option<LogFile> {
        let mut number = |value: &Option<Spanned<u32>>, key: &str, default: u32, most: u32| {
            let Some(value) = value else { return default };
            if !(1..=most).contains(value.get_ref()) {
                let message =
                    format!("events.sinks.{key}: {} is not a number from 1 to {most}", value.get_ref());
                diagnostics.error(value.span(), message);
            }
            *value.get_ref()
        };
        let size = number(&self.max_size_mib, "max_size_mib", DEFAULT_SIZE_MIB, MAX_SIZE_MIB);
        let keep = number(&self.keep, "keep", DEFAULT_KEEP, MAX_KEEP);
        let path = self.required(self.path.as_ref(), "path", diagnostics)?;
        let path = parse_path(path, "path", diagnostics)?;
        if path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            let span = self.path.as_ref().map(Spanned::span).unwrap_or_default();
            diagnostics.error(
                span,
                format!("events.sinks.path: {} does not end with the name of a file", path.display()),
            );
        }
        Some(LogFile { path, max_size: u64::from(size) * MIB, keep })
    }
}

fn parse_path(path: &Spanned<PathBuf>, key: &str, diagnostics: &mut Diagnostics<'_>) -> Option<PathBuf> {
    let text = path.get_ref();
    let is_plain = text.to_str().is_some_and(|text| !text.chars().any(char::is_control));
    let checked = if text.is_absolute() && is_plain {
        Ok(text.clone())
    } else {
        Err(format!("events.sinks.{key}: {} is not an absolute path", escape_path(text)))
    };
    diagnostics.ok(path.span(), checked)
}

fn parse_syslog(text: &str) -> Result<SyslogAddress, String> {
    let invalid = || {
        format!(
            "events.sinks.address: {text:?} is neither an absolute path nor a URL like udp://host:514 or tcp://host:601"
        )
    };
    if text.starts_with('/') {
        if text.len() > MAX_SOCKET_PATH || text.chars().any(char::is_control) {
            return Err(format!(
                "events.sinks.address: {text:?} is not the path of a Unix socket of at most {MAX_SOCKET_PATH} bytes"
            ));
        }
        return Ok(SyslogAddress::Unix(Path::new(text).to_owned()));
    }
    let url = parse_uri(text).ok_or_else(invalid)?;
    let port = url.port_u16().filter(|&port| port != 0).ok_or_else(invalid)?;
    let host = url.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let has_path = !matches!(url.path(), "" | "/") || url.query().is_some();
    let to = HostPort { host, port };
    match url.scheme_str() {
        Some("udp") if !has_path => Ok(SyslogAddress::Udp(to)),
        Some("tcp") if !has_path => Ok(SyslogAddress::Tcp(to)),
        _ => Err(invalid()),
    }
}

/// Parses an absolute URL without user information.
fn parse_uri(text: &str) -> Option<Uri> {
    let url: Uri = text.parse().ok()?;
    let authority = url.authority()?.as_str();
    (url.host().is_some_and(|host| !host.is_empty()) && !authority.contains('@')).then_some(url)
}
