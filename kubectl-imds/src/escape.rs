//! Escapes text of nodes before it reaches an output. The agent escapes it in the same way (`imds-agent/src/escape.rs`), but
//! a compromised node sends any bytes. Escaping is idempotent.

use std::borrow::Cow;

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
pub(crate) fn escape(text: &str) -> Cow<'_, str> {
    escape_all(text, is_unsafe)
}

/// Escapes text of several lines, such as a table. Newlines are not escaped.
pub(crate) fn escape_lines(text: &str) -> Cow<'_, str> {
    escape_all(text, |c| c != '\n' && is_unsafe(c))
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
pub(crate) fn to_json(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string(&with_escaped_strings(serde_json::to_value(value)?, escape))
}

/// Formats a value as indented JSON. Strings are escaped as by [`escape_lines`].
pub(crate) fn to_json_pretty(value: &impl Serialize) -> serde_json::Result<String> {
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
    use serde_json::json;

    use super::*;

    #[test]
    fn unsafe_characters_are_escaped() {
        assert_eq!(escape("a\x1b[2J\nb\u{202e}"), r"a\u{1b}[2J\nb\u{202e}");
        assert_eq!(escape_lines("a\nb\r\n"), "a\nb\\r\n");
        assert_eq!(escape(r"a\x2d1.slice"), r"a\x2d1.slice");
    }

    #[test]
    fn json_strings_are_escaped() {
        let value = json!({ "a\x1b": ["\u{7f}", 1, null] });
        assert_eq!(to_json(&value).unwrap(), r#"{"a\\u{1b}":["\\u{7f}",1,null]}"#);
        assert!(to_json_pretty(&value).unwrap().starts_with("{\n"));
    }
}
