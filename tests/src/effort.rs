//! Scale of the longest tests, and time limits that follow it.

use std::{env, sync::LazyLock, time::Duration};

/// Environment variable with the divisor of repetitions, for emulated machines.
pub const EFFORT: &str = "IMDS_TEST_DIVISOR";

static DIVISOR: LazyLock<u32> = LazyLock::new(|| {
    let divisor = env::var(EFFORT).map_or(1, |divisor| divisor.parse().expect("a number"));
    assert_ne!(divisor, 0, "{EFFORT}");
    divisor
});

/// Returns `count` divided by [`EFFORT`], at least 1.
///
/// # Panics
///
/// Panics if the variable is not a positive number.
#[must_use]
pub fn effort(count: u32) -> u32 {
    (count / *DIVISOR).max(1)
}

/// Returns the time limit scaled for this machine. An emulated machine needs more time because one CPU runs the flood
/// and the starting agent.
pub(crate) fn patience(deadline: Duration) -> Duration {
    if *DIVISOR == 1 { deadline } else { deadline * 6 }
}
