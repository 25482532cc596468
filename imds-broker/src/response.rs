//! Responses to pods.

use std::fmt::Write as _;

use http::{HeaderMap, StatusCode, header, response::Parts};
use imds_broker::{allow::Rule, provider::Provider, request::Malformed};
use serde_json::json;
use thiserror::Error;

/// Headers of the metadata service that the pod does not get. They concern one connection only, or are set again.
const DROPPED_HEADERS: [&str; 11] = [
    "alt-svc",
    "connection",
    "content-length",
    "keep-alive",
    "proxy-authenticate",
    "proxy-connection",
    "set-cookie",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Longest path in a response.
const MAX_SHOWN_PATH: usize = 256;

/// Reason why the broker does not forward a request.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub(crate) enum Refusal {
    #[error("malformed request: {0}")]
    Malformed(#[from] Malformed),
    #[error("the request did not arrive within 5 seconds")]
    Incomplete,
    #[error("{0} is not allowed for this pod{hint}", hint = hint(.0))]
    NotAllowed(String),
    #[error("the query parameter {0} is not known for this provider")]
    UnknownParameter(String),
    #[error("the body can contain parameters, and only some parameters are allowed for this pod")]
    UncheckedBody,
    #[error("more than 200 requests per second")]
    TooManyRequests,
}

impl Refusal {
    pub(crate) fn not_allowed(method: &str, path: &str) -> Self {
        // The path is ASCII. A part of it is no rule, and gets no hint.
        Self::NotAllowed(match path.get(..MAX_SHOWN_PATH) {
            Some(start) => format!("{method} {start} ..."),
            None => format!("{method} {path}"),
        })
    }

    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(_) => StatusCode::BAD_REQUEST,
            Self::Incomplete => StatusCode::REQUEST_TIMEOUT,
            Self::NotAllowed(_) | Self::UnknownParameter(_) | Self::UncheckedBody => StatusCode::FORBIDDEN,
            Self::TooManyRequests => StatusCode::TOO_MANY_REQUESTS,
        }
    }

    /// Reports whether the next request on the connection would be read correctly, and is welcome.
    pub(crate) fn keeps_alive(&self) -> bool {
        match self {
            Self::NotAllowed(_) | Self::UnknownParameter(_) | Self::UncheckedBody => true,
            Self::Malformed(_) | Self::Incomplete | Self::TooManyRequests => false,
        }
    }
}

/// Returns the rule that would allow a request. No rule allows all paths.
fn hint(request: &str) -> String {
    match Rule::parse(request) {
        Ok(rule) => format!("; an exemption with allow = [\"{rule}\"] would allow it"),
        Err(_) => String::new(),
    }
}

/// Returns a response of the broker itself, in the form of the provider's errors.
pub(crate) fn error(
    provider: &Provider,
    status: StatusCode,
    reason: &str,
    is_head: bool,
    keeps_alive: bool,
) -> Vec<u8> {
    let text = format!("imds-agent: {reason}");
    let (content_type, body) = match provider.name {
        "azure" => ("application/json; charset=utf-8", json!({ "error": text }).to_string()),
        _ => ("text/plain; charset=utf-8", text + "\n"),
    };
    let mut response = status_line(status);
    write_header(&mut response, "content-type", content_type.as_bytes());
    write_header(&mut response, "content-length", body.len().to_string().as_bytes());
    if status == StatusCode::TOO_MANY_REQUESTS {
        write_header(&mut response, "retry-after", b"1");
    }
    end_head(&mut response, keeps_alive);
    if !is_head {
        response.extend_from_slice(body.as_bytes());
    }
    response
}

/// Returns a response with the status 403, after which the connection ends.
pub(crate) fn forbidden(headers: &[(&str, &str)], body: &str, is_head: bool) -> Vec<u8> {
    let mut response = status_line(StatusCode::FORBIDDEN);
    for (name, value) in headers {
        write_header(&mut response, name, value.as_bytes());
    }
    write_header(&mut response, "content-length", body.len().to_string().as_bytes());
    end_head(&mut response, false);
    if !is_head {
        response.extend_from_slice(body.as_bytes());
    }
    response
}

/// Delimits the body of a response.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Framing {
    /// The response has no body.
    Empty,
    /// `Content-Length`.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
}

impl Framing {
    /// Returns the framing for a body whose length may be known.
    pub(crate) fn new(status: StatusCode, is_head: bool, length: Option<u64>) -> Self {
        if is_head || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED {
            return Self::Empty;
        }
        length.map_or(Self::Chunked, Self::Length)
    }

    /// Appends a part of the body.
    pub(crate) fn write(self, output: &mut Vec<u8>, data: &[u8]) {
        match self {
            Self::Empty => {}
            Self::Length(_) => output.extend_from_slice(data),
            // An empty chunk would end the body.
            Self::Chunked if data.is_empty() => {}
            Self::Chunked => {
                output.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
                output.extend_from_slice(data);
                output.extend_from_slice(b"\r\n");
            }
        }
    }

