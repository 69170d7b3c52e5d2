//! The socket device without its thread.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use vmm_virtio::{ActivateError, Activation};

use super::table::{MAX_CONNECTIONS, MAX_RESETS, Table};
use super::worker::Service;
use super::{Failed, Ready};
use crate::event_loop::Events;

/// A socket device that works when it is told to.
pub struct SteppedVsock {
    service: Service,
    events: Events,
}

impl SteppedVsock {
    /// Most connections at a time.
    pub const MAX_CONNECTIONS: usize = MAX_CONNECTIONS;
    /// Most answers that a guest does not take are kept, but for one that comes
    /// of a client's end.
    pub const MAX_ANSWERS: usize = MAX_RESETS;

    /// A device with its driver's queues. With `reset_due` it tells the guest
    /// that its connections are gone, as after a restore.
    ///
    /// # Errors
    /// When the driver left out a queue, or the host lacks descriptors.
    pub fn try_new(
        guest_cid: u32,
        listener: UnixListener,
        reset_due: bool,
        activation: Activation,
    ) -> Result<Self, ActivateError> {
        let host = |source: io::Error| ActivateError::Host {
            device: super::DEVICE.to_owned(),
            source,
        };
        listener.set_nonblocking(true).map_err(host)?;
        let ready: Ready = Arc::new(|| ());
        let failed: Failed = Arc::new(|_| ());
        let mut table = Some(Table::new(guest_cid, listener, ready));
        let mut service = Service::try_new(&mut table, reset_due, activation, failed)?;
        let events = Events::try_new().map_err(host)?;
        service.prepare(&events).map_err(host)?;
        Ok(Self { service, events })
    }

    /// Works as the thread does between two sleeps, and takes what has happened
    /// meanwhile. True when it did not do all that it could.
    ///
    /// # Errors
    /// When the host lets nobody wait.
    pub fn turn(&mut self) -> io::Result<bool> {
        let more = self.service.work_unless_broken(&self.events);
        self.service.wait(&self.events, Some(Duration::ZERO))?;
        Ok(more)
    }

    /// The guest has broken the device: clients are turned away.
    pub fn is_broken(&self) -> bool {
        self.service.table.is_closed()
    }

    /// Connections that there are.
    pub fn connections(&self) -> usize {
        self.service.table.count()
    }

    /// Answers that wait for the guest.
    pub fn answers(&self) -> usize {
        self.service.table.waiting_resets()
    }
}
