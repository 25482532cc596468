//! What other threads of a test do until it is over.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether it is: told on purpose, or by a test that fails meanwhile and would wait for the others else.
#[derive(Debug, Default)]
pub struct Over(AtomicBool);

impl Over {
    /// Whether others are to stop.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Tells it when what is returned is dropped.
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
