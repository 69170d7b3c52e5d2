//! The thread that plugs and unplugs.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_virtio::{ActivateError, Activation, ActiveQueue, Chain, Interrupt, QueueError};

use super::blocks::{Blocks, Range, Refusal};
use super::request::{Named, REQUEST_BYTES, RESPONSE_BYTES, Request, Response};
use super::{DEVICE, Shared};
use crate::discard::discard;
use crate::event_loop::{Events, Worker};

const QUEUE: u64 = 0;

pub(super) struct Service {
    pub(super) queue: ActiveQueue,
    shared: Arc<Shared>,
    memory: GuestMemoryMmap,
    interrupt: Arc<dyn Interrupt>,
}

impl Service {
    pub(super) fn spawn(
        shared: Arc<Shared>,
        activation: Activation,
    ) -> Result<Worker<Self>, ActivateError> {
        let service = Self::try_new(shared, activation)?;
        Worker::spawn(
            "mem",
            service,
            |service, events| events.watch_event(&service.queue.notified, QUEUE),
            Self::serve,
        )
        .map_err(|source| ActivateError::Host {
            device: DEVICE.to_owned(),
            source,
        })
    }

    pub(super) fn try_new(
        shared: Arc<Shared>,
        activation: Activation,
    ) -> Result<Self, ActivateError> {
        let Some(queue) = activation.queues.into_iter().next() else {
            return Err(ActivateError::Queues {
                device: DEVICE.to_owned(),
            });
        };
        Ok(Self {
            queue,
            shared,
            memory: activation.memory,
            interrupt: activation.interrupt,
        })
    }

    fn serve(&mut self, events: &Events) {
        loop {
            let _ = self.queue.notified.read();
            if let Err(fault) = self.answer_requests(events) {
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

    pub(super) fn answer_requests(&mut self, events: &Events) -> Result<(), QueueError> {
        let before = self.shared.blocks().plugged_bytes();
        let answered = self.answer_all(events);
        let after = self.shared.blocks().plugged_bytes();
        if before != after {
            (self.shared.changed)(after);
        }
        answered
    }

    fn answer_all(&mut self, events: &Events) -> Result<(), QueueError> {
        loop {
            while let Some(chain) = self.queue.pop(&self.memory)? {
                let written = self.answer(&chain);
                self.queue.complete(&self.memory, chain.head, written)?;
                self.queue.signal(&self.memory, self.interrupt.as_ref())?;
                if events.is_stopping() {
                    return Ok(());
                }
            }
            if !self.queue.listen(&self.memory)? {
                return Ok(());
            }
        }
    }

    /// Does what one request asks for and returns the bytes of the answer: none, if
    /// there is no room for it, and then nothing was done.
    fn answer(&self, chain: &Chain) -> u32 {
        if chain.writable.len() < RESPONSE_BYTES {
            return 0;
        }
        let mut bytes = [0; REQUEST_BYTES];
        let read = chain.readable.read_at(&self.memory, 0, &mut bytes);
        let response = match (read, Request::decode(&bytes)) {
            (Ok(()), Some(request)) => self.perform(request),
            (Err(_), _) | (_, None) => Response::Error,
        };
        let bytes = response.encode();
        match chain.writable.write_at(&self.memory, 0, &bytes) {
            Ok(()) => RESPONSE_BYTES as u32,
            Err(_) => 0,
        }
    }

    fn perform(&self, request: Request) -> Response {
        let mut blocks = self.shared.blocks();
        let done = match request {
            Request::Plug(named) => plug(&mut blocks, named).map(|()| Response::Ack),
            Request::Unplug(named) => self.unplug(&mut blocks, named),
            Request::UnplugAll => Ok(self.unplug_all(&mut blocks)),
            Request::State(Named { address, count }) => blocks
                .range(address, count)
                .map(|range| Response::State(blocks.state(range))),
        };
        done.unwrap_or_else(|refusal| match refusal {
            Refusal::Error => Response::Error,
            Refusal::Nack => Response::Nack,
        })
    }

    fn unplug(&self, blocks: &mut Blocks, named: Named) -> Result<Response, Refusal> {
        let range = blocks.range(named.address, named.count)?;
        blocks.check_unplug(range)?;
        if !self.give_back(blocks, range) {
            return Ok(Response::Busy);
        }
        blocks.unplug(range);
        Ok(Response::Ack)
    }

    fn unplug_all(&self, blocks: &mut Blocks) -> Response {
        if !self.give_back(blocks, blocks.all()) {
            return Response::Busy;
        }
        blocks.unplug_all();
        Response::Ack
    }

    /// False when the host does not take it, and the guest had better keep it.
    fn give_back(&self, blocks: &Blocks, range: Range) -> bool {
        let (start, bytes) = blocks.extent(range);
        discard(&self.memory, start, bytes).is_ok()
    }
}

fn plug(blocks: &mut Blocks, named: Named) -> Result<(), Refusal> {
    let range = blocks.range(named.address, named.count)?;
    blocks.plug(range)
}
