//! Virtqueues, the device trait and the transports: no KVM, and no I/O on the
//! host but event descriptors.
//!
//! Three layers, each of which knows only the one below:
//! - [`Transport`]: what the driver sees of a device. [`MmioTransport`] owns
//!   the status register, feature negotiation and the set-up of queues;
//!   [`EmptySlot`] is an address range that has no device yet.
//! - [`VirtioDevice`]: what a device is to its transport. It gets finished
//!   queues in an [`Activation`], and gives them back when it is paused.
//! - [`ActiveQueue`] and [`Chain`]: how a device takes requests. Every
//!   descriptor is read once and checked before a device sees it.
//!
//! Whatever the guest does is answered by ignoring and counting it
//! ([`Transport::guest_faults`]) or by `DEVICE_NEEDS_RESET`, never by a panic.
#![forbid(unsafe_code)]

mod chain;
mod device;
mod interrupt;
mod mmio;
#[cfg(any(test, feature = "mock-driver"))]
pub mod mock;
mod queue;
mod transport;

pub use chain::{Chain, ChainError, Segments};
pub use device::{ActivateError, Activation, Interrupt, RestoreError, VirtioDevice};
pub use mmio::{EmptySlot, MMIO_BYTES, MmioTransport};
pub use queue::{ActiveQueue, QueueError};
pub use transport::{Faulted, QueueState, Transport, TransportError, TransportState};
