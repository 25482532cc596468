use proptest::prelude::*;

use super::*;

fn parse(head: &str) -> Result<Request, Malformed> {
    Request::parse(head.as_bytes())
}

#[test]
fn canonical_request() {
    let request = parse(
        "GET /metadata/instance?api-version=1 HTTP/1.1\r\nHost: 169.254.169.254\r\nMETADATA:  true \r\n\r\n",
    )
    .unwrap();
    assert_eq!(*request.method(), Method::GET);
    assert_eq!((request.path(), request.query()), ("/metadata/instance", Some("api-version=1")));
    assert_eq!(request.header("metadata"), Some("true"));
    assert!(request.keeps_alive() && request.content_length() == 0);
    let request = parse(
        "PUT /a HTTP/1.1\r\nhost: [fd00:ec2::254]:80\r\ncontent-length: 4096\r\nconnection: Close\r\n\r\n",
    );
    let request = request.unwrap();
    assert!(!request.keeps_alive() && request.content_length() == 4096 && request.query().is_none());
}

/// Vectors of public advisories on request smuggling and path confusion, with what the parser says.
#[test]
fn other_forms_are_refused() {
    let head = |line: &str, headers: &str| format!("{line}\r\nHost: a\r\n{headers}\r\n");
    let with = |headers: &str| head("POST /a HTTP/1.1", headers);
    for (head, expected) in [
        // Request line.
        (head("GET /a HTTP/1.0", ""), Malformed::RequestLine),
        (head("GET /a HTTP/2.0", ""), Malformed::RequestLine),
        (head("GET /a", ""), Malformed::RequestLine),
        (head("GET  /a HTTP/1.1", ""), Malformed::RequestLine),
        (head("GET /a HTTP/1.1 ", ""), Malformed::RequestLine),
        (head(" GET /a HTTP/1.1", ""), Malformed::RequestLine),
        (head("GET /a b HTTP/1.1", ""), Malformed::RequestLine),
        (head("\r\nGET /a HTTP/1.1", ""), Malformed::RequestLine),
        (head("GET\t/a HTTP/1.1", ""), Malformed::Character),
        (head("GET /a\x0bHTTP/1.1", ""), Malformed::Character),
        ("PRI * HTTP/2.0\r\n\r\n".to_owned(), Malformed::RequestLine),
        (head("get /a HTTP/1.1", ""), Malformed::Method),
        (head("OPTIONS /a HTTP/1.1", ""), Malformed::Method),
        (head("CONNECT 169.254.169.254:80 HTTP/1.1", ""), Malformed::Method),
        // Target.
        (head("GET http://169.254.169.254/a HTTP/1.1", ""), NotCanonical::NotAbsolute.into()),
        (head("GET 169.254.169.254:80 HTTP/1.1", ""), NotCanonical::NotAbsolute.into()),
        (head("GET * HTTP/1.1", ""), NotCanonical::NotAbsolute.into()),
        (head("GET //169.254.169.254/a HTTP/1.1", ""), NotCanonical::EmptySegment.into()),
        (head("GET /a/../b HTTP/1.1", ""), NotCanonical::DotSegment.into()),
        (head("GET /a/%2e%2e/b HTTP/1.1", ""), NotCanonical::PercentEncoded.into()),
        (head("GET /a#b HTTP/1.1", ""), NotCanonical::Character.into()),
        (head("GET /a?b HTTP/1.1", ""), NotCanonical::Query.into()),
        (head("GET /a\u{ff0f}b HTTP/1.1", ""), Malformed::Character),
        // Framing.
        (with("Transfer-Encoding: chunked\r\n"), Malformed::RefusedHeader("transfer-encoding")),
        (
            with("Transfer-Encoding: xchunked\r\nContent-Length: 4\r\n"),
            Malformed::RefusedHeader("transfer-encoding"),
        ),
        (
            with("Content-Length: 4\r\nTransfer-Encoding: identity\r\n"),
            Malformed::RefusedHeader("transfer-encoding"),
        ),
        (with("Transfer-Encoding : chunked\r\n"), Malformed::Header),
        (with("Transfer_Encoding: chunked\r\n"), Malformed::Header),
        (with("X: y\r\n Transfer-Encoding: chunked\r\n"), Malformed::Header),
        (with("X: y\r\n\tobs-fold\r\n"), Malformed::Character),
        (with("X: y\nTransfer-Encoding: chunked\r\n"), Malformed::Character),
        (with("X: y\rTransfer-Encoding: chunked\r\n"), Malformed::Character),
        (with("X: a\0b\r\n"), Malformed::Character),
        (with("X: \u{e9}\r\n"), Malformed::Character),
        (with(": b\r\n"), Malformed::Header),
        (with("X\r\n"), Malformed::Header),
        (with("Content-Length: 4\r\nContent-Length: 4\r\n"), Malformed::RepeatedHeader),
        (with("Content-Length: 4\r\ncontent-length: 0\r\n"), Malformed::RepeatedHeader),
        (with("Content-Length: 4, 4\r\n"), Malformed::ContentLength),
        (with("Content-Length: +4\r\n"), Malformed::ContentLength),
        (with("Content-Length: -4\r\n"), Malformed::ContentLength),
        (with("Content-Length: 04\r\n"), Malformed::ContentLength),
        (with("Content-Length: 0x4\r\n"), Malformed::ContentLength),
        (with("Content-Length: 4 4\r\n"), Malformed::ContentLength),
        (with("Content-Length:\r\n"), Malformed::ContentLength),
        (with("Content-Length: 4097\r\n"), Malformed::BodyTooLong),
        (with("Content-Length: 18446744073709551620\r\n"), Malformed::BodyTooLong),
        (head("GET /a HTTP/1.1", "Content-Length: 1\r\n"), Malformed::UnexpectedBody),
        // Connection.
        (with("Host: b\r\n"), Malformed::RepeatedHeader),
        ("GET /a HTTP/1.1\r\n\r\n".to_owned(), Malformed::Host),
        ("GET /a HTTP/1.1\r\nHost: a/b\r\n\r\n".to_owned(), Malformed::Host),
        ("GET /a HTTP/1.1\r\nHost:\r\n\r\n".to_owned(), Malformed::Host),
        (with("Connection: upgrade\r\n"), Malformed::Connection),
        (with("Connection: close, metadata\r\n"), Malformed::Connection),
        (with("Upgrade: h2c\r\n"), Malformed::RefusedHeader("upgrade")),
        (with("HTTP2-Settings: AAMAAABk\r\n"), Malformed::RefusedHeader("http2-settings")),
        (with("Expect: 100-continue\r\n"), Malformed::RefusedHeader("expect")),
        (with("X-Forwarded-For: 10.0.0.1\r\n"), Malformed::RefusedHeader("x-forwarded-for")),
        (with("Forwarded: for=10.0.0.1\r\n"), Malformed::RefusedHeader("forwarded")),
        (with("X-HTTP-Method-Override: PUT\r\n"), Malformed::RefusedHeader("x-http-method-override")),
    ] {
        assert_eq!(parse(&head).unwrap_err(), expected, "{head:?}");
    }
}

