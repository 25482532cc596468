//! A stop flag for background threads of a test.

use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that tells threads to stop. A guard sets it also if the test panics; otherwise the test would wait forever
/// for its threads.
#[derive(Debug, Default)]
pub struct Over(AtomicBool);

impl Over {
    /// Reports whether threads must stop.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Returns a guard that sets the flag when it is dropped.
    #[must_use]
    pub fn when_dropped(&self) -> impl Drop {
        Tell(self)
    }
}

struct Tell<'o>(&'o Over);

impl Drop for Tell<'_> {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}
