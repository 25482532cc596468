//! A stop flag for background threads of a test.

use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that tells threads to stop. A guard sets it also if the test panics; otherwise the test would wait forever
/// for its threads.
#[derive(Debug, Default)]
pub struct StopFlag(AtomicBool);

impl StopFlag {
    /// Reports whether threads must stop.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Returns a guard that sets the flag when it is dropped.
    #[must_use]
    pub fn set_on_drop(&self) -> impl Drop {
        SetOnDrop(self)
    }
}

struct SetOnDrop<'f>(&'f StopFlag);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}
