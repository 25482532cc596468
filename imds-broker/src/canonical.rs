//! Canonical form of paths and queries.
//!
//! A metadata service may decode, normalise or lower-case a path before it routes a request. The broker therefore accepts only paths
//! that each of these steps leaves unchanged, or that no rule allows: a path has one spelling, and the rule that allows it is compared
//! byte by byte.
//!
//! Clients encode the values of a query, such as `resource=https%3A%2F%2Fvault.azure.net`. The broker decodes them once, and forwards
//! only results that no further decoding changes.

use std::borrow::Cow;

use thiserror::Error;

/// Characters that a segment of a canonical path may have in addition to letters and digits.
pub const PATH_CHARACTERS: &[u8] = b"-._~:@,=+";

/// Reason why a path or a query is not canonical.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum NotCanonical {
    /// The path is relative, or the target has another form.
    #[error("the target does not start with a single /")]
    NotAbsolute,
    /// The path has two slashes in a row.
    #[error("the path has an empty segment")]
    EmptySegment,
    /// The path has a segment that consists of dots.
    #[error("the path has a segment of dots")]
    DotSegment,
    /// The path or a name in the query has a percent sign, or a value is an encoding of another character than the allowed ones.
    #[error("the target is percent-encoded")]
    PercentEncoded,
    /// The target has a byte that is not allowed.
    #[error("the target has a character other than letters, digits and -._~:@,=+")]
    Character,
    /// The query is not a list of `key=value`.
    #[error("the query is not of the form key=value&key=value")]
    Query,
    /// The query has a key twice.
    #[error("the query has a parameter twice")]
    DuplicateParameter,
}

/// Checks that a path is absolute, and that each segment has a single spelling. A trailing slash is allowed.
///
/// # Errors
///
/// Returns the first violation.
pub fn check_path(path: &str) -> Result<(), NotCanonical> {
    let segments = path.strip_prefix('/').ok_or(NotCanonical::NotAbsolute)?;
    if segments.is_empty() {
        return Ok(());
    }
    let segments = segments.strip_suffix('/').unwrap_or(segments);
    for segment in segments.split('/') {
        if segment.is_empty() {
            return Err(NotCanonical::EmptySegment);
        }
        check_characters(segment, |byte| PATH_CHARACTERS.contains(&byte))?;
        if segment.bytes().all(|byte| byte == b'.') {
            return Err(NotCanonical::DotSegment);
        }
    }
    Ok(())
}

/// Returns the canonical form of a query without its question mark: a list of parameters without repeated keys, with decoded values.
///
/// # Errors
///
/// Returns the first violation.
pub fn canonical_query(query: &str) -> Result<String, NotCanonical> {
    let mut keys = Vec::new();
    let mut canonical = String::with_capacity(query.len());
    for parameter in query.split('&') {
        let (key, value) = parameter.split_once('=').ok_or(NotCanonical::Query)?;
        if key.is_empty() {
            return Err(NotCanonical::Query);
        }
        check_characters(key, |byte| b"-._".contains(&byte))?;
        let value = decode(value)?;
        check_characters(&value, |byte| b"-._~:@,/".contains(&byte))?;
        if !canonical.is_empty() {
            canonical.push('&');
        }
        canonical.extend([key, "=", &*value]);
        let key = key.to_ascii_lowercase();
        if keys.contains(&key) {
            return Err(NotCanonical::DuplicateParameter);
        }
        keys.push(key);
    }
    Ok(canonical)
}

/// Decodes `%XX` once. The result still has percent signs if the text was encoded twice.
fn decode(value: &str) -> Result<Cow<'_, str>, NotCanonical> {
    let Some((first, encoded)) = value.split_once('%') else { return Ok(Cow::Borrowed(value)) };
    let mut decoded = first.to_owned();
    for part in encoded.split('%') {
        let (digits, rest) = part.split_at_checked(2).ok_or(NotCanonical::PercentEncoded)?;
        // `from_str_radix` accepts a sign.
        let is_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        let byte = u8::from_str_radix(digits, 16).ok().filter(|byte| is_hex && byte.is_ascii());
        decoded.push(byte.map(char::from).ok_or(NotCanonical::PercentEncoded)?);
        decoded.push_str(rest);
    }
    Ok(Cow::Owned(decoded))
}

