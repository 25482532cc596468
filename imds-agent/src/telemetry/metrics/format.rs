//! The text formats of Prometheus and their negotiation by the `Accept` header (RFC 9110, 12.5.1).

use std::fmt::Write as _;

use super::family::{Families, Family, MetricKind, Sample};
use crate::escape::escape;

/// Text format of `/metrics`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Format {
    /// Prometheus text format, version 0.0.4.
    #[default]
    Text,
    /// `OpenMetrics` text format, version 1.0.
    OpenMetrics,
}

impl Format {
    /// Returns the format that the header prefers, or the Prometheus text format if it has no preference.
    #[must_use]
    pub fn from_accept(header: &str) -> Self {
        let ranges: Vec<_> = elements(header, ',').into_iter().filter_map(Range::parse).collect();
        let quality = |format| {
            let of_format =
                ranges.iter().filter_map(|range| Some((range.specificity(format)?, range.quality)));
            of_format.max_by_key(|&found| found).map_or(0, |(_, quality)| quality)
        };
        if quality(Self::OpenMetrics) > quality(Self::Text) { Self::OpenMetrics } else { Self::Text }
    }

    /// Returns the value of the `Content-Type` header.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    const fn media_type(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Text => ("text", "plain", "0.0.4"),
            Self::OpenMetrics => ("application", "openmetrics-text", "1.0.0"),
        }
    }

    pub(crate) fn encode(self, families: &Families) -> String {
        let mut text = String::new();
        families.iter().for_each(|family| self.encode_family(family, &mut text));
        if self == Self::OpenMetrics {
            text.push_str("# EOF\n");
        }
        text
    }

    /// Appends a family to `text`. The results of `writeln!` are ignored, because writing to a string does not fail.
    fn encode_family(self, family: &Family, text: &mut String) {
        let Family { name, help, kind, samples } = family;
        let suffix = if *kind == MetricKind::Counter { "_total" } else { "" };
        // OpenMetrics names a family of counters without the suffix of its samples.
        let of_family = if self == Self::OpenMetrics { "" } else { suffix };
        let _ok = writeln!(text, "# HELP {name}{of_family} {}", escaped(help, self == Self::OpenMetrics));
        let _ok = writeln!(text, "# TYPE {name}{of_family} {}", kind.name());
        for Sample { labels, value } in samples {
            let labels: Vec<_> = labels
                .iter()
                .map(|(label, value)| format!("{label}=\"{}\"", escaped(&escape(value), true)))
                .collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let _ok = writeln!(text, "{name}{suffix}{labels} {value}");
        }
    }
}

fn escaped(text: &str, has_quotes: bool) -> String {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    if has_quotes { text.replace('"', "\\\"") } else { text }
}

/// One element of the header: a media range with its weight in thousandths.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Range {
    main: String,
    sub: String,
    version: Option<String>,
    quality: u16,
}

impl Range {
    /// Returns `None` for an element that is malformed.
    fn parse(element: &str) -> Option<Self> {
        let mut parts = elements(element, ';').into_iter();
        let (main, sub) = parts.next()?.trim().split_once('/')?;
        let mut range = Self {
            main: main.to_ascii_lowercase(),
            sub: sub.to_ascii_lowercase(),
            version: None,
            quality: 1000,
        };
        for parameter in parts {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let value = value.trim().trim_matches('"');
            match &*name.trim().to_ascii_lowercase() {
                "q" => range.quality = quality(value)?,
                "version" => range.version = Some(value.to_owned()),
                _ => {}
            }
        }
        Some(range)
    }

    /// Returns how closely the range describes the format, or `None` if it does not include the format.
    fn specificity(&self, format: Format) -> Option<u8> {
        let (main, sub, version) = format.media_type();
        match (&*self.main, &*self.sub, self.version.as_deref()) {
            ("*", "*", _) => Some(0),
            (of_range, "*", _) if of_range == main => Some(1),
            (of_range, of_sub, requested) if of_range == main && of_sub == sub => match requested {
                None => Some(2),
                Some(requested) if requested == version => Some(3),
                Some(_) => None,
            },
            _ => None,
        }
    }
}

/// Reads a weight from 0 to 1 with up to three decimals, in thousandths.
fn quality(text: &str) -> Option<u16> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    if decimals.len() > 3 || !decimals.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let thousandths = format!("{decimals:0<3}").parse::<u16>().ok()?;
    match (whole, thousandths) {
        ("0", _) => Some(thousandths),
        ("1", 0) => Some(1000),
        _ => None,
    }
}

/// Splits at `separator` outside of quoted strings.
fn elements(text: &str, separator: char) -> Vec<&str> {
    let mut is_quoted = false;
    let is_separator = |c: char| {
        is_quoted ^= c == '"';
        c == separator && !is_quoted
    };
    text.split(is_separator).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_header_selects_format() {
        const PROMETHEUS: &str = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                                  text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        const PROMETHEUS_3: &str = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                                    application/openmetrics-text;version=0.0.1;q=0.5,\
                                    text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        for (header, expected) in [
            ("", Format::Text),
            ("*/*", Format::Text),
            ("text/plain;version=0.0.4", Format::Text),
            ("application/openmetrics-text", Format::OpenMetrics),
            ("Application/OpenMetrics-Text; Version=\"1.0.0\"; charset=utf-8", Format::OpenMetrics),
            ("application/openmetrics-text;version=0.0.1", Format::Text),
            ("application/openmetrics-text;version=2.0.0;q=1,text/plain;q=0.1", Format::Text),
            ("application/openmetrics-text;q=0.5,text/plain;q=0.5", Format::Text),
            ("application/openmetrics-text;q=0.501,text/plain;q=0.5", Format::OpenMetrics),
            ("application/openmetrics-text;q=0", Format::Text),
            ("text/plain;q=0,*/*;q=0.1", Format::OpenMetrics),
            ("application/*,text/*;q=0.9", Format::OpenMetrics),
            ("application/openmetrics-text;q=2", Format::Text),
            ("application/openmetrics-text;q=0.0001,text/plain;q=0", Format::Text),
            ("application/openmetrics-text;a=\",;q=0\";q=0.2,text/html", Format::OpenMetrics),
            ("application/json", Format::Text),
            (";;,,//,\"", Format::Text),
            (PROMETHEUS, Format::OpenMetrics),
            (PROMETHEUS_3, Format::OpenMetrics),
        ] {
            assert_eq!(Format::from_accept(header), expected, "{header}");
        }
    }

    #[test]
    fn families_are_written_in_both_formats() {
        let mut families = Families::default();
        families.counter("a", "Has a \\ and a \"", [([("x", "1\n\"\\".to_owned())], 7_u64)]);
        families.gauge("b", "Bytes", [([], 0.5)]);
        families.gauge::<0, u64>("c", "Without a sample", []);
        let sample = "a_total{x=\"1\\\\n\\\"\\\\\"} 7\n";
        assert_eq!(
            Format::Text.encode(&families),
            format!(
                "# HELP a_total Has a \\\\ and a \"\n# TYPE a_total counter\n{sample}# HELP b Bytes\n# TYPE b gauge\nb 0.5\n"
            )
        );
        assert_eq!(
            Format::OpenMetrics.encode(&families),
            format!(
                "# HELP a Has a \\\\ and a \\\"\n# TYPE a counter\n{sample}# HELP b Bytes\n# TYPE b gauge\nb 0.5\n# EOF\n"
            )
        );
    }
}
