//! The file system device without its thread.

use std::io;
use std::os::unix::net::UnixStream;

use vm_memory::GuestMemoryMmap;
use vmm_virtio::Activation;

use super::bounce::Bounce;
use super::relay::{Fault, Guest, Relay};
use super::server::Server;
use super::shadow_queue::ShadowQueue;
use crate::stepped::Stopped;

const SHARE: &str = "share";

/// A relay between a guest and a file server, neither of which is trusted. After
/// [`Stopped`] it is of no use but to be dropped.
pub struct SteppedFileSystem {
    relay: Relay,
    guest: Guest,
}

impl From<Fault> for Stopped {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Guest(fault) => Self::Guest(fault.to_string()),
            Fault::Server(trouble) => Self::Server(trouble.of_share(SHARE)),
        }
    }
}

impl SteppedFileSystem {
    /// A device that has said nothing to the file server yet. Nothing when the
    /// driver did not set up both queues.
    ///
    /// # Errors
    /// When the host lacks memory or descriptors.
    pub fn try_new(activation: Activation, socket: UnixStream) -> io::Result<Option<Self>> {
        let Some(guest) = Guest::new(activation) else {
            return Ok(None);
        };
        let relay = Relay::new(Server::try_new(socket)?);
        Ok(Some(Self { relay, guest }))
    }

    /// Introduces itself to the file server, and waits for its answers.
    ///
    /// # Errors
    /// When it does not answer as it should.
    pub fn start(&mut self) -> Result<(), Stopped> {
        let started = self.relay.server.start();
        started.map_err(|trouble| Fault::Server(trouble).into())
    }

    /// Passes on what the guest asks for; with `new_ones` false, as on the way to
    /// a pause, only what was taken from it before. True when there may be more.
    ///
    /// # Errors
    /// When the guest or the file server broke the protocol.
    pub fn take_requests(&mut self, new_ones: bool) -> Result<bool, Stopped> {
        Ok(self.relay.take_requests(&mut self.guest, new_ones)?)
    }

    /// Gives the guest what the file server has returned.
    ///
    /// # Errors
    /// When the guest or the file server broke the protocol.
    pub fn take_replies(&mut self) -> Result<(), Stopped> {
        Ok(self.relay.take_replies(&mut self.guest)?)
    }

    /// Gives memory back, if that can be done.
    ///
    /// # Errors
    /// When the host does not take it.
    pub fn release(&mut self) -> Result<(), Stopped> {
        if self.relay.can_release() {
            self.relay.release()?;
        }
        Ok(())
    }

    /// What the file server sees and may write to.
    pub fn bounce_memory(&self) -> &GuestMemoryMmap {
        self.relay.server.bounce.memory()
    }

    /// The addresses in it of descriptor table, available and used ring.
    pub fn shadow_rings(&self, queue: usize) -> [u64; 3] {
        self.relay.server.queues[queue].addresses()
    }

    /// Entries of each shadow queue.
    pub fn shadow_size() -> u16 {
        ShadowQueue::size()
    }

    /// Length of the bounce memory's part that holds the rings; slots follow.
    pub fn rings_bytes() -> u64 {
        Bounce::RINGS_BYTES
    }

    /// Requests that are with the file server or wait for a slot.
    pub fn held(&self) -> usize {
        self.relay.held()
    }
}
