//! Scale of the longest tests, and the time limits that follow from the scale.

use std::{env, sync::LazyLock, time::Duration};

/// Environment variable with the percentage of repetitions that the longest tests run, for emulated machines.
pub const SCALE: &str = "IMDS_TEST_SCALE";

static PERCENT: LazyLock<u32> = LazyLock::new(|| {
    let percent = env::var(SCALE).map_or(100, |percent| percent.parse().expect("a number"));
    assert!((1..=100).contains(&percent), "{SCALE} must be a percentage from 1 to 100");
    percent
});

/// Returns the percentage [`SCALE`] of `count`, at least 1.
///
/// # Panics
///
/// Panics if the variable is not a number from 1 to 100.
#[must_use]
pub fn scaled(count: u32) -> u32 {
    (count * *PERCENT / 100).max(1)
}

/// Returns the time limit scaled for this machine. An emulated machine needs more time because one CPU runs the flood
/// and the starting agent.
pub(crate) fn scaled_timeout(timeout: Duration) -> Duration {
    if *PERCENT == 100 { timeout } else { timeout * 6 }
}
