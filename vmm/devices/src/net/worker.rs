//! The thread between the guest's queues and the tap.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use libc::{EBADFD, EINVAL};
use thiserror::Error;
use virtio_bindings::virtio_net::VIRTIO_NET_F_STATUS;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_virtio::{
    ActivateError, Activation, ActiveQueue, ChainError, Interrupt, QueueError, Segments,
};

use super::header::{Accepted, ETHERNET_BYTES, HEADER_BYTES, MAX_FRAME_BYTES};
use super::link::Link;
use super::room::Room;
use super::tap::Pieces;
use crate::event_loop::{Events, Worker};

const RX: u64 = 0;
const TX: u64 = 1;
const TAP: u64 = 2;

/// Once for each change: whoever has no use for it, because the guest offers no
/// room or sends nothing, is not woken again and again.
const TAP_EVENTS: EventSet = EventSet::IN
    .union(EventSet::OUT)
    .union(EventSet::EDGE_TRIGGERED);

/// Frames of one direction before the other has its turn.
pub(super) const FRAMES_AT_A_TIME: usize = 64;

pub(super) struct Service {
    rx: ActiveQueue,
    tx: ActiveQueue,
    link: Link,
    accepted: Accepted,
    room: Room,
    tap: TapState,
    /// Frames of either direction that were none, or that nobody could take.
    pub(super) dropped: u64,
    memory: GuestMemoryMmap,
    interrupt: Arc<dyn Interrupt>,
}

/// What the tap is believed to be, until it says otherwise.
struct TapState {
    readable: bool,
    writable: bool,
    hung_up: bool,
}

/// The guest's driver is broken.
#[derive(Debug, Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("receive buffer {head} of {bytes} bytes does not hold a header")]
    NoRoom { head: u16, bytes: usize },
}

impl Service {
    /// Takes the link unless the driver's queues do not fit. On a failure of
    /// the host it is lost: the device cannot be started again.
    pub(super) fn spawn(
        device: &str,
        link: &mut Option<Link>,
        mtu: u16,
        activation: Activation,
    ) -> Result<Worker<Self>, ActivateError> {
        let service = Self::try_new(device, link, mtu, activation)?;
        Worker::spawn("net", service, Self::prepare, Self::serve).map_err(|source| {
            ActivateError::Host {
                device: device.to_owned(),
                source,
            }
        })
    }

    pub(super) fn try_new(
        device: &str,
        link: &mut Option<Link>,
        mtu: u16,
        activation: Activation,
    ) -> Result<Self, ActivateError> {
        let device = device.to_owned();
        let Ok([rx, tx]) = <[ActiveQueue; 2]>::try_from(activation.queues) else {
            return Err(ActivateError::Queues { device });
        };
        let Some(mut link) = link.take() else {
            let source = io::Error::other("an earlier start failed");
            return Err(ActivateError::Host { device, source });
        };
        let accepted = Accepted::new(activation.features);
        // Its interface may be gone by now, which is no reason to end the VM.
        let set_up = link.tap().map(|tap| tap.set_up(accepted.offloads()));
        if let Some(Err(error)) = set_up {
            link.lose(error);
            if accepted.has(VIRTIO_NET_F_STATUS) {
                activation.interrupt.config_changed();
            }
        }
        Ok(Self {
            rx,
            tx,
            link,
            accepted,
            room: Room::new(accepted, mtu),
            tap: TapState {
                readable: true,
                writable: true,
                hung_up: false,
            },
            dropped: 0,
            memory: activation.memory,
            interrupt: activation.interrupt,
        })
    }

    /// The transmit queue, for tests of its positions.
    #[cfg(test)]
    pub(super) fn tx(&self) -> &ActiveQueue {
        &self.tx
    }

    /// What is given back at the end.
    pub(super) fn into_parts(mut self) -> (Link, [ActiveQueue; 2]) {
        self.room.put_back(&mut self.rx);
        (self.link, [self.rx, self.tx])
    }

    pub(super) fn prepare(&mut self, events: &Events) -> io::Result<()> {
        events.watch_event(&self.rx.notified, RX)?;
        events.watch_event(&self.tx.notified, TX)?;
        match self.link.tap() {
            Some(tap) => events.watch(tap.as_fd(), TAP, TAP_EVENTS),
            None => Ok(()),
        }
    }

    fn serve(&mut self, events: &Events) {
        loop {
            let more = match self.work(events) {
                Ok(more) => more,
                Err(fault) => {
                    self.interrupt.guest_fault(&fault);
                    events.wait_for_stop();
                    return;
                }
            };
            match self.wait(events, more.then_some(Duration::ZERO)) {
                Ok(true) => {}
                Ok(false) => return,
                // A network that stands still is no reason to end the guest.
                Err(_) => {
                    self.interrupt.needs_reset();
                    return;
                }
            }
        }
    }

    /// Sleeps, and takes note of what happened. False when the thread is to end.
    pub(super) fn wait(&mut self, events: &Events, timeout: Option<Duration>) -> io::Result<bool> {
        let (rx, tx, tap) = (&self.rx, &self.tx, &mut self.tap);
        events.wait(timeout, |happened| match happened.token {
            // Non-blocking: empties the counter.
            RX => drop(rx.notified.read()),
            TX => drop(tx.notified.read()),
            _ => {
                let events = happened.events;
                tap.readable |= events.contains(EventSet::IN);
                tap.writable |= events.contains(EventSet::OUT);
                tap.hung_up |= events.intersects(EventSet::ERROR | EventSet::HANG_UP);
            }
        })
    }

