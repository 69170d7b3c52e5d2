//! Whether there is still a tap.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Lost;
use super::tap::Tap;

/// The connection to the host's network: a tap, until that is gone.
pub(super) struct Link {
    tap: Option<Tap>,
    /// What the driver reads, on its own thread.
    up: Arc<AtomicBool>,
    lost: Lost,
}

impl Link {
    pub(super) fn new(tap: Tap, lost: Lost) -> Self {
        Self {
            tap: Some(tap),
            up: Arc::new(AtomicBool::new(true)),
            lost,
        }
    }

    pub(super) fn tap(&self) -> Option<&Tap> {
        self.tap.as_ref()
    }

    pub(super) fn up(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.up)
    }

    /// The tap is of no use any more: closes it, and tells the host's side.
    pub(super) fn lose(&mut self, error: io::Error) {
        if self.tap.take().is_some() {
            self.up.store(false, Ordering::Release);
            (self.lost)(error);
        }
    }
}
