//! The thread between the guest's queues and the host's sockets.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_virtio::{ActivateError, Activation, ActiveQueue, ChainError, Interrupt, QueueError};

use super::table::Table;
use super::{DEVICE, Failed};
use crate::event_loop::{Events, Worker};

/// Tokens of the queues; the table's begin with the ports of its connections.
const RX: u64 = 0;
const TX: u64 = 1;
const EVENT: u64 = 2;

/// Packets of the guest taken before the clients get their turn again.
const PACKETS_AT_A_TIME: usize = 64;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2 section 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

pub(super) struct Service {
    pub(super) table: Table,
    pub(super) rx: ActiveQueue,
    pub(super) tx: ActiveQueue,
    pub(super) event: ActiveQueue,
    /// The guest must be told that its connections are gone.
    pub(super) reset_due: bool,
    memory: GuestMemoryMmap,
    interrupt: Arc<dyn Interrupt>,
    failed: Failed,
}

/// The guest's driver is broken.
#[derive(Debug, Error)]
enum Fault {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Chain(#[from] ChainError),
}

impl Service {
    /// Takes the table unless the driver's queues do not fit. On a failure of
    /// the host it is lost: the device cannot be started again.
    pub(super) fn spawn(
        table: &mut Option<Table>,
        reset_due: bool,
        activation: Activation,
        failed: Failed,
    ) -> Result<Worker<Self>, ActivateError> {
        let service = Self::try_new(table, reset_due, activation, failed)?;
        let device = DEVICE.to_owned();
        Worker::spawn("vsock", service, Self::prepare, Self::serve)
            .map_err(|source| ActivateError::Host { device, source })
    }

    pub(super) fn try_new(
        table: &mut Option<Table>,
        reset_due: bool,
        activation: Activation,
        failed: Failed,
    ) -> Result<Self, ActivateError> {
        let device = DEVICE.to_owned();
        let Ok([rx, tx, event]) = <[ActiveQueue; 3]>::try_from(activation.queues) else {
            return Err(ActivateError::Queues { device });
        };
        let Some(table) = table.take() else {
            let source = io::Error::other("an earlier start failed");
            return Err(ActivateError::Host { device, source });
        };
        Ok(Self {
            table,
            rx,
            tx,
            event,
            reset_due,
            memory: activation.memory,
            interrupt: activation.interrupt,
            failed,
        })
    }

    pub(super) fn prepare(&mut self, events: &Events) -> io::Result<()> {
        events.watch_event(&self.rx.notified, RX)?;
        events.watch_event(&self.tx.notified, TX)?;
        events.watch_event(&self.event.notified, EVENT)?;
        self.table.watch(events)
    }

    fn serve(&mut self, events: &Events) {
        loop {
            let more = self.work_unless_broken(events);
            let waited = self.wait(events, more.then_some(Duration::ZERO));
            if !self.goes_on(waited) {
                return;
            }
        }
    }

    /// Sleeps, and handles what happened. False when the thread is to end.
    pub(super) fn wait(&mut self, events: &Events, timeout: Option<Duration>) -> io::Result<bool> {
        let (table, rx, tx, event) = (&mut self.table, &self.rx, &self.tx, &self.event);
        events.wait(timeout, |happened| {
            // Non-blocking: empties the counter.
            let _ = match happened.token {
                RX => rx.notified.read(),
                TX => tx.notified.read(),
                EVENT => event.notified.read(),
                token => {
                    table.handle_event(events, token, happened.events);
                    Ok(0)
                }
            };
        })
    }

    /// Whether to go on after a wait. That the host lets nobody wait is told:
    /// clients would wait for ever.
    fn goes_on(&self, waited: io::Result<bool>) -> bool {
        waited.unwrap_or_else(|error| {
            (self.failed)(error);
            self.interrupt.needs_reset();
            false
        })
    }

    /// Moves what can be moved without waiting. True when there is more. A
    /// driver that breaks the device gets nothing more until it resets it, and
    /// neither do the clients: they are told instead of kept waiting.
    pub(super) fn work_unless_broken(&mut self, events: &Events) -> bool {
        if self.table.is_closed() {
            return false;
        }
        self.work(events).unwrap_or_else(|fault| {
            self.table.close(events);
            self.interrupt.guest_fault(&fault);
            false
        })
    }

    fn work(&mut self, events: &Events) -> Result<bool, Fault> {
        self.tell_reset()?;
        let more_packets = self.take_packets(events)?;
        let more_room = self.send_packets()?;
        Ok(more_packets || more_room)
    }

    /// Guest to host.
    fn take_packets(&mut self, events: &Events) -> Result<bool, Fault> {
        let mut taken = 0;
        let more = loop {
            // The guest does not take the answers: its packets stay where they
            // are until it does, which the rx queue will tell.
            if !self.table.takes_packets() {
                break false;
            }
            if taken == PACKETS_AT_A_TIME {
                break true;
            }
            match self.tx.pop(&self.memory)? {
                Some(chain) => {
                    self.table
                        .handle_packet(events, &self.memory, &chain.readable)?;
                    self.tx.complete(&self.memory, chain.head, 0)?;
                    taken += 1;
                }
                None if self.tx.listen(&self.memory)? => {}
                None => break false,
            }
        };
        if taken > 0 {
            self.tx.signal(&self.memory, self.interrupt.as_ref())?;
        }
        Ok(more)
    }

    /// Host to guest.
    fn send_packets(&mut self) -> Result<bool, Fault> {
        let could_not_take = !self.table.takes_packets();
        let mut sent = 0;
        while self.table.has_outgoing() && sent < PACKETS_AT_A_TIME {
            match self.rx.pop(&self.memory)? {
                Some(chain) => match self.table.fill(&self.memory, &chain.writable)? {
                    Some(length) => {
                        self.rx.complete(&self.memory, chain.head, length)?;
                        sent += 1;
                    }
                    None => self.rx.undo_pop(),
                },
                None if self.rx.listen(&self.memory)? => {}
                None => break,
            }
        }
        if sent > 0 {
            self.rx.signal(&self.memory, self.interrupt.as_ref())?;
        }
        let unblocked = could_not_take && self.table.takes_packets();
        Ok(unblocked || sent == PACKETS_AT_A_TIME)
    }

    fn tell_reset(&mut self) -> Result<(), Fault> {
        while self.reset_due {
            match self.event.pop(&self.memory)? {
                Some(chain) => {
                    let event = TRANSPORT_RESET.to_le_bytes();
                    chain.writable.write_at(&self.memory, 0, &event)?;
                    self.event
                        .complete(&self.memory, chain.head, event.len() as u32)?;
                    self.event.signal(&self.memory, self.interrupt.as_ref())?;
                    self.reset_due = false;
                }
                None if self.event.listen(&self.memory)? => {}
                None => break,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
