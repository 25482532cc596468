//! Parser of requests.
//!
//! The parser accepts one canonical form and repairs nothing. hyper's server is more lenient: hyper 1.12 accepts bare line feeds,
//! an absolute target, HTTP/1.0, `Transfer-Encoding`, obsolete characters in values, equal `Content-Length` headers, and hides from its
//! user which of these forms a request had. The broker therefore reads requests itself, one at a time, and rebuilds each
//! for the metadata service from the parsed parts, so that no byte of the head is copied.

use http::Method;
use thiserror::Error;

use crate::{
    allow::METHODS,
    canonical::{NotCanonical, canonical_query, check_path},
};

/// Longest head in bytes, with the empty line.
pub const MAX_HEAD: usize = 8 * 1024;
/// Longest body in bytes.
pub const MAX_BODY: usize = 4 * 1024;
/// Largest number of header lines.
pub const MAX_HEADERS: usize = 32;

/// Headers that no request may have. They change the framing or the protocol, or show that a proxy has forwarded the request: AWS,
/// Azure, GCP and Oracle refuse such requests too, because the client of the proxy is the actual sender.
const REFUSED_HEADERS: [&str; 9] = [
    "expect",
    "forwarded",
    "http2-settings",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-http-method-override",
];

/// Reason why a request is malformed.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum Malformed {
    /// A byte is not printable ASCII, or a line does not end with CR LF.
    #[error("the head has a character that is not printable ASCII, or a line that does not end with CR LF")]
    Character,
    /// The head is longer than [`MAX_HEAD`].
    #[error("the head is longer than 8 KiB")]
    HeadTooLong,
    /// The first line has another form.
    #[error("the first line is not METHOD PATH HTTP/1.1")]
    RequestLine,
    /// The method is unknown.
    #[error("the method is not GET, HEAD, POST, PUT or DELETE")]
    Method,
    /// The path or the query is not canonical.
    #[error(transparent)]
    Target(#[from] NotCanonical),
    /// A header line has another form.
    #[error("a header line is not of the form NAME: VALUE")]
    Header,
    /// The head has more than [`MAX_HEADERS`] header lines.
    #[error("there are more than 32 header lines")]
    TooManyHeaders,
    /// A header is repeated.
    #[error("a header is repeated")]
    RepeatedHeader,
    /// A header is one of those that no request may have.
    #[error("the header {0} is not supported")]
    RefusedHeader(&'static str),
    /// The header `Host` is missing or not a host.
    #[error("the header host is missing or invalid")]
    Host,
    /// The header `Connection` has another value.
    #[error("the header connection is neither close nor keep-alive")]
    Connection,
    /// The header `Content-Length` is not a number in canonical form.
    #[error("the header content-length is invalid")]
    ContentLength,
    /// The body is longer than [`MAX_BODY`].
    #[error("the body is longer than 4 KiB")]
    BodyTooLong,
    /// The method allows no body.
    #[error("only POST and PUT can have a body")]
    UnexpectedBody,
    /// Bytes follow the request before the broker has responded.
    #[error("another request follows before the response")]
    Pipelined,
}

/// Head of a request in canonical form.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Request {
    method: Method,
    target: String,
    /// Length of the path in `target`.
    path_length: usize,
    /// Names in lower case, and values without surrounding spaces.
    headers: Vec<(String, String)>,
    content_length: usize,
}

/// Searches the end of a head in bytes that arrive piece by piece.
#[derive(Debug, Default)]
pub struct HeadScanner {
    scanned: usize,
}

impl HeadScanner {
    /// Returns the length of the head once the bytes contain all of it. Looks at each byte once.
    ///
    /// # Errors
    ///
    /// Returns an error as soon as the bytes can't be the start of a head.
    pub fn find_end(&mut self, bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        while let Some(&byte) = bytes.get(self.scanned) {
            let before = &bytes[..self.scanned];
            let is_valid = match byte {
                b'\n' => before.ends_with(b"\r"),
                b'\r' | b' '..=b'~' => !before.ends_with(b"\r"),
                _ => false,
            };
            if !is_valid {
                return Err(Malformed::Character);
            }
            self.scanned += 1;
            if self.scanned > MAX_HEAD {
                return Err(Malformed::HeadTooLong);
            }
            if bytes[..self.scanned].ends_with(b"\r\n\r\n") {
                return Ok(Some(self.scanned));
            }
        }
        Ok(None)
    }
}

impl Request {
    /// Parses a head, with its empty line.
    ///
    /// # Errors
    ///
    /// Returns the first violation of the canonical form.
    pub fn parse(head: &[u8]) -> Result<Self, Malformed> {
        if HeadScanner::default().find_end(head)? != Some(head.len()) {
            return Err(Malformed::Character);
        }
        let head = str::from_utf8(head).map_err(|_| Malformed::Character)?;
        let mut lines = head.trim_end_matches("\r\n").split("\r\n");
        let (method, target) = parse_request_line(lines.next().unwrap_or_default())?;
        let (target, path_length) = canonical_target(target)?;
        let headers = parse_headers(lines)?;
        let mut request = Self { method, target, path_length, headers, content_length: 0 };
        request.check_headers()?;
        request.content_length = request.parse_content_length()?;
        Ok(request)
    }

