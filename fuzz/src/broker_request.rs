//! Parser of the broker: any bytes are rejected or have one meaning, and the request survives being written and parsed again.

use imds_broker::{
    canonical::{canonical_query, check_path},
    request::{HeadScanner, MAX_BODY, MAX_HEADERS, Malformed, Request, describe_malformed},
};

pub(crate) fn run(bytes: &[u8]) {
    assert_found_in_pieces(bytes);
    let (method, path) = describe_malformed(bytes);
    assert!((method + &path).bytes().all(|byte| byte.is_ascii_graphic()));
    let Ok(Some(length)) = HeadScanner::default().find_end(bytes) else { return };
    let Ok(request) = Request::parse(&bytes[..length]) else { return };
    assert_canonical(&request, &bytes[..length]);
    let written = write(&request);
    assert_eq!(Request::parse(written.as_bytes()).expect("a written request is valid"), request);
}

/// Asserts that the end of the head does not depend on the pieces in which the bytes arrive.
fn assert_found_in_pieces(bytes: &[u8]) {
    let (mut scanner, mut found) = (HeadScanner::default(), Ok(None));
    for length in (0..bytes.len()).step_by(7).chain([bytes.len()]) {
        found = scanner.find_end(&bytes[..length]);
        if found != Ok(None) {
            break;
        }
    }
    assert_eq!(found, HeadScanner::default().find_end(bytes));
    if let Ok(Some(length)) = found {
        assert!(bytes[..length].ends_with(b"\r\n\r\n"));
        assert!(!bytes[..length - 1].windows(4).any(|end| end == b"\r\n\r\n"));
    } else {
        assert!(matches!(Request::parse(bytes), Err(Malformed::Character | Malformed::HeadTooLong)));
    }
}

fn assert_canonical(request: &Request, bytes: &[u8]) {
    assert!(bytes.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\r' | b'\n')));
    assert_eq!(check_path(request.path()), Ok(()));
    assert!(request.query().is_none_or(|query| canonical_query(query).as_deref() == Ok(query)));
    assert!(!request.target().contains(['%', '\\', '#', ';', ' ']) && !request.path().contains("//"));
    assert!(!request.path().split('/').any(|segment| segment == "." || segment == ".."));
    assert!(request.content_length() <= MAX_BODY);
    let names: Vec<_> = request.headers().map(|(name, _)| name).collect();
    assert!(names.len() <= MAX_HEADERS && names.contains(&"host"));
    for name in ["transfer-encoding", "upgrade", "expect", "x-forwarded-for"] {
        assert!(!names.contains(&name), "{name}");
    }
    // Each header line ends with the only CR LF of the line.
    assert_eq!(bytes.windows(2).filter(|end| end == b"\r\n").count(), names.len() + 2);
}

fn write(request: &Request) -> String {
    let line = format!("{} {} HTTP/1.1\r\n", request.method(), request.target());
    let headers: Vec<_> = request.headers().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    line + &headers.concat() + "\r\n"
}
