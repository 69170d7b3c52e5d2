//! Virtio devices and the few legacy ones. None knows of KVM, so that each is
//! tried and fuzzed without it.
//!
//! # Virtio
//! [`Rng`], [`Vsock`], [`FileSystem`], [`Balloon`], [`Mem`] and [`Net`] are [`vmm_virtio::VirtioDevice`]s,
//! put on the bus by `vmm_virtio::MmioTransport::try_new`. Each serves on one
//! thread of its own (`rng`, `vsock`, `fs-TAG`, `balloon`, `mem`, `net`) from the driver's `DRIVER_OK`
//! until it is paused or reset. What happens to them later is told through
//! callbacks, which are called on those threads and must not block.
//!
//! # Legacy
//! [`Serial`], [`Pvpanic`], [`AcpiPm`] and [`IoApic`] are register models:
//! `read` and `write` at an offset into their range, on the vCPU's thread.
//! What the guest asked for is returned, and the caller acts on it. [`ramoops`]
//! reads what the guest's kernel leaves in its memory.
//!
//! With the feature `stepped` three of them can be had without their threads, a
//! step at a time, for fuzz targets.
//!
//! Every virtio device is laid out the same: `mod.rs` (the device and its
//! configuration), `worker.rs` (the thread that serves the queues), `state.rs`
//! (what is saved), `tests.rs`, and beside them what the device is about.

mod acpi_pm;
mod balloon;
mod config_space;
mod discard;
mod event_loop;
mod fs;
#[cfg(test)]
mod hostile;
mod ioapic;
mod mem;
mod net;
mod pvpanic;
pub mod ramoops;
mod rng;
mod saved;
mod serial;
#[cfg(feature = "stepped")]
pub mod stepped;
mod vsock;

pub use acpi_pm::{AcpiPm, SleepRequest};
pub use balloon::Balloon;
pub use fs::{FileSystem, FileSystemConfig, FileSystemError, ServerFailed};
pub use ioapic::{IoApic, IoApicState, MsiRoute};
pub use mem::{Mem, MemConfig, MemError, MemSize, TooMuch};
pub use net::{Net, NetConfig, NetError};
pub use pvpanic::{GuestPanic, Pvpanic};
pub use rng::Rng;
pub use serial::{Serial, SerialState};
pub use vsock::{HOST_CID, READY_PORT, Vsock, VsockConfig};
