//! Suggestions for misspelled keys and values.

/// Longest word that is compared.
const MAX_LENGTH: usize = 40;

/// Returns `; did you mean "mode"?`, or nothing if no candidate is similar.
pub(super) fn did_you_mean<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> String {
    nearest(word, candidates).map(|best| format!("; did you mean \"{best}\"?")).unwrap_or_default()
}

/// Returns a suggestion for an error message of serde, which quotes first the unknown word and then the known ones with
/// backticks.
pub(super) fn did_you_mean_of(message: &str) -> String {
    if !message.starts_with("unknown field `") && !message.starts_with("unknown variant `") {
        return String::new();
    }
    let mut quoted = message.split('`').skip(1).step_by(2);
    let Some(word) = quoted.next() else { return String::new() };
    did_you_mean(word, quoted)
}

/// Returns the most similar candidate, if at most a third of its characters differ.
fn nearest<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    let word: String = word.chars().take(MAX_LENGTH).collect();
    let distances =
        candidates.into_iter().map(|candidate| (strsim::osa_distance(&word, candidate), candidate));
    let (distance, best) = distances.min_by_key(|(distance, _)| *distance)?;
    (distance <= best.chars().count().div_ceil(3)).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similar_words_are_suggested() {
        let keys = ["mode", "on_deny", "provider", "interfaces", "exempt"];
        for (word, expected) in [
            ("modee", Some("mode")),
            ("Mode", Some("mode")),
            ("omde", Some("mode")),
            ("interface", Some("interfaces")),
            ("provder", Some("provider")),
            ("exmept", Some("exempt")),
            ("cluster", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, keys), expected, "{word}");
        }
        assert_eq!(nearest(&"x".repeat(100_000), keys), None);
        assert_eq!(nearest("a", []), None);
    }

    #[test]
    fn serde_messages_are_parsed() {
        for (message, expected) in [
            ("unknown field `modee`, expected one of `mode`, `on_deny`", "; did you mean \"mode\"?"),
            ("unknown field `ports`, expected `name` or `address`", ""),
            ("unknown variant `of`, expected one of `enforce`, `audit`, `off`", "; did you mean \"off\"?"),
            ("unknown field `x`, there are no fields", ""),
            ("invalid type: integer `3`", ""),
        ] {
            assert_eq!(did_you_mean_of(message), expected, "{message}");
        }
    }
}