#[test]
fn sizes_are_limited() {
    let many = |count| (0..count).map(|number| format!("x{number}: y\r\n")).collect::<Vec<_>>().concat();
    let head = |count| format!("GET /a HTTP/1.1\r\nHost: a\r\n{}\r\n", many(count));
    assert!(parse(&head(MAX_HEADERS - 1)).is_ok());
    assert_eq!(parse(&head(MAX_HEADERS)).unwrap_err(), Malformed::TooManyHeaders);
    let start = "GET /a HTTP/1.1\r\nHost: a\r\nX: ";
    let long = |length: usize| format!("{start}{}\r\n\r\n", "x".repeat(length - start.len() - 4));
    assert!(parse(&long(MAX_HEAD)).is_ok());
    assert_eq!(parse(&long(MAX_HEAD + 1)).unwrap_err(), Malformed::HeadTooLong);
}

#[test]
fn descriptions_have_no_query() {
    let describe = |head: &str| describe_malformed(head.as_bytes());
    assert_eq!(describe("GET /a/%2e%2e?token=secret HTTP/1.1\r\n"), ("GET".into(), "/a/%2e%2e".into()));
    assert_eq!(describe("GET /a\x1b#x"), ("GET".into(), "/a?".into()));
    assert_eq!(describe("GET /a;password=secret"), ("GET".into(), "/a".into()));
    for unknown in ["", "X-aws-ec2-metadata-token: secret", "GET http://user:secret@a/", "G\0T /a"] {
        assert_eq!(describe(unknown), (String::new(), String::new()), "{unknown}");
    }
}

proptest! {
    #[test]
    fn heads_are_found_however_they_arrive(head in "[ -~]{0,20}\r\n([ -~]{1,10}\r\n){0,3}\r\n[\0-~]{0,10}", cut in 0..40_usize) {
        let mut scanner = HeadScanner::default();
        let part = &head.as_bytes()[..cut.min(head.len())];
        let found = match scanner.find_end(part) {
            Ok(None) => scanner.find_end(head.as_bytes()),
            found => found,
        };
        let end = head.find("\r\n\r\n").map(|index| index + 4);
        prop_assert_eq!(found, Ok(end));
    }

    #[test]
    fn any_bytes_are_parsed(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _result = Request::parse(&bytes);
        let (method, path) = describe_malformed(&bytes);
        prop_assert!((method + &path).bytes().all(|byte| byte.is_ascii_graphic()));
    }
}
