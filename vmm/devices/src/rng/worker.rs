//! The thread that fills the guest's buffers.

use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_virtio::{Activation, ActiveQueue, Interrupt, QueueError};

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
    pub(super) fn spawn(activation: Activation) -> io::Result<Worker<Self>> {
        let queue = activation
            .queues
            .into_iter()
            .next()
            .ok_or_else(|| io::Error::other("the driver set up no queue"))?;
        let service = Self {
            queue,
            memory: activation.memory,
            interrupt: activation.interrupt,
        };
        Worker::spawn(
            "rng",
            service,
            |service, events| events.watch_event(&service.queue.notified, QUEUE),
            Self::serve,
        )
    }

    fn serve(&mut self, events: &Events) {
        loop {
            let _ = self.queue.notified.read();
            if self.fill_buffers(events).is_err() {
                self.interrupt.needs_reset();
                events.wait_for_stop();
                return;
            }
            if !matches!(events.wait(None, |_| ()), Ok(true)) {
                return;
            }
        }
    }

    fn fill_buffers(&mut self, events: &Events) -> Result<(), QueueError> {
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
