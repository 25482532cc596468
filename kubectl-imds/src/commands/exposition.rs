//! Text format of Prometheus: the samples of the agent's metrics.

/// A sample with its labels.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample<'t> {
    pub(super) name: &'t str,
    labels: Vec<(&'t str, String)>,
    pub(super) value: f64,
}

impl Sample<'_> {
    /// Returns the value of a label; empty if the sample does not have it.
    pub(super) fn label(&self, name: &str) -> &str {
        self.labels.iter().find(|(label, _)| *label == name).map_or("", |(_, value)| value)
    }
}

/// Returns the samples of a text. Lines that are no samples are skipped.
pub(super) fn samples(text: &str) -> impl Iterator<Item = Sample<'_>> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(sample)
}

fn sample(line: &str) -> Option<Sample<'_>> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at_checked(end)?;
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(labels) => parse_labels(labels)?,
        None => (Vec::new(), rest),
    };
    let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Sample { name, labels, value })
}

type Labels<'t> = Vec<(&'t str, String)>;

/// Parses labels up to the closing brace. Returns them and the rest of the line.
fn parse_labels(mut text: &str) -> Option<(Labels<'_>, &str)> {
    let mut labels = Vec::new();
    loop {
        text = text.trim_start_matches([',', ' ']);
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = rest.char_indices();
        loop {
            match chars.next()? {
                (end, '"') => {
                    text = rest.get(end + 1..)?;
                    break;
                }
                (_, '\\') => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    escaped => value.push(escaped),
                },
                (_, char) => value.push(char),
            }
        }
        labels.push((name, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_parsed() {
        let text = "# HELP a b\na 1\nb{x=\"1\",y=\"a\\\"},\\\\\\n\"} 2.5 1700000000\n\nc{} +Inf\nbroken{x=\"1\nd x\n";
        let parsed: Vec<_> = samples(text).collect();
        let names: Vec<_> = parsed.iter().map(|sample| (sample.name, sample.value)).collect();
        assert_eq!(names, [("a", 1.0), ("b", 2.5), ("c", f64::INFINITY)]);
        assert_eq!((parsed[1].label("x"), parsed[1].label("y")), ("1", "a\"},\\\n"));
        assert_eq!(parsed[1].label("z"), "");
    }
}