    /// Moves what can be moved without waiting. True when there is more.
    pub(super) fn work(&mut self, events: &Events) -> Result<bool, Fault> {
        if self.tap.hung_up {
            self.lose_link(events, io::Error::other("its interface was deleted"));
        }
        let more_to_send = self.send(events)?;
        let more_to_receive = self.receive(events)?;
        Ok(more_to_send || more_to_receive)
    }

    /// Guest to tap.
    fn send(&mut self, events: &Events) -> Result<bool, Fault> {
        let mut sent = 0;
        let more = loop {
            if !self.tap.writable {
                break false;
            }
            if sent == FRAMES_AT_A_TIME {
                break true;
            }
            match self.tx.pop(&self.memory)? {
                Some(chain) if self.pass_on(events, &chain.readable)? => {
                    self.tx.complete(&self.memory, chain.head, 0)?;
                    sent += 1;
                }
                Some(_) => {
                    self.tx.undo_pop();
                    self.tap.writable = false;
                }
                None if self.tx.listen(&self.memory)? => {}
                None => break false,
            }
        };
        if sent > 0 {
            self.tx.signal(&self.memory, self.interrupt.as_ref())?;
        }
        Ok(more)
    }

    /// Sends one frame, or drops it. False when the tap has no room for it now.
    fn pass_on(&mut self, events: &Events, frame: &Segments) -> Result<bool, Fault> {
        let sound = (HEADER_BYTES + ETHERNET_BYTES..=MAX_FRAME_BYTES).contains(&frame.len());
        let (Some(tap), true) = (self.link.tap(), sound) else {
            self.dropped += 1;
            return Ok(true);
        };
        // A copy, which the guest cannot change after it was checked.
        let mut header = [0; HEADER_BYTES];
        frame.read_at(&self.memory, 0, &mut header)?;
        let Some(mut header) = self.accepted.sendable(header) else {
            self.dropped += 1;
            return Ok(true);
        };
        let mut pieces = Pieces::default();
        pieces.push_own(&mut header);
        let mut fits = true;
        let length = frame.len() - HEADER_BYTES;
        frame.for_each_slice(&self.memory, HEADER_BYTES, length, |slice| {
            fits = pieces.push(&slice);
            fits
        })?;
        let written = if fits {
            tap.write(&pieces)
        } else {
            Err(io::Error::from_raw_os_error(EINVAL))
        };
        match written {
            Ok(()) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.raw_os_error() == Some(EBADFD) => self.lose_link(events, error),
            // A header that the kernel does not take (EINVAL), an interface that is down (EIO), no
            // memory: the next one may do better.
            Err(_) => {}
        }
        self.dropped += 1;
        Ok(true)
    }

    /// Tap to guest.
    fn receive(&mut self, events: &Events) -> Result<bool, Fault> {
        let mut turns = 0;
        let mut received = false;
        let more = loop {
            if !self.tap.readable || self.link.tap().is_none() {
                break false;
            }
            if turns == FRAMES_AT_A_TIME {
                break true;
            }
            if !self.room.gather(&mut self.rx, &self.memory)? {
                break false;
            }
            received |= self.take_frame(events)?;
            turns += 1;
        };
        if received {
            self.rx.signal(&self.memory, self.interrupt.as_ref())?;
        }
        Ok(more)
    }

    /// Reads one frame into the room for it. False when the guest got none.
    fn take_frame(&mut self, events: &Events) -> Result<bool, Fault> {
        let Some(tap) = self.link.tap() else {
            return Ok(false);
        };
        // One byte more, to tell a frame that fits from one that was cut off.
        let mut beyond = [0];
        let mut pieces = self.room.pieces(&self.memory)?;
        let room = pieces.bytes();
        pieces.push_own(&mut beyond);
        match tap.read(&mut pieces) {
            Ok(0) => self.lose_link(events, io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) if (HEADER_BYTES..=room).contains(&bytes) => {
                self.room.complete(&mut self.rx, &self.memory, bytes)?;
                return Ok(true);
            }
            // Longer than the guest asked for, or than the driver's one buffer.
            Ok(_) => self.dropped += 1,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.tap.readable = false,
            // The tap has thrown a frame away that no header can describe.
            Err(error) if error.raw_os_error() == Some(EINVAL) => self.dropped += 1,
            Err(error) => self.lose_link(events, error),
        }
        Ok(false)
    }

    /// The tap is of no use any more. Frames that the guest sends from now on
    /// are dropped.
    fn lose_link(&mut self, events: &Events, error: io::Error) {
        let Some(tap) = self.link.tap() else {
            return;
        };
        // Whoever opened it may still hold it, and keep it watched.
        events.forget(tap.as_fd());
        self.link.lose(error);
        self.tap.writable = true;
        if self.accepted.has(VIRTIO_NET_F_STATUS) {
            self.interrupt.config_changed();
        }
    }
}
