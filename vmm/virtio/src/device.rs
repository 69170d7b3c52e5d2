//! What every virtio device is to its transport.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use crate::ActiveQueue;

/// A virtio device behind some transport.
///
/// The transport owns the status register, feature negotiation and the queues'
/// set-up; the device sees only a finished [`Activation`]. A device never
/// trusts what it reads from guest memory, and never panics on it: a fault of
/// the guest it tells through [`Interrupt::guest_fault`], and goes idle.
pub trait VirtioDevice: Send {
    /// Device type (virtio 1.2 section 5).
    fn device_type(&self) -> u32;

    /// Largest size of each queue, in the order of the device's section in the
    /// specification. Each is a power of two.
    fn queue_max_sizes(&self) -> &[u16];

    /// Feature bits that the device offers, without those of the transport
    /// (`VIRTIO_F_VERSION_1`), which the transport adds.
    fn features(&self) -> u64;

    /// Reads the device's configuration space. What lies beyond it reads as
    /// zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space. What cannot be written is left
    /// as it is.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Starts to serve the queues: the driver has set `DRIVER_OK`. Returns at
    /// once; the work is done on the device's own thread.
    ///
    /// # Errors
    /// When the driver left out what the device needs, or the host lacks it.
    /// The transport then sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops serving, and gives back the queues with their positions. What the
    /// device has taken from them is finished first. The device keeps its own
    /// state; [`activate`](Self::activate) goes on from there. Empty when the
    /// device does not serve.
    fn pause(&mut self) -> Vec<ActiveQueue>;

    /// Stops serving and forgets what the driver negotiated. When it returns,
    /// no thread of the device touches guest memory or the queues.
    fn reset(&mut self);

    /// The device's own state, encoded by it, without the queues', which are
    /// the transport's. Called only while the device does not serve.
    fn save(&self) -> Vec<u8>;

    /// Takes up a state that [`save`](Self::save) made.
    ///
    /// # Errors
    /// When it is not a state of this device and version.
    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError>;
}

/// What a device needs to serve.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// Feature bits that both sides agreed on.
    pub features: u64,
    /// The queues that the driver made ready, in order.
    pub queues: Vec<ActiveQueue>,
    /// How the device tells the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// How a device tells its driver: mmio has one line for all queues, PCI a
/// vector for each.
pub trait Interrupt: Send + Sync {
    /// Used buffers are in the ring of this queue.
    fn used_buffers(&self, queue: u16);
    /// The configuration space has changed.
    fn config_changed(&self);
    /// The device met an error that only a reset mends (virtio 1.2 section
    /// 2.1.2, `DEVICE_NEEDS_RESET`).
    fn needs_reset(&self);
    /// The driver broke the device's protocol: that is counted, and the device
    /// [needs a reset](Self::needs_reset).
    fn guest_fault(&self, fault: &dyn StdError);
}

/// A device that cannot start.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The guest's fault: the driver left out queues that the device needs.
    #[error("{device} cannot start: the driver did not set up all its queues")]
    Queues {
        /// Which device, as in "file system share".
        device: String,
    },
    /// The host's fault: it lacks what the device needs.
    #[error("{device} cannot start")]
    Host {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A state that is not this device's.
#[derive(Debug, Error)]
#[error("saved state does not fit {device}: {reason}")]
pub struct RestoreError {
    /// Which device.
    pub device: String,
    /// What is wrong with it.
    pub reason: String,
}
