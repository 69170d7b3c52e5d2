//! The thread between the guest's queues and the file server.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmm_sys_util::epoll::EventSet;

use super::Failed;
use super::relay::{Fault, Guest, Relay};
use super::server::Trouble;
use crate::event_loop::{Events, Worker};

/// Tokens of the guest's and the file server's queues, and of its socket.
const GUEST: [u64; 2] = [0, 1];
const SERVER: [u64; 2] = [2, 3];
const SOCKET: u64 = 4;

/// How long the large slots may be idle before their memory is given back:
/// longer than the pauses between the requests of one copy.
const IDLE: Duration = Duration::from_secs(1);

pub(super) struct Service {
    pub(super) share: String,
    pub(super) relay: Relay,
    pub(super) guest: Guest,
    pub(super) failed: Failed,
    /// The file server is of no use any more.
    pub(super) dead: bool,
    /// The guest does not wait for requests that are not with the file server:
    /// it resets the device.
    pub(super) abandon: Arc<AtomicBool>,
}

impl Service {
    pub(super) fn spawn(self) -> io::Result<Worker<Self>> {
        // Linux cuts thread names after 15 bytes.
        let name = format!("fs-{}", self.share);
        Worker::spawn(&name, self, Self::prepare, Self::serve)
    }

    fn prepare(&mut self, events: &Events) -> io::Result<()> {
        let guest = self.guest.queues.iter().zip(GUEST);
        for (queue, token) in guest {
            events.watch_event(&queue.notified, token)?;
        }
        let server = self.relay.server.queues.iter().zip(SERVER);
        for (queue, token) in server {
            events.watch_event(&queue.call, token)?;
        }
        let hang_up = EventSet::READ_HANG_UP | EventSet::HANG_UP;
        events.watch(self.relay.server.socket(), SOCKET, hang_up)
    }

    fn serve(&mut self, events: &Events) {
        let mut outcome = self.relay_until_stop(events);
        if let Err(Fault::Guest(fault)) = &outcome {
            self.guest.interrupt.guest_fault(fault);
            events.wait_for_stop();
            // What the file server still has is given back to nobody.
            self.abandon.store(true, Ordering::Release);
            outcome = Ok(());
        }
        events.ignore_stop();
        outcome = outcome.and_then(|()| self.drain(events));
        if let Err(Fault::Server(trouble)) = outcome {
            self.dead = true;
            (self.failed)(trouble.of_share(&self.share));
            self.guest.interrupt.needs_reset();
        }
        self.relay.clear();
    }

    fn relay_until_stop(&mut self, events: &Events) -> Result<(), Fault> {
        self.relay.server.start()?;
        loop {
            self.relay.take_replies(&mut self.guest)?;
            let more = self.relay.take_requests(&mut self.guest, true)?;
            let timeout = if more {
                Some(Duration::ZERO)
            } else {
                self.relay.can_release().then_some(IDLE)
            };
            let (stopping, happened) = self.wait(events, timeout)?;
            if stopping {
                return Ok(());
            }
            if !more && !happened && self.relay.can_release() {
                self.relay.release()?;
            }
        }
    }

    /// Finishes what has been taken from the guest, and stops the file server's
    /// queues.
    fn drain(&mut self, events: &Events) -> Result<(), Fault> {
        loop {
            match self.finish_some() {
                Err(Fault::Guest(fault)) => {
                    self.guest.interrupt.guest_fault(&fault);
                    self.abandon.store(true, Ordering::Release);
                    // Replies that came with that one are told by no event.
                    continue;
                }
                outcome => outcome?,
            }
            let abandon = self.abandon.load(Ordering::Acquire);
            if !self.relay.has_in_flight() && (abandon || !self.relay.has_waiting()) {
                break;
            }
            self.wait(events, None)?;
        }
        Ok(self.relay.server.stop()?)
    }

    fn finish_some(&mut self) -> Result<(), Fault> {
        self.relay.take_replies(&mut self.guest)?;
        if !self.abandon.load(Ordering::Acquire) {
            self.relay.take_requests(&mut self.guest, false)?;
        }
        Ok(())
    }

    /// Sleeps; tells whether to stop, and whether anything happened.
    fn wait(&mut self, events: &Events, timeout: Option<Duration>) -> Result<(bool, bool), Fault> {
        let (mut ended, mut happened) = (false, false);
        let (guest, server) = (&self.guest.queues, &self.relay.server.queues);
        let goes_on = events.wait(timeout, |event| {
            happened = true;
            // Non-blocking: empties the counter.
            let _ = match event.token {
                token if token == GUEST[0] => guest[0].notified.read(),
                token if token == GUEST[1] => guest[1].notified.read(),
                token if token == SERVER[0] => server[0].call.read(),
                token if token == SERVER[1] => server[1].call.read(),
                _ => {
                    ended = true;
                    Ok(0)
                }
            };
        })?;
        if ended {
            // Its last replies are still good; a guest that does not take them changes nothing.
            match self.relay.take_replies(&mut self.guest) {
                Err(Fault::Guest(_)) => {}
                outcome => outcome?,
            }
            return Err(Fault::Server(Trouble::Ended));
        }
        Ok((!goes_on, happened))
    }
}

#[cfg(test)]
mod tests;
