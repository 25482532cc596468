//! Canonical form of paths and queries.
//!
//! A metadata service may decode, normalise or lower-case a path before it routes a request. The broker therefore accepts only paths
//! that each of these steps leaves unchanged, or that no rule allows: a path has one spelling, and the rule that allows it is compared
//! byte by byte.

use thiserror::Error;

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
    /// The target has a percent sign.
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
        check_characters(segment, |byte| b"-._~:@,=+".contains(&byte))?;
        if segment.bytes().all(|byte| byte == b'.') {
            return Err(NotCanonical::DotSegment);
        }
    }
    Ok(())
}

/// Checks that a query, without its question mark, is a list of parameters without repeated keys.
///
/// # Errors
///
/// Returns the first violation.
pub fn check_query(query: &str) -> Result<(), NotCanonical> {
    let mut keys = Vec::new();
    for parameter in query.split('&') {
        let (key, value) = parameter.split_once('=').ok_or(NotCanonical::Query)?;
        if key.is_empty() {
            return Err(NotCanonical::Query);
        }
        check_characters(key, |byte| b"-._".contains(&byte))?;
        check_characters(value, |byte| b"-._~:@,/".contains(&byte))?;
        let key = key.to_ascii_lowercase();
        if keys.contains(&key) {
            return Err(NotCanonical::DuplicateParameter);
        }
        keys.push(key);
    }
    Ok(())
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
            assert_eq!(check_query(query), Ok(()), "{query}");
        }
        for (query, expected) in [
            ("", NotCanonical::Query),
            ("recursive", NotCanonical::Query),
            ("a=1&", NotCanonical::Query),
            ("=1", NotCanonical::Query),
            ("a=1&A=2", NotCanonical::DuplicateParameter),
            ("a=%31", NotCanonical::PercentEncoded),
            ("a=1+2", NotCanonical::Character),
            ("a=1?b=2", NotCanonical::Character),
            ("a=1;b=2", NotCanonical::Character),
            ("a==", NotCanonical::Character),
        ] {
            assert_eq!(check_query(query), Err(expected), "{query:?}");
        }
    }
}