fn check_characters(text: &str, is_allowed: impl Fn(u8) -> bool) -> Result<(), NotCanonical> {
    match text.bytes().find(|&byte| !byte.is_ascii_alphanumeric() && !is_allowed(byte)) {
        None => Ok(()),
        Some(b'%') => Err(NotCanonical::PercentEncoded),
        Some(_) => Err(NotCanonical::Character),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        for path in
            ["/", "/a", "/a/", "/metadata/v1.json", "/macs/02:29:96:8f:6a:2d/", "/..a", "/2009-04-04/x"]
        {
            assert_eq!(check_path(path), Ok(()), "{path}");
        }
        for (path, expected) in [
            ("", NotCanonical::NotAbsolute),
            ("*", NotCanonical::NotAbsolute),
            ("http://169.254.169.254/", NotCanonical::NotAbsolute),
            ("//a", NotCanonical::EmptySegment),
            ("//", NotCanonical::EmptySegment),
            ("/a//b", NotCanonical::EmptySegment),
            ("/a//", NotCanonical::EmptySegment),
            ("/a/./b", NotCanonical::DotSegment),
            ("/a/..", NotCanonical::DotSegment),
            ("/a/.../b", NotCanonical::DotSegment),
            ("/a/%2e%2e/b", NotCanonical::PercentEncoded),
            ("/a%2fb", NotCanonical::PercentEncoded),
            ("/a%00", NotCanonical::PercentEncoded),
            ("/a;v=1/b", NotCanonical::Character),
            ("/a\\b", NotCanonical::Character),
            ("/a#b", NotCanonical::Character),
            ("/a?b", NotCanonical::Character),
            ("/a b", NotCanonical::Character),
            ("/\u{ff0e}\u{ff0e}/b", NotCanonical::Character),
            ("/a\u{2215}b", NotCanonical::Character),
            ("/a\0", NotCanonical::Character),
        ] {
            assert_eq!(check_path(path), Err(expected), "{path:?}");
        }
    }

    #[test]
    fn queries() {
        for query in ["a=", "api-version=2021-02-01&format=text", "resource=https://management.azure.com/"] {
            assert_eq!(canonical_query(query).as_deref(), Ok(query));
        }
        for (query, expected) in [
            ("", NotCanonical::Query),
            ("recursive", NotCanonical::Query),
            ("a=1&", NotCanonical::Query),
            ("=1", NotCanonical::Query),
            ("a=1&A=2", NotCanonical::DuplicateParameter),
            ("%61=1", NotCanonical::PercentEncoded),
            ("a=%", NotCanonical::PercentEncoded),
            ("a=%3", NotCanonical::PercentEncoded),
            ("a=%3g", NotCanonical::PercentEncoded),
            ("a=%+1", NotCanonical::PercentEncoded),
            ("a=%c3%a9", NotCanonical::PercentEncoded),
            ("a=%\u{e9}", NotCanonical::PercentEncoded),
            // Encoded twice.
            ("a=%2541", NotCanonical::PercentEncoded),
            ("a=1%26b=2", NotCanonical::Character),
            ("a=1%3db", NotCanonical::Character),
            ("a=%23", NotCanonical::Character),
            ("a=%3f", NotCanonical::Character),
            ("a=%2b", NotCanonical::Character),
            ("a=%00", NotCanonical::Character),
            ("a=%0d%0a", NotCanonical::Character),
            ("a=%20", NotCanonical::Character),
            ("a=1+2", NotCanonical::Character),
            ("a=1?b=2", NotCanonical::Character),
            ("a=1;b=2", NotCanonical::Character),
            ("a==", NotCanonical::Character),
        ] {
            assert_eq!(canonical_query(query), Err(expected), "{query:?}");
        }
    }

    #[test]
    fn values_of_queries_are_decoded_once() {
        for (query, canonical) in [
            ("resource=https%3A%2F%2Fvault.azure.net", "resource=https://vault.azure.net"),
            ("scopes=a%2cb&alt=json", "scopes=a,b&alt=json"),
            ("a=%41%7E&b=%2e%2E", "a=A~&b=.."),
        ] {
            assert_eq!(canonical_query(query).as_deref(), Ok(canonical));
            assert_eq!(canonical_query(canonical).as_deref(), Ok(canonical));
        }
    }
}
