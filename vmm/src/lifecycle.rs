//! What becomes of the guest: told by the vCPU threads and the devices, heard
//! by the main thread.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vmm_config::control::ExitReason;

use crate::log::describe;

/// Collects what is told. Of reasons to end, the first counts: later ones are
/// consequences.
pub struct Lifecycle {
    state: Mutex<State>,
    event: EventFd,
}

/// What has been told so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The guest's agent listens.
    pub guest_ready: bool,
    /// The guest's kernel says that it panicked; it usually goes on to reset.
    pub panicked: bool,
    /// How much of the memory that can be plugged is.
    pub plugged_bytes: u64,
    /// Why the VM has ended, once it has.
    pub ended: Option<ExitReason>,
}

impl Lifecycle {
    /// Nothing told yet.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn try_new() -> io::Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            event: EventFd::from_value_and_flags(
                0,
                EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
            )?,
        })
    }

    /// The guest's agent listens.
    pub fn report_guest_ready(&self) {
        self.report(|state| state.guest_ready = true);
    }

    /// The guest's kernel has panicked and is about to end.
    pub fn report_panic(&self) {
        self.report(|state| state.panicked = true);
    }

    /// The guest has so much of the memory that can be plugged.
    pub fn report_plugged(&self, bytes: u64) {
        self.report(|state| state.plugged_bytes = bytes);
    }

    /// The VM has ended for this reason. A reset after a panic is the panic.
    pub fn report_end(&self, reason: ExitReason) {
        self.report(|state| {
            let reason = match reason {
                ExitReason::Reset if state.panicked => ExitReason::GuestPanic,
                reason => reason,
            };
            state.ended.get_or_insert(reason);
        });
    }

    /// The VM cannot go on without this device, as in "socket device".
    pub fn report_device_failure(&self, device: &str, error: &dyn Error) {
        self.report_end(ExitReason::DeviceFailed {
            device: device.to_owned(),
            error: describe(error),
        });
    }

    /// The VM has ended: no vCPU should go on.
    pub fn is_ended(&self) -> bool {
        self.lock().ended.is_some()
    }

    /// What has been told. The event is no longer readable until there is
    /// more.
    pub fn state(&self) -> State {
        // Fails when nothing was told since: the event only says that there is news.
        let _ = self.event.read();
        self.lock().clone()
    }

    fn report(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        // Fails only when the counter is full, and then it is readable anyhow.
        let _ = self.event.write(1);
    }

    /// Plain values, valid also when a thread panicked over them.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Readable when there is news.
impl AsFd for Lifecycle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_end_twice_keeps_the_first() {
        let lifecycle = Lifecycle::try_new().expect("event");
        lifecycle.report_end(ExitReason::PowerOff);
        lifecycle.report_end(ExitReason::TripleFault);
        assert_eq!(lifecycle.state().ended, Some(ExitReason::PowerOff));
    }

    #[test]
    fn report_reset_after_panic_is_the_panic() {
        let lifecycle = Lifecycle::try_new().expect("event");
        lifecycle.report_panic();
        assert_eq!(lifecycle.state().ended, None);
        lifecycle.report_end(ExitReason::Reset);
        assert_eq!(lifecycle.state().ended, Some(ExitReason::GuestPanic));
    }
}
