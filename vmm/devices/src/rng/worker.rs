//! The thread that fills the guest's buffers.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_virtio::{ActivateError, Activation, ActiveQueue, Interrupt, QueueError};

use super::DEVICE;
use crate::event_loop::{Events, Worker};

/// Most bytes for one request, whatever its buffer holds: a guest asks for a
/// few dozen at a time, and may not keep the host's generator busy for longer.
/// Section 5.4.6.2 lets the device fill a part.
pub(super) const MAX_REQUEST_BYTES: usize = 4096;

const QUEUE: u64 = 0;

pub(super) struct Service {
    pub(super) queue: ActiveQueue,
    memory: GuestMemoryMmap,
    interrupt: Arc<dyn Interrupt>,
}

impl Service {
    pub(super) fn spawn(activation: Activation) -> Result<Worker<Self>, ActivateError> {
        let service = Self::try_new(activation)?;
        let device = DEVICE.to_owned();
        Worker::spawn(
            "rng",
            service,
            |service, events| events.watch_event(&service.queue.notified, QUEUE),
            Self::serve,
        )
        .map_err(|source| ActivateError::Host { device, source })
    }

    pub(super) fn try_new(activation: Activation) -> Result<Self, ActivateError> {
        let device = DEVICE.to_owned();
        let Some(queue) = activation.queues.into_iter().next() else {
            return Err(ActivateError::Queues { device });
        };
        Ok(Self {
            queue,
            memory: activation.memory,
            interrupt: activation.interrupt,
        })
    }

    fn serve(&mut self, events: &Events) {
        loop {
            let _ = self.queue.notified.read();
            if let Err(fault) = self.fill_buffers(events) {
                self.interrupt.guest_fault(&fault);
                events.wait_for_stop();
                return;
            }
            match events.wait(None, |_| ()) {
                Ok(true) => {}
                Ok(false) => return,
                // The guest has a generator of its own: no reason to end it.
                Err(_) => {
                    self.interrupt.needs_reset();
                    return;
                }
            }
        }
    }

    pub(super) fn fill_buffers(&mut self, events: &Events) -> Result<(), QueueError> {
        loop {
            while let Some(chain) = self.queue.pop(&self.memory)? {
                let mut random = [0; MAX_REQUEST_BYTES];
                let length = chain.writable.len().min(MAX_REQUEST_BYTES);
                let random = &mut random[..length];
                // Without random bytes none are given: never others.
                let written = match getrandom::fill(random) {
                    Ok(()) if chain.writable.write_at(&self.memory, 0, random).is_ok() => length,
                    _ => 0,
                };
                self.queue
                    .complete(&self.memory, chain.head, written as u32)?;
                self.queue.signal(&self.memory, self.interrupt.as_ref())?;
                // A guest that asks as fast as it is served is no reason not
                // to stop.
                if events.is_stopping() {
                    return Ok(());
                }
            }
            if !self.queue.listen(&self.memory)? {
                return Ok(());
            }
        }
    }
}
