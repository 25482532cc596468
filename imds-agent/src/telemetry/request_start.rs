//! Start of an HTTP request that the programs have seen: method, path and version of the API.
//!
//! The text may contain a header with a token. Only the parts that [`parse`] returns leave this module.

use imds_broker::{allow::METHODS, canonical::PATH_CHARACTERS, provider::AWS_TOKEN_PATH};
use imds_ebpf_common::{Hook, RequestStart, Verdict};
use jiff::Timestamp;

use super::{
    event_record::since_boot,
    http_request::{HttpRequest, RequestEvent, RequestOutcome, RequestSender},
};
use crate::encode::ip_address;

/// Suffix of a path that the text contains only in part, or that continues with a character that no canonical path has: the rest
/// may be a secret. No canonical path has the suffix.
pub(crate) const TRUNCATED: char = '*';

/// Header with the session token of AWS, in lower case. A request without it is one of version 1.
const TOKEN_HEADER: &[u8] = b"\r\nx-aws-ec2-metadata-token:";

/// Request line of a request, without version and query.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct RequestLine {
    pub(crate) method: String,
    /// Printable ASCII. Ends with [`TRUNCATED`] if the text contains only a part of it.
    pub(crate) path: String,
    /// Presence of the header of AWS with a session token; `None` if the text ends before the headers do.
    pub(crate) has_token: Option<bool>,
}

/// Decodes a record of the ring buffer. Returns `None` if the bytes are too few, as from programs of another version.
pub fn decode(bytes: &[u8]) -> Option<RequestStart> {
    let bytes = bytes.first_chunk::<{ size_of::<RequestStart>() }>()?;
    // SAFETY: `RequestStart` has only integers and no padding, so that any bytes of its size are a valid value; `read_unaligned`
    // needs no alignment.
    Some(unsafe { bytes.as_ptr().cast::<RequestStart>().read_unaligned() })
}

/// Returns the request of a record. `booted` is the wall-clock time of boot. Returns `None` if the text is no request line, or for a
/// record of another version.
pub(super) fn request_event(start: &RequestStart, booted: Timestamp, is_aws: bool) -> Option<RequestEvent> {
    let RequestLine { method, path, has_token } = parse(start.text())?;
    let header = &start.header;
    let outcome = match () {
        () if header.verdict == Verdict::Exempt as u8 => RequestOutcome::Exempt,
        () if header.verdict == Verdict::Audited as u8 => RequestOutcome::Audited,
        () => return None,
    };
    // A request for a session token needs none.
    let is_token_request = method == "PUT" && path == AWS_TOKEN_PATH;
    let imds_version =
        if is_token_request { Some(2) } else { has_token.map(|has_token| 1 + u8::from(has_token)) };
    Some(RequestEvent {
        time: since_boot(header.time, booted),
        hook: Hook::ALL.into_iter().find(|&hook| hook as u8 == header.hook),
        sender: RequestSender { ifindex: header.ifindex, ..RequestSender::default() },
        endpoint: ip_address(header.endpoint),
        port: header.port,
        request: HttpRequest { method, path, imds_version: imds_version.filter(|_| is_aws) },
        outcome,
        status: None,
        reason: None,
        rule: None,
        other_rules: 0,
        suppressed: 0,
    })
}

/// Parses the first bytes of a request. Returns `None` if they are no request line with an absolute path.
pub(crate) fn parse(text: &[u8]) -> Option<RequestLine> {
    let space = text.iter().position(|&byte| byte == b' ')?;
    let (method, rest) = text.split_at_checked(space)?;
    let rest = rest.get(1..)?;
    let is_path_byte =
        |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'/' || PATH_CHARACTERS.contains(byte);
    let end = rest.iter().position(|byte| !is_path_byte(byte)).unwrap_or(rest.len());
    let (path, after) = rest.split_at_checked(end)?;
    let is_method = METHODS.iter().any(|known| known.as_bytes() == method);
    if !is_method || !path.starts_with(b"/") {
        return None;
    }
    let mut path: String = path.iter().copied().map(char::from).collect();
    if !matches!(after.first(), Some(b' ' | b'?' | b'\r' | b'\n')) {
        path.push(TRUNCATED);
    }
    Some(RequestLine {
        method: method.iter().copied().map(char::from).collect(),
        path,
        has_token: has_token(text),
    })
}

fn has_token(text: &[u8]) -> Option<bool> {
    let end = text.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let headers = text.get(..end.unwrap_or(text.len())).unwrap_or(text);
    let is_present =
        headers.windows(TOKEN_HEADER.len()).any(|bytes| bytes.eq_ignore_ascii_case(TOKEN_HEADER));
    if is_present { Some(true) } else { end.map(|_| false) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Option<(String, String, Option<bool>)> {
        parse(text.as_bytes()).map(|line| (line.method, line.path, line.has_token))
    }

    fn expected(method: &str, path: &str, has_token: Option<bool>) -> (String, String, Option<bool>) {
        (method.to_owned(), path.to_owned(), has_token)
    }

    #[test]
    fn request_lines() {
        let host = "Host: 169.254.169.254\r\n";
        for (text, parsed) in [
            ("GET /a HTTP/1.1\r\n\r\n".to_owned(), expected("GET", "/a", Some(false))),
            (format!("GET /a HTTP/1.1\r\n{host}"), expected("GET", "/a", None)),
            (format!("PUT /a/b?c=d HTTP/1.1\r\n{host}\r\n"), expected("PUT", "/a/b", Some(false))),
            (
                format!("GET /a HTTP/1.1\r\n{host}X-aws-ec2-metadata-token: secret\r\n"),
                expected("GET", "/a", Some(true)),
            ),
            (format!("GET /a HTTP/1.1\r\n{host}X-aws-ec2-metadata-tok"), expected("GET", "/a", None)),
            (
                "PUT /a HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n".to_owned(),
                expected("PUT", "/a", Some(false)),
            ),
            ("GET /\r\n".to_owned(), expected("GET", "/", None)),
            ("GET /a;password=b HTTP/1.1\r\n".to_owned(), expected("GET", "/a*", None)),
            ("GET /a%3Fb HTTP/1.1\r\n".to_owned(), expected("GET", "/a*", None)),
            ("GET /long/path".to_owned(), expected("GET", "/long/path*", None)),
            ("GET /long/path?query".to_owned(), expected("GET", "/long/path", None)),
        ] {
            assert_eq!(line(&text), Some(parsed), "{text:?}");
        }
    }

    #[test]
    fn other_texts_are_no_request() {
        for text in [
            "",
            "GET",
            "GET ",
            "GET  HTTP/1.1\r\n",
            "get /a HTTP/1.1",
            " GET /a",
            "GET a HTTP/1.1",
            "GET http://user:password@a/ HTTP/1.1",
            "X-aws-ec2-metadata-token: secret",
        ] {
            assert_eq!(line(text), None, "{text:?}");
        }
    }

    #[test]
    fn body_is_not_searched_for_the_token() {
        let text = "POST /a HTTP/1.1\r\n\r\n\r\nX-aws-ec2-metadata-token: x";
        assert_eq!(line(text), Some(expected("POST", "/a", Some(false))));
    }
}
