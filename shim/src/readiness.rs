//! Waiting for a descriptor to become readable.
#![expect(
    unsafe_code,
    reason = "tokio leaves to its caller that a registered descriptor stays open"
)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor with the runtime, to be awaited until it is readable.
///
/// # Panics
/// Outside a tokio runtime.
pub fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    register(descriptor, Interest::READABLE)
}

/// Registers a file of procfs that tells of a change by `POLLPRI`, as
/// `/proc/self/mountinfo` (proc(5)), to be awaited until it does
/// ([`AsyncFd::ready`] with [`Interest::PRIORITY`]).
///
/// # Panics
/// Outside a tokio runtime.
pub fn changed(file: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    register(file, Interest::PRIORITY)
}

fn register(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor must stay open, and `as_raw_fd` must go on
    // returning it, while it is registered. An OwnedFd owns its descriptor
    // alone and always returns the same; the AsyncFd owns the OwnedFd and gives
    // out no way to replace or close it before it has taken back the
    // registration.
    unsafe { AsyncFd::register_with_interest(descriptor, interest) }.map_err(io::Error::from)
}
