//! Entropy device (virtio 1.2 section 5.4).

mod state;
#[cfg(test)]
mod tests;
mod worker;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_virtio::{ActivateError, Activation, ActiveQueue, RestoreError, VirtioDevice};

use crate::event_loop::Worker;
use worker::Service;

const DEVICE: &str = "entropy device";

/// Gives the guest random bytes of the host's kernel. It has no configuration
/// and, apart from its queue, no state.
#[derive(Default)]
pub struct Rng {
    worker: Option<Worker<Service>>,
}

impl Rng {
    /// Entries of its one queue.
    pub const QUEUE_SIZE: u16 = 64;

    /// A device that does not serve yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[Self::QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// There is none (section 5.4.4).
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
        service.map(|service| service.queue).into_iter().collect()
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
