//! Balloon device (virtio 1.2 section 5.5), of which only the reporting of free pages is
//! used: what the guest's page allocator has no use for goes back to the host, and
//! comes again, zeroed, when the guest touches it.
//!
//! The balloon itself stays empty: the device asks for no pages. A driver that puts
//! some into it all the same is answered, and keeps them.

mod state;
#[cfg(test)]
mod tests;
mod worker;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_virtio::{ActivateError, Activation, ActiveQueue, RestoreError, VirtioDevice};

use crate::event_loop::Worker;
use worker::Service;

/// The driver reports free pages (section 5.5.3, `VIRTIO_BALLOON_F_PAGE_REPORTING`).
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

const DEVICE: &str = "balloon device";

/// Entries of the queues: inflate, deflate, reporting. Linux wants at least 32 of the last.
///
/// Section 5.5.2 numbers the queue of reports 4; but queues whose features are not
/// offered do not exist, and Linux counts those that do (`vm_find_vqs` of
/// `virtio_mmio.c`).
const QUEUE_SIZES: [u16; 3] = [64, 64, 64];
/// Which of them is that of reports.
const REPORTING: u16 = 2;

/// Takes back what the guest reports as free. It has no state of its own.
#[derive(Default)]
pub struct Balloon {
    worker: Option<Worker<Service>>,
}

impl Balloon {
    /// A device that does not serve yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_REPORTING
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// Section 5.5.4: no pages are wanted, and whatever the driver says it has, none are had.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker = Some(Service::spawn(activation)?);
        Ok(())
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        let service = self.worker.take().and_then(Worker::stop);
        service.map_or_else(Vec::new, |service| service.queues)
    }

    fn reset(&mut self) {
        self.pause();
    }

    fn save(&self) -> Vec<u8> {
        state::save()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        state::restore(state)
    }
}
