//! Memory device (virtio 1.2 section 5.15): a region of guest memory, blocks of
//! which are plugged and unplugged while the guest runs.
//!
//! The device says how much of the region the guest is to have; the guest plugs and
//! unplugs blocks by requests until it has that, as it can. Memory that it unplugs
//! goes back to the host at once.
//!
//! All of the region is mapped for the guest from the start. One that writes to blocks
//! that it has not plugged gets memory for it, which counts as all its memory does:
//! the pod's cgroup bounds it. That costs nobody else anything, and so costs no
//! change of mappings when honest guests plug and unplug.

mod blocks;
mod request;
mod state;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_virtio::{ActivateError, Activation, ActiveQueue, Interrupt, RestoreError, VirtioDevice};

use crate::event_loop::Worker;
use blocks::Blocks;
use worker::Service;

const DEVICE: &str = "memory device";

/// What a memory device needs.
pub struct MemConfig {
    /// First address of the region, a multiple of [`Mem::BLOCK_BYTES`]. All of the region is
    /// guest memory.
    pub start: u64,
    /// Its bytes, likewise.
    pub bytes: u64,
    /// Called on the device's thread with the bytes that are plugged, when they
    /// have changed. Must not block.
    pub changed: Arc<dyn Fn(u64) + Send + Sync>,
}

/// A region that no device can have.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("a region of {bytes:#x} bytes at {start:#x} is not made of whole blocks")]
pub struct MemError {
    start: u64,
    bytes: u64,
}

/// More than the region holds.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("{wanted} bytes are more than the {most} that the memory device has")]
pub struct TooMuch {
    wanted: u64,
    most: u64,
}

/// Asks for more or less of the region, while the device is the transport's. Clones
/// are of the same device.
#[derive(Clone)]
pub struct MemSize(Arc<Shared>);

impl MemSize {
    /// Asks the guest to have this many bytes of the region, and returns them rounded up to
    /// whole blocks. The guest complies when it can.
    ///
    /// # Errors
    /// When the region has fewer.
    pub fn request(&self, bytes: u64) -> Result<u64, TooMuch> {
        let requested = {
            let mut blocks = self.0.blocks();
            let most = blocks.region_bytes();
            let too_much = TooMuch {
                wanted: bytes,
                most,
            };
            blocks.request(bytes).ok_or(too_much)?
        };
        if let Some(interrupt) = &*self.0.interrupt() {
            interrupt.config_changed();
        }
        Ok(requested)
    }
}

/// What the device, its thread and its [`MemSize`] have in common.
struct Shared {
    blocks: Mutex<Blocks>,
    /// While the device serves.
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    changed: Arc<dyn Fn(u64) + Send + Sync>,
}

impl Shared {
    /// Every change is of one call, so that a panic leaves none half done.
    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interrupt(&self) -> MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The memory device.
pub struct Mem {
    shared: Arc<Shared>,
    worker: Option<Worker<Service>>,
}

impl Mem {
    /// The smallest unit that is plugged: the largest that Linux' page allocator
    /// handles as one, so that the guest need not round again.
    pub const BLOCK_BYTES: u64 = 4 << 20;
    /// Entries of its one queue.
    pub const QUEUE_SIZE: u16 = 64;

    /// A device that does not serve yet, of a region of which nothing is plugged.
    ///
    /// # Errors
    /// When the region is not made of whole blocks.
    pub fn try_new(config: MemConfig) -> Result<Self, MemError> {
        let MemConfig {
            start,
            bytes,
            changed,
        } = config;
        let whole = |number: u64| number.is_multiple_of(Self::BLOCK_BYTES);
        if !whole(start) || !whole(bytes) || start.checked_add(bytes).is_none() {
            return Err(MemError { start, bytes });
        }
        Ok(Self {
            shared: Arc::new(Shared {
                blocks: Mutex::new(Blocks::new(start, bytes, Self::BLOCK_BYTES)),
                interrupt: Mutex::default(),
                changed,
            }),
            worker: None,
        })
    }

    /// To ask for more or less of the region.
    pub fn size(&self) -> MemSize {
        MemSize(Arc::clone(&self.shared))
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[Self::QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// Section 5.15.4: block size, node, address, sizes of the region, of its usable part,
    /// of what is plugged and of what is requested.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let blocks = self.shared.blocks();
        let fields = [
            blocks.block_bytes(),
            0,
            blocks.start(),
            blocks.region_bytes(),
            blocks.region_bytes(),
            blocks.plugged_bytes(),
            blocks.requested_bytes(),
        ];
        let space = fields.map(u64::to_le_bytes);
        crate::config_space::read(space.as_flattened(), offset, data);
    }

    /// All of it is the device's to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&activation.interrupt);
        let worker = Service::spawn(Arc::clone(&self.shared), activation)?;
        self.worker = Some(worker);
        *self.shared.interrupt() = Some(interrupt);
        Ok(())
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        *self.shared.interrupt() = None;
        let service = self.worker.take().and_then(Worker::stop);
        service.map(|service| service.queue).into_iter().collect()
    }

    /// What is plugged stays plugged (section 5.15.5).
    fn reset(&mut self) {
        self.pause();
    }

    fn save(&self) -> Vec<u8> {
        state::save(&self.shared.blocks())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let mut blocks = self.shared.blocks();
        *blocks = state::restore(&blocks, state)?;
        Ok(())
    }
}