    /// Appends the end of the body.
    pub(crate) fn finish(self, output: &mut Vec<u8>) {
        if self == Self::Chunked {
            output.extend_from_slice(b"0\r\n\r\n");
        }
    }
}

/// Returns the head of a forwarded response.
pub(crate) fn forwarded_head(parts: &Parts, framing: Framing, keeps_alive: bool) -> Vec<u8> {
    let mut head = status_line(parts.status);
    for (name, value) in &parts.headers {
        if !DROPPED_HEADERS.contains(&name.as_str()) && !is_named_in_connection(&parts.headers, name.as_str())
        {
            write_header(&mut head, name.as_str(), value.as_bytes());
        }
    }
    match framing {
        // The length of the body that a GET would have.
        Framing::Empty => {
            if let Some(length) = parts.headers.get(header::CONTENT_LENGTH) {
                write_header(&mut head, "content-length", length.as_bytes());
            }
        }
        Framing::Length(length) => write_header(&mut head, "content-length", length.to_string().as_bytes()),
        Framing::Chunked => write_header(&mut head, "transfer-encoding", b"chunked"),
    }
    end_head(&mut head, keeps_alive);
    head
}

fn is_named_in_connection(headers: &HeaderMap, name: &str) -> bool {
    let values = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|token| token.trim().eq_ignore_ascii_case(name))
}

fn status_line(status: StatusCode) -> Vec<u8> {
    let mut line = format!("HTTP/1.1 {} ", status.as_u16());
    // Writing to a string does not fail.
    let _ok = writeln!(line, "{}\r", status.canonical_reason().unwrap_or_default());
    line.into_bytes()
}

fn write_header(head: &mut Vec<u8>, name: &str, value: &[u8]) {
    head.extend_from_slice(name.as_bytes());
    head.extend_from_slice(b": ");
    head.extend_from_slice(value);
    head.extend_from_slice(b"\r\n");
}

fn end_head(head: &mut Vec<u8>, keeps_alive: bool) {
    write_header(head, "connection", if keeps_alive { b"keep-alive" } else { b"close" });
    head.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;

    #[test]
    fn refusals_name_the_rule() {
        let refusal = Refusal::not_allowed("GET", "/metadata/identity/");
        let azure = error(Provider::named("azure"), refusal.status(), &refusal.to_string(), false, true);
        assert_eq!(
            String::from_utf8(azure).unwrap(),
            "HTTP/1.1 403 Forbidden\r\ncontent-type: application/json; charset=utf-8\r\ncontent-length: 146\r\n\
             connection: keep-alive\r\n\r\n{\"error\":\"imds-agent: GET /metadata/identity/ is not allowed for this pod; \
             an exemption with allow = [\\\"GET /metadata/identity\\\"] would allow it\"}"
        );
        let refusal = Refusal::TooManyRequests;
        let aws = error(Provider::named("aws"), refusal.status(), &refusal.to_string(), true, false);
        assert_eq!(
            String::from_utf8(aws).unwrap(),
            "HTTP/1.1 429 Too Many Requests\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 46\r\n\
             retry-after: 1\r\nconnection: close\r\n\r\n"
        );
    }

    #[test]
    fn headers_of_one_connection_are_dropped() {
        let response = Response::builder()
            .status(200)
            .header("etag", "1")
            .header("connection", "x-hop, close")
            .header("x-hop", "1")
            .header("set-cookie", "a=b")
            .header("content-length", "5")
            .body(())
            .unwrap();
        let (parts, ()) = response.into_parts();
        let head = |framing| String::from_utf8(forwarded_head(&parts, framing, true)).unwrap();
        assert_eq!(
            head(Framing::Chunked),
            "HTTP/1.1 200 OK\r\netag: 1\r\ntransfer-encoding: chunked\r\nconnection: keep-alive\r\n\r\n"
        );
        assert_eq!(
            head(Framing::Empty),
            "HTTP/1.1 200 OK\r\netag: 1\r\ncontent-length: 5\r\nconnection: keep-alive\r\n\r\n"
        );
    }

    #[test]
    fn bodies_are_framed() {
        let framed = |framing: Framing| {
            let mut output = Vec::new();
            for data in [&b"hello"[..], b"", b" world, again"] {
                framing.write(&mut output, data);
            }
            framing.finish(&mut output);
            String::from_utf8(output).unwrap()
        };
        assert_eq!(framed(Framing::new(StatusCode::OK, false, Some(18))), "hello world, again");
        assert_eq!(
            framed(Framing::new(StatusCode::OK, false, None)),
            "5\r\nhello\r\nd\r\n world, again\r\n0\r\n\r\n"
        );
        for (status, is_head) in
            [(StatusCode::OK, true), (StatusCode::NO_CONTENT, false), (StatusCode::NOT_MODIFIED, false)]
        {
            assert_eq!(framed(Framing::new(status, is_head, Some(1))), "");
        }
    }
}
