//! Comparison of output that a document shows with real output, by table headers and first words.

use std::collections::BTreeSet;

/// First words that appear only on some machines.
const OPTIONAL: [&str; 1] = ["consequences"];

/// Returns the parts of the documented output that the real output lacks: headers of tables, and first words of lines.
/// Numbers, times and names of interfaces may differ.
pub(crate) fn missing(documented: &[String], printed: &str) -> Vec<String> {
    let printed_keys: BTreeSet<_> = printed.lines().filter_map(key).collect();
    let documented_keys: BTreeSet<_> = documented.iter().filter_map(|line| key(line)).collect();
    let is_missing = |key: &String| !printed_keys.contains(key) && !OPTIONAL.contains(&key.as_str());
    documented_keys.into_iter().filter(is_missing).collect()
}

/// Returns the part of a line that must be equal.
fn key(line: &str) -> Option<String> {
    let words: Vec<_> = line.split_whitespace().collect();
    let first = *words.first().filter(|word| **word != "…")?;
    if words.len() > 1 && words.iter().all(|word| is_column(word)) {
        return Some(words.join(" "));
    }
    let is_time = first.len() > 20 && first.ends_with('Z') && first.contains('T');
    if is_time {
        return Some(words.get(1..3)?.join(" "));
    }
    let first = first.trim_end_matches([':', ',']);
    Some(if first.contains(|char: char| char.is_ascii_digit()) { "#".to_owned() } else { first.to_owned() })
}

fn is_column(word: &str) -> bool {
    word.chars().all(|char| char.is_ascii_uppercase() || char == '_')
}

#[test]
fn differences_are_found() {
    let documented =
        [" NAME  INDEX", " lo    1", " veth3 2", "", "2026-11-23T15:04:05.123Z INFO  attached x"];
    let documented = documented.map(str::to_owned);
    let printed = "NAME INDEX\nlo 1\nveth99 7\n2026-01-01T00:00:00.000Z INFO  attached y\n";
    assert!(missing(&documented, printed).is_empty());
    assert_eq!(missing(&documented, &printed.replace("INDEX", "NUMBER")), ["NAME INDEX"]);
    assert_eq!(missing(&documented, &printed.replace("lo", "loopback")), ["lo"]);
    assert_eq!(missing(&documented, &printed.replace("attached", "added")), ["INFO attached"]);
}
