//! Escapes text from outside a program before it reaches an output: names of interfaces, threads, cgroups and pods, labels, errors
//! that quote them, and the answers of nodes.
//!
//! A pod chooses the names of its threads. In such a name an escape sequence would control the terminal, a newline would forge
//! a log line, and a bidirectional override would reorder the line. A compromised node sends any bytes.
//!
//! Backslashes are not escaped, because systemd uses many in the names of cgroups. Escaping is therefore idempotent: a name can
//! be escaped both when it is read and when it is written.

use std::{borrow::Cow, fmt::Write as _, os::unix::ffi::OsStrExt as _, path::Path};

use serde::Serialize;
use serde_json::Value;

/// Reports whether a character can change the display of the text around it: control characters, line separators, and marks
/// and overrides of the writing direction.
const fn is_unsafe(c: char) -> bool {
    matches!(c,
        '\0'..='\x1f' | '\x7f'..='\u{9f}' | '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2066}'..='\u{2069}')
}

/// Escapes text for one line, such as `\n` or `\u{1b}`.
pub fn escape(text: &str) -> Cow<'_, str> {
    escape_all(text, is_unsafe)
}

/// Escapes text of several lines, such as a table. Newlines are not escaped.
pub fn escape_lines(text: &str) -> Cow<'_, str> {
    escape_all(text, |c| c != '\n' && is_unsafe(c))
}

/// Escapes bytes for one line. Bytes that are not UTF-8 become `\xff`.
pub fn escape_bytes(bytes: &[u8]) -> String {
    let mut escaped = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        escaped += &escape(chunk.valid());
        for byte in chunk.invalid() {
            // Writing to a string does not fail.
            let _ok = write!(escaped, "\\x{byte:02x}");
        }
    }
    escaped
}

/// Escapes a path for one line. Bytes that are not UTF-8 become `\xff`.
pub fn escape_path(path: &Path) -> String {
    escape_bytes(path.as_os_str().as_bytes())
}

fn escape_all(text: &str, is_unsafe: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_unsafe(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

/// Formats a value as JSON on one line. Strings are escaped as by [`escape`].
pub fn to_json(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string(&with_escaped_strings(serde_json::to_value(value)?, escape))
}

/// Formats a value as indented JSON. Strings are escaped as by [`escape_lines`].
pub fn to_json_pretty(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(&with_escaped_strings(serde_json::to_value(value)?, escape_lines))
}

/// Escapes all strings of a JSON value, including the keys of objects.
fn with_escaped_strings(value: Value, escape: fn(&str) -> Cow<'_, str>) -> Value {
    match value {
        Value::String(text) => Value::String(escape(&text).into_owned()),
        Value::Array(items) => items.into_iter().map(|item| with_escaped_strings(item, escape)).collect(),
        Value::Object(members) => {
            let escaped = |(key, value): (String, Value)| {
                (escape(&key).into_owned(), with_escaped_strings(value, escape))
            };
            members.into_iter().map(escaped).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => value,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn unsafe_characters_are_escaped() {
        for (text, expected) in [
            ("curl", "curl"),
            ("a\x1b[2J\nb\t", r"a\u{1b}[2J\nb\t"),
            ("\u{7f}\u{9b}", r"\u{7f}\u{9b}"),
            ("\u{202e}gpj.exe\u{2069}\u{200f}", r"\u{202e}gpj.exe\u{2069}\u{200f}"),
            ("caf\u{e9} \u{65e5}\u{672c}", "caf\u{e9} \u{65e5}\u{672c}"),
            (r"system-getty\x2d1.slice", r"system-getty\x2d1.slice"),
        ] {
            assert_eq!(escape(text), expected);
        }
        assert_eq!(escape_lines("a\nb\r\n"), "a\nb\\r\n");
    }

    #[test]
    fn invalid_utf8_is_escaped() {
        assert_eq!(escape_bytes(b"a\xff\xe2\x80b\n"), r"a\xff\xe2\x80b\n");
    }

    #[test]
    fn json_stays_json() {
        let value = json!({ "a\x1b": ["x\n\"y\"\\", "\u{202e}", "\u{7f}", 1, null], "b": {} });
        let line = to_json(&value).unwrap();
        let read: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read, json!({ r"a\u{1b}": [r#"x\n"y"\"#, r"\u{202e}", r"\u{7f}", 1, null], "b": {} }));
        let pretty = to_json_pretty(&value).unwrap();
        let read: Value = serde_json::from_str(&pretty).unwrap();
        assert_eq!(read[r"a\u{1b}"][0], "x\n\"y\"\\");
        assert!(pretty.starts_with("{\n  \""), "{pretty}");
    }

    proptest! {
        #[test]
        fn any_text_is_escaped_once(text in any::<String>()) {
            let escaped = escape(&text);
            prop_assert!(!escaped.contains(is_unsafe));
            prop_assert_eq!(escape(&escaped), &*escaped);
            let json = to_json(&text).unwrap();
            prop_assert!(!json.contains(is_unsafe));
            prop_assert_eq!(serde_json::from_str::<String>(&json).unwrap(), &*escaped);
        }

        #[test]
        fn any_bytes_are_safe(bytes in any::<Vec<u8>>()) {
            prop_assert!(!escape_bytes(&bytes).contains(is_unsafe));
        }
    }
}
