//! Responses of the HTTP server, and the format that a client prefers.

use http_body_util::Full;
use hyper::{
    Response, StatusCode,
    body::Bytes,
    header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue},
};

use super::metrics::Format;
use crate::escape::escape_lines;

/// Returns the format that the client prefers. A header can be given in several lines.
pub(super) fn format(headers: &HeaderMap) -> Format {
    let lines: Vec<_> = headers.get_all(ACCEPT).iter().filter_map(|line| line.to_str().ok()).collect();
    Format::from_accept(&lines.join(","))
}

pub(super) fn text(status: StatusCode, line: &str) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", format!("{}\n", escape_lines(line)))
}

pub(super) fn respond(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
