//! The thread that takes back what is reported.

use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_virtio::{ActivateError, Activation, ActiveQueue, Chain, Interrupt, QueueError};

use super::{DEVICE, REPORTING};
use crate::discard::discard;
use crate::event_loop::{Events, Worker};

pub(super) struct Service {
    pub(super) queues: Vec<ActiveQueue>,
    memory: GuestMemoryMmap,
    interrupt: Arc<dyn Interrupt>,
}

impl Service {
    pub(super) fn spawn(activation: Activation) -> Result<Worker<Self>, ActivateError> {
        let service = Self::new(activation);
        Worker::spawn("balloon", service, Self::prepare, Self::serve).map_err(|source| {
            ActivateError::Host {
                device: DEVICE.to_owned(),
                source,
            }
        })
    }

    /// A driver that does not report sets up fewer queues.
    pub(super) fn new(activation: Activation) -> Self {
        Self {
            queues: activation.queues,
            memory: activation.memory,
            interrupt: activation.interrupt,
        }
    }

    fn prepare(&mut self, events: &Events) -> io::Result<()> {
        for (token, queue) in (0..).zip(&self.queues) {
            events.watch_event(&queue.notified, token)?;
        }
        Ok(())
    }

    fn serve(&mut self, events: &Events) {
        loop {
            if let Err(fault) = self.answer_all(events) {
                self.interrupt.guest_fault(&fault);
                events.wait_for_stop();
                return;
            }
            match events.wait(None, |_| ()) {
                Ok(true) => {}
                Ok(false) => return,
                // The guest keeps the memory that it has: no reason to end it.
                Err(_) => {
                    self.interrupt.needs_reset();
                    return;
                }
            }
        }
    }

    pub(super) fn answer_all(&mut self, events: &Events) -> Result<(), QueueError> {
        for queue in &mut self.queues {
            let _ = queue.notified.read();
            answer(queue, &self.memory, self.interrupt.as_ref(), events)?;
        }
        Ok(())
    }
}

fn answer(
    queue: &mut ActiveQueue,
    memory: &GuestMemoryMmap,
    interrupt: &dyn Interrupt,
    events: &Events,
) -> Result<(), QueueError> {
    loop {
        while let Some(chain) = queue.pop(memory)? {
            if queue.index == REPORTING {
                take_back(&chain, memory);
            }
            queue.complete(memory, chain.head, 0)?;
            queue.signal(memory, interrupt)?;
            if events.is_stopping() {
                return Ok(());
            }
        }
        if !queue.listen(memory)? {
            return Ok(());
        }
    }
}

/// Each buffer is a stretch of free pages, which the guest leaves alone until its
/// report is answered (section 5.5.6.8).
fn take_back(chain: &Chain, memory: &GuestMemoryMmap) {
    for (address, bytes) in chain.writable.ranges() {
        // What the host does not take stays the guest's, and is as good.
        let _ = discard(memory, address.0, bytes as usize);
    }
}
