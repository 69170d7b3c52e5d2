//! What a driver sees of a device, whatever bus it is on.

use std::error::Error as StdError;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::{ActivateError, RestoreError};

/// Called with a device's first guest fault, on the device's thread or on that
/// which writes its registers. Must not block.
pub type Faulted = Box<dyn Fn(&dyn StdError) + Send + Sync>;

/// A device's registers.
///
/// The owner routes the guest's accesses here, one at a time: a lock around
/// each transport. [`write`](Self::write) may block while a device that is
/// reset finishes what it has begun.
pub trait Transport: Send {
    /// Reads registers or the device's configuration space, at an offset into
    /// this transport's range. Always fills `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes them. What makes no sense is ignored and counted.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// One event for each queue, in their order, each of which tells the device
    /// that the driver has notified it. A `KVM_IOEVENTFD` on the notify
    /// register with the queue's index as datamatch spares the exit to user
    /// space; a notification through [`write`](Self::write) works as well.
    /// They live as long as the transport.
    fn queue_events(&self) -> &[EventFd];

    /// Stops the device, so that neither guest memory nor queues are touched
    /// until [`resume`](Self::resume). What has been taken from the queues is
    /// finished first. Does nothing when the device does not serve.
    fn pause(&mut self);

    /// Goes on after [`pause`](Self::pause) or [`restore`](Self::restore).
    fn resume(&mut self);

    /// State of transport, queues and device.
    ///
    /// # Errors
    /// When the device has not been paused.
    fn save(&self) -> Result<TransportState, TransportError>;

    /// Takes up a state that [`save`](Self::save) made; [`resume`](Self::resume)
    /// then starts the device. The transport must not have been used yet.
    ///
    /// # Errors
    /// When the state is of another version or device, or does not fit guest
    /// memory.
    fn restore(&mut self, state: &TransportState) -> Result<(), TransportError>;

    /// How often the driver did what it must not, with the registers or with
    /// the queues, since the transport was made.
    fn guest_faults(&self) -> u64;

    /// Why the host could not start the device when the driver last asked for
    /// it; the driver sees no more of it than `DEVICE_NEEDS_RESET`. A fault of
    /// the driver is counted instead.
    fn start_error(&self) -> Option<&ActivateError>;
}

/// A saved transport: plain data. Nothing in it is trusted when it is restored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// [`TransportState::VERSION`] of the writer.
    pub version: u32,
    /// Device type (virtio 1.2 section 5), 0 for an empty slot.
    pub device_type: u32,
    /// Device status (section 2.1).
    pub status: u8,
    /// Feature bits that the driver has accepted.
    pub driver_features: u64,
    /// Which 32 of the device's feature bits the driver reads.
    pub device_features_select: u32,
    /// Which 32 of its own feature bits the driver writes.
    pub driver_features_select: u32,
    /// Which queue the queue registers are about.
    pub queue_select: u32,
    /// Interrupt status register.
    pub interrupt_status: u32,
    /// Generation of the configuration space.
    pub config_generation: u32,
    /// The queues, in their order.
    pub queues: Vec<QueueState>,
    /// What the device itself saved.
    pub device: Vec<u8>,
}

impl TransportState {
    /// Version of this structure.
    pub const VERSION: u32 = 1;
}

/// A saved queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Entries, as the driver chose.
    pub size: u16,
    /// The driver has finished its set-up.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest physical address of the available ring.
    pub available_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
    /// Next entry of the available ring that the device takes.
    pub next_available: u16,
    /// Next entry of the used ring that the device fills.
    pub next_used: u16,
}

/// Why a transport cannot be made, saved or restored.
#[derive(Debug, Error)]
pub enum TransportError {
    /// No event descriptor for a queue's notification.
    #[error("cannot make an event for queue {queue}")]
    QueueEvent {
        /// Index of the queue.
        queue: usize,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A device that asks for a queue no transport can have.
    #[error("queue {queue} of {size} entries: need a power of two up to 32768")]
    QueueSize {
        /// Index of the queue.
        queue: usize,
        /// As the device asks.
        size: u16,
    },
    /// The device still serves.
    #[error("device type {device_type} still runs: pause it before its state is saved")]
    Running {
        /// Device type.
        device_type: u32,
    },
    /// A state of another version.
    #[error(
        "saved transport of version {version}: this build reads version {}",
        TransportState::VERSION
    )]
    Version {
        /// As saved.
        version: u32,
    },
    /// A state of another device.
    #[error("saved state is of device type {saved}, but the slot holds type {present}")]
    DeviceType {
        /// As saved.
        saved: u32,
        /// In this slot.
        present: u32,
    },
    /// A state that no run of this transport can lead to.
    #[error("saved state of device type {device_type} contradicts itself: {field}")]
    Contradiction {
        /// Device type.
        device_type: u32,
        /// What does not fit.
        field: &'static str,
    },
    /// The device refuses its part.
    #[error("cannot restore device type {device_type}")]
    Device {
        /// Device type.
        device_type: u32,
        /// Why.
        #[source]
        source: RestoreError,
    },
}
