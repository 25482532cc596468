//! Formats of a log line.

use std::{borrow::Cow, env, io, os::fd::AsFd as _};

use clap::ValueEnum;
use jiff::Timestamp;
use log::Level;
use nix::sys::stat::fstat;
use serde::Serialize;

use crate::escape::{escape, to_json};

/// Maximum length of a message in bytes. An error of the BPF verifier quotes its whole log.
const MAX_MESSAGE: usize = 16 << 10;

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Time, level and message
    #[default]
    Text,
    /// One JSON object per line: timestamp, level, target, message
    Json,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct LineFormat {
    format: LogFormat,
    /// True if standard error is the systemd journal, which records a priority and a time for each line.
    is_journal: bool,
}

#[derive(Serialize)]
struct JsonLine<'a> {
    timestamp: String,
    level: String,
    target: &'a str,
    message: &'a str,
}

impl LineFormat {
    pub(crate) fn new(format: LogFormat) -> Self {
        Self { format, is_journal: is_journal() }
    }

    /// Returns one line with its newline.
    pub(crate) fn line(self, level: Level, target: &str, message: &str) -> Vec<u8> {
        self.line_at(Timestamp::now(), level, target, message)
    }

    fn line_at(self, time: Timestamp, level: Level, target: &str, message: &str) -> Vec<u8> {
        let message = shortened(message);
        let line = match self.format {
            LogFormat::Json => {
                let (timestamp, level) = (format!("{time:.6}"), level.as_str().to_lowercase());
                let line = JsonLine { timestamp, level, target, message: &message };
                // Serializing a map of strings does not fail.
                to_json(&line).unwrap_or_default()
            }
            LogFormat::Text if self.is_journal => escape(&message).into_owned(),
            LogFormat::Text => format!("{time:.3} {level:5} {}", escape(&message)),
        };
        let priority = if self.is_journal { format!("<{}>", priority(level)) } else { String::new() };
        format!("{priority}{line}\n").into_bytes()
    }

    /// Returns the lines of an error with which the process ends. In the text format, except for the journal, they stay
    /// unchanged.
    pub(crate) fn final_error(self, text: &str) -> Vec<u8> {
        match (self.format, self.is_journal) {
            (LogFormat::Text, false) => format!("{}\n", crate::escape::escape_lines(text)).into_bytes(),
            (LogFormat::Json, _) => self.line(Level::Error, env!("CARGO_CRATE_NAME"), text),
            (LogFormat::Text, true) => {
                let lines = text.lines().map(|line| self.line(Level::Error, "", line));
                lines.collect::<Vec<_>>().concat()
            }
        }
    }
}

/// Reports whether standard error is the stream to the journal that `JOURNAL_STREAM` names (sd-daemon(3)). The variable alone
/// does not suffice: processes with a redirected standard error inherit it.
fn is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    fstat(io::stderr().as_fd()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Returns the priority of syslog(3) for a level.
const fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

fn shortened(message: &str) -> Cow<'_, str> {
    if message.len() <= MAX_MESSAGE {
        return Cow::Borrowed(message);
    }
    let (start, rest) = message.split_at(message.floor_char_boundary(MAX_MESSAGE));
    Cow::Owned(format!("{start}… ({} more bytes)", rest.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(format: LogFormat, is_journal: bool, message: &str) -> String {
        let format = LineFormat { format, is_journal };
        let line = format.line_at(Timestamp::UNIX_EPOCH, Level::Error, "imds_agent::controller", message);
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn every_format() {
        let message = "veth\x1b1: \"x\"\nforged";
        assert_eq!(
            line(LogFormat::Text, false, message),
            "1970-01-01T00:00:00.000Z ERROR veth\\u{1b}1: \"x\"\\nforged\n"
        );
        assert_eq!(line(LogFormat::Text, true, message), "<3>veth\\u{1b}1: \"x\"\\nforged\n");
        let json = line(LogFormat::Json, false, message);
        assert_eq!(json.lines().count(), 1);
        let expected = serde_json::json!({
            "timestamp": "1970-01-01T00:00:00.000000Z",
            "level": "error",
            "target": "imds_agent::controller",
            "message": r#"veth\u{1b}1: "x"\nforged"#,
        });
        assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap(), expected);
        assert_eq!(line(LogFormat::Json, true, message), format!("<3>{json}"));
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        let text = line(LogFormat::Text, true, &"\u{e4}".repeat(MAX_MESSAGE));
        assert!(text.len() < MAX_MESSAGE + 50 && text.ends_with("more bytes)\n"));
    }
}
