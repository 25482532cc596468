//! How much of the longest tests is done, and how long is waited for what has to come.

use std::{env, sync::LazyLock, time::Duration};

/// Names how many times less is done than usual, for machines that are emulated.
pub const EFFORT: &str = "IMDS_TEST_DIVISOR";

static DIVISOR: LazyLock<u32> = LazyLock::new(|| {
    let divisor = env::var(EFFORT).map_or(1, |divisor| divisor.parse().expect("a number"));
    assert_ne!(divisor, 0, "{EFFORT}");
    divisor
});

/// `count` of anything that a test does over and over, or fewer where [`EFFORT`] says so, but some.
///
/// # Panics
///
/// Where that is no positive number.
#[must_use]
pub fn effort(count: u32) -> u32 {
    (count / *DIVISOR).max(1)
}

/// How long to wait for what has to come: longer where less is done, as an emulated machine has one processor for a flood
/// and for an agent that starts meanwhile.
pub(crate) fn patience(deadline: Duration) -> Duration {
    if *DIVISOR == 1 { deadline } else { deadline * 6 }
}
