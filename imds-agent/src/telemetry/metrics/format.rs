//! The text formats of Prometheus and their negotiation by the `Accept` header (RFC 9110, 12.5.1).

use std::fmt::{Display, Write as _};

use crate::escape::escape;

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Format {
    /// Prometheus text format, version 0.0.4.
    #[default]
    Text,
    /// `OpenMetrics` text format, version 1.0.
    OpenMetrics,
}

impl Format {
    /// Returns `OpenMetrics` if the header lists its version 1.0.0, as Prometheus does, else the Prometheus text format.
    pub(crate) fn from_accept(header: &str) -> Self {
        if header.split(',').any(includes_open_metrics) { Self::OpenMetrics } else { Self::Text }
    }

    pub(crate) const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Metrics of one scrape, written in a text format as they are added.
#[derive(Debug)]
pub(crate) struct Exposition {
    format: Format,
    text: String,
}

pub(crate) type Label<V> = (&'static str, V);

impl Exposition {
    pub(crate) const fn new(format: Format) -> Self {
        Self { format, text: String::new() }
    }

    /// Adds a counter without labels. Names of counters have no suffix `_total` here.
    pub(crate) fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.counters(name, help, [([] as [Label<&str>; 0], value)]);
    }

    pub(crate) fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.gauges(name, help, [([] as [Label<&str>; 0], value)]);
    }

    /// Adds counters with the same name, unless there are none.
    pub(crate) fn counters<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([Label<impl AsRef<str>>; N], impl Display)>,
    ) {
        self.add("counter", "_total", name, help, samples);
    }

    /// Adds gauges with the same name, unless there are none.
    pub(crate) fn gauges<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([Label<impl AsRef<str>>; N], impl Display)>,
    ) {
        self.add("gauge", "", name, help, samples);
    }

    /// Appends a family. The results of `writeln!` are ignored, because writing to a string does not fail.
    fn add<const N: usize>(
        &mut self,
        kind: &str,
        suffix: &str,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([Label<impl AsRef<str>>; N], impl Display)>,
    ) {
        let Self { format, text } = self;
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_some() {
            let is_open_metrics = *format == Format::OpenMetrics;
            // OpenMetrics names a family of counters without the suffix of its samples.
            let of_family = if is_open_metrics { "" } else { suffix };
            let _ok = writeln!(text, "# HELP {name}{of_family} {}", escaped(help, is_open_metrics));
            let _ok = writeln!(text, "# TYPE {name}{of_family} {kind}");
        }
        for (labels, value) in samples {
            let labels = labels
                .map(|(label, value)| format!("{label}=\"{}\"", escaped(&escape(value.as_ref()), true)));
            let labels = if N == 0 { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let _ok = writeln!(text, "{name}{suffix}{labels} {value}");
        }
    }

    pub(crate) fn finish(self) -> String {
        self.text + if self.format == Format::OpenMetrics { "# EOF\n" } else { "" }
    }
}

fn escaped(text: &str, has_quotes: bool) -> String {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    if has_quotes { text.replace('"', "\\\"") } else { text }
}

/// Reports whether a media range names `OpenMetrics` without another version and without the weight 0.
fn includes_open_metrics(range: &str) -> bool {
    let range = range.to_ascii_lowercase();
    let mut parts = range.split(';').map(str::trim);
    let is_allowed = |parameter: &str| match parameter.split_once('=') {
        Some(("version", version)) => version.trim_matches('"') == "1.0.0",
        Some(("q", weight)) => weight.parse::<f32>().is_ok_and(|weight| weight > 0.0),
        _ => true,
    };
    parts.next() == Some("application/openmetrics-text") && parts.all(is_allowed)
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
            ("application/openmetrics-text;q=0.5,text/plain", Format::OpenMetrics),
            ("application/openmetrics-text;q=0", Format::Text),
            ("application/openmetrics-text;q=0.0,text/plain", Format::Text),
            ("application/openmetrics-text;q=x", Format::Text),
            ("application/*", Format::Text),
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
        let encode = |format| {
            let mut exposition = Exposition::new(format);
            exposition.counters("a", "Has a \\ and a \"", [([("x", "1\n\"\\")], 7_u64)]);
            exposition.gauge("b", "Bytes", 0.5);
            exposition.gauges("c", "Without a sample", [] as [([Label<&str>; 0], u64); 0]);
            exposition.finish()
        };
        let sample = "a_total{x=\"1\\\\n\\\"\\\\\"} 7\n";
        assert_eq!(
            encode(Format::Text),
            format!(
                "# HELP a_total Has a \\\\ and a \"\n# TYPE a_total counter\n{sample}# HELP b Bytes\n# TYPE b gauge\nb 0.5\n"
            )
        );
        assert_eq!(
            encode(Format::OpenMetrics),
            format!(
                "# HELP a Has a \\\\ and a \\\"\n# TYPE a counter\n{sample}# HELP b Bytes\n# TYPE b gauge\nb 0.5\n# EOF\n"
            )
        );
    }
}
