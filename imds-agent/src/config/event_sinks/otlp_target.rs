//! Sink of type `otlp`: URL, and headers with secrets.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use http::{HeaderName, HeaderValue, Uri, uri::Authority};

use super::{super::source::Diagnostics, SinkTable, parse_path, parse_uri};

/// Upper bound of the headers of a request that the configuration adds.
const MAX_HEADERS: usize = 16;
/// Headers that belong to the HTTP client, or to the connection (RFC 9110, 7.6.1).
const CLIENT_HEADERS: [&str; 14] = [
    "accept",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
];
/// Parts of the names of headers whose values are secret.
const SECRET_PARTS: [&str; 8] =
    ["auth", "cookie", "credential", "key", "passw", "secret", "signature", "token"];

/// Receiver of OpenTelemetry logs (OTLP/HTTP).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Otlp {
    /// URL with its path, usually `/v1/logs`. The path may contain a token.
    pub url: Uri,
    /// Number among the sinks with the same origin, from 1.
    pub number: usize,
    /// Headers of each request.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Headers of each request whose values are the contents of files.
    pub header_files: Vec<(HeaderName, PathBuf)>,
    /// File with the certificates of trusted authorities, instead of those of the system.
    pub ca_file: Option<PathBuf>,
}

impl fmt::Display for Otlp {
    /// Formats scheme, host and port. The path may be secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&numbered(origin(&self.url), self.number))
    }
}

impl Otlp {
    /// Returns the name of the next sink, which has this URL. `numbers` has the number of sinks for each origin so far.
    pub(crate) fn next_name(numbers: &mut BTreeMap<String, usize>, url: &str) -> String {
        let origin = url.parse().map(|url| origin(&url)).unwrap_or_default();
        let number = next_number(numbers, &origin);
        numbered(origin, number)
    }

    /// Numbers the next sink, like [`Otlp::next_name`].
    pub(super) fn set_number(&mut self, numbers: &mut BTreeMap<String, usize>) {
        self.number = next_number(numbers, &origin(&self.url));
    }
}

fn next_number(numbers: &mut BTreeMap<String, usize>, origin: &str) -> usize {
    let number = numbers.entry(origin.to_owned()).or_default();
    *number += 1;
    *number
}

/// Returns scheme, host and port of a URL.
fn origin(url: &Uri) -> String {
    let authority = url.authority().map(Authority::as_str).unwrap_or_default();
    format!("{}://{authority}", url.scheme_str().unwrap_or_default())
}

fn numbered(origin: String, number: usize) -> String {
    if number < 2 { origin } else { format!("{origin}#{number}") }
}

impl SinkTable {
    pub(super) fn parse_otlp(&self, diagnostics: &mut Diagnostics<'_>) -> Option<Otlp> {
        let ca_file = self.ca_file.as_ref().and_then(|path| parse_path(path, "ca_file", diagnostics));
        let (mut headers, mut header_files) = (Vec::new(), Vec::new());
        for (name, value) in self.headers.iter().flatten() {
            let parsed = diagnostics.ok(name.span(), parse_name(name.get_ref(), "headers"));
            let value = diagnostics.ok(value.span(), parse_value(name.get_ref(), value.get_ref()));
            headers.extend(parsed.zip(value));
        }
        for (name, path) in self.header_files.iter().flatten() {
            let parsed = diagnostics.ok(name.span(), parse_name(name.get_ref(), "header_files"));
            let path = parse_path(path, "header_files", diagnostics);
            header_files.extend(parsed.zip(path));
        }
        let mut names: Vec<HeaderName> = Vec::new();
        let of_files = self.header_files.iter().flat_map(BTreeMap::keys);
        for name in self.headers.iter().flat_map(BTreeMap::keys).chain(of_files) {
            let Ok(parsed) = HeaderName::try_from(name.get_ref().as_str()) else { continue };
            if names.contains(&parsed) {
                diagnostics.error(name.span(), format!("events.sinks.headers: {parsed} is listed twice"));
            }
            names.push(parsed);
            if names.len() == MAX_HEADERS + 1 {
                let message = format!("events.sinks.headers: at most {MAX_HEADERS} headers are supported");
                diagnostics.error(name.span(), message);
            }
        }
        let url = self.required(self.url.as_ref(), "url", diagnostics)?;
        let url = diagnostics.ok(url.span(), parse_url(url.get_ref()))?;
        if let Some(path) = self.ca_file.as_ref().filter(|_| url.scheme_str() == Some("http")) {
            diagnostics.error(path.span(), "events.sinks.ca_file: needs an https URL");
        }
        Some(Otlp { url, number: 1, headers, header_files, ca_file })
    }
}

/// Parses the URL of a receiver. Errors do not contain it, because it may contain secrets.
fn parse_url(text: &str) -> Result<Uri, String> {
    let url = parse_uri(text).filter(|url| matches!(url.scheme_str(), Some("http" | "https")));
    let url = url.ok_or(
        "events.sinks.url: not a URL like http://host:4318/v1/logs without user and password".to_owned(),
    )?;
    if url.query().is_some() {
        return Err("events.sinks.url: has a query; put a secret into a file and set header_files".to_owned());
    }
    Ok(url)
}

/// Parses the name of a header in the table `key`.
fn parse_name(text: &str, key: &str) -> Result<HeaderName, String> {
    let name = HeaderName::try_from(text)
        .map_err(|_| format!("events.sinks.{key}: {text:?} is not the name of a header"))?;
    if CLIENT_HEADERS.contains(&name.as_str()) {
        return Err(format!("events.sinks.{key}: the agent sets the header {text:?} itself"));
    }
    if key == "headers" && SECRET_PARTS.iter().any(|part| name.as_str().contains(part)) {
        return Err(format!(
            "events.sinks.headers: `config show` prints all headers; put the value of {name} into a file and set \
             header_files.{name}"
        ));
    }
    Ok(name)
}

fn parse_value(name: &str, text: &str) -> Result<HeaderValue, String> {
    HeaderValue::try_from(text)
        .map_err(|_| format!("events.sinks.headers: the value of {name:?} has a control character"))
}