    /// Returns the method.
    #[must_use]
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// Returns the path and the query, whose values are decoded.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Returns the path without the query.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.target[..self.path_length]
    }

    /// Returns the query without its question mark.
    #[must_use]
    pub fn query(&self) -> Option<&str> {
        self.target[self.path_length..].strip_prefix('?')
    }

    /// Returns the headers: names in lower case, each once, and values.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.headers.iter().map(|(name, value)| (&**name, &**value))
    }

    /// Returns the value of a header. `name` is in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers().find_map(|(other, value)| (other == name).then_some(value))
    }

    /// Returns the length of the body.
    #[must_use]
    pub fn content_length(&self) -> usize {
        self.content_length
    }

    /// Reports whether the client may send another request on the connection.
    #[must_use]
    pub fn keeps_alive(&self) -> bool {
        self.header("connection").is_none_or(|value| value.eq_ignore_ascii_case("keep-alive"))
    }

    fn check_headers(&self) -> Result<(), Malformed> {
        if let Some(name) = REFUSED_HEADERS.into_iter().find(|name| self.header(name).is_some()) {
            return Err(Malformed::RefusedHeader(name));
        }
        let is_host_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
        if !self.header("host").is_some_and(|host| !host.is_empty() && host.bytes().all(is_host_byte)) {
            return Err(Malformed::Host);
        }
        let connection = self.header("connection").unwrap_or("close");
        if !["close", "keep-alive"].iter().any(|known| connection.eq_ignore_ascii_case(known)) {
            return Err(Malformed::Connection);
        }
        Ok(())
    }

    fn parse_content_length(&self) -> Result<usize, Malformed> {
        let Some(text) = self.header("content-length") else { return Ok(0) };
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number || (text.len() > 1 && text.starts_with('0')) {
            return Err(Malformed::ContentLength);
        }
        // A number that overflows is too long as well.
        let length = text.parse().unwrap_or(usize::MAX);
        if length > MAX_BODY {
            return Err(Malformed::BodyTooLong);
        }
        if length > 0 && ![Method::POST, Method::PUT].contains(&self.method) {
            return Err(Malformed::UnexpectedBody);
        }
        Ok(length)
    }
}

/// Returns the method and the path of a malformed request for a report, as far as it has them. Text that is neither may be a secret.
#[must_use]
pub fn describe_malformed(head: &[u8]) -> (String, String) {
    let line = head.split(|byte| b"\r\n".contains(byte)).next().unwrap_or_default();
    let printable = |bytes: &[u8]| -> String {
        bytes.iter().map(|&byte| if byte.is_ascii_graphic() { char::from(byte) } else { '?' }).collect()
    };
    let mut words = line.split(|&byte| byte == b' ');
    let method = printable(words.next().unwrap_or_default());
    let target = words.next().unwrap_or_default();
    let path = target.split(|byte| b"?#;".contains(byte)).next().unwrap_or_default();
    if !METHODS.contains(&method.as_str()) || !path.starts_with(b"/") {
        return (String::new(), String::new());
    }
    (method, printable(path))
}

fn parse_request_line(line: &str) -> Result<(Method, &str), Malformed> {
    let [method, target, "HTTP/1.1"] = line.split(' ').collect::<Vec<_>>()[..] else {
        return Err(Malformed::RequestLine);
    };
    if !METHODS.contains(&method) {
        return Err(Malformed::Method);
    }
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| Malformed::Method)?;
    Ok((method, target))
}

/// Returns the target in canonical form, and the length of its path.
fn canonical_target(target: &str) -> Result<(String, usize), NotCanonical> {
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    check_path(path)?;
    let target = match query {
        Some(query) => format!("{path}?{}", canonical_query(query)?),
        None => path.to_owned(),
    };
    Ok((target, path.len()))
}

fn parse_headers<'l>(lines: impl Iterator<Item = &'l str>) -> Result<Vec<(String, String)>, Malformed> {
    let mut headers: Vec<(String, String)> = Vec::new();
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(Malformed::Header)?;
        let is_name =
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if !is_name {
            return Err(Malformed::Header);
        }
        let name = name.to_ascii_lowercase();
        if headers.len() == MAX_HEADERS {
            return Err(Malformed::TooManyHeaders);
        }
        if headers.iter().any(|(other, _)| *other == name) {
            return Err(Malformed::RepeatedHeader);
        }
        headers.push((name, value.trim_matches(' ').to_owned()));
    }
    Ok(headers)
}

#[cfg(test)]
mod tests;
