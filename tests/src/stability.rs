//! Growth of a quantity that is sampled repeatedly.

/// Returns the difference between the medians of the last and the middle third of the samples. The first third is the
/// warm-up. A fluctuating but stable quantity gives a small number for any duration. Returns `None` for fewer than six
/// samples.
#[must_use]
pub fn growth(values: &[u64]) -> Option<i64> {
    let third = values.len() / 3;
    let (before, last) = values.get(values.len().checked_sub(2 * third)?..)?.split_at(third);
    if third < 2 {
        return None;
    }
    Some(median(last)?.cast_signed().saturating_sub(median(before)?.cast_signed()))
}

/// Returns the median of the values.
#[must_use]
pub fn median(values: &[u64]) -> Option<u64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_differs_from_fluctuation() {
        let steady: Vec<_> = (0..300).map(|number| 1000 + number % 7).collect();
        assert_eq!(growth(&steady), Some(0));
        let growing: Vec<_> = (0..300).map(|number| 1000 + number).collect();
        assert_eq!(growth(&growing), Some(100));
        let shrinking: Vec<_> = growing.iter().copied().rev().collect();
        assert_eq!(growth(&shrinking), Some(-100));
    }

    #[test]
    fn warm_up_and_single_peak_are_ignored() {
        let mut values = vec![1000; 30];
        values[..10].fill(1);
        values[29] = 1_000_000;
        assert_eq!(growth(&values), Some(0));
    }

    #[test]
    fn few_samples_give_no_verdict() {
        assert_eq!(growth(&[]), None);
        assert_eq!(growth(&[1; 5]), None);
        assert_eq!(growth(&[1; 6]), Some(0));
    }
}
