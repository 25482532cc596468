//! How much of the longest tests is done.

use std::{env, sync::LazyLock};

/// Names how many times less is done than usual, for machines that are emulated.
pub const EFFORT: &str = "IMDS_TEST_DIVISOR";

/// `count` of anything that a test does over and over, or fewer where [`EFFORT`] says so, but some.
///
/// # Panics
///
/// Where that is no positive number.
#[must_use]
pub fn effort(count: u32) -> u32 {
    static DIVISOR: LazyLock<u32> = LazyLock::new(|| {
        let divisor = env::var(EFFORT).map_or(1, |divisor| divisor.parse().expect("a number"));
        assert_ne!(divisor, 0, "{EFFORT}");
        divisor
    });
    (count / *DIVISOR).max(1)
}
