//! The network device without its thread, on a socket in place of a tap.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmm_virtio::{ActivateError, Activation, ActiveQueue};

use super::link::Link;
use super::tap::Tap;
use super::worker::Service;
use super::{Lost, Net};
use crate::event_loop::Events;
use crate::stepped::Stopped;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A network device that works when it is told to. After [`Stopped`] it is of no
/// use but to be dropped.
pub struct SteppedNet {
    service: Service,
    events: Events,
    link_up: Arc<AtomicBool>,
}

impl SteppedNet {
    /// A device with its driver's queues. `frames` keeps packets apart.
    ///
    /// # Errors
    /// When the driver left out a queue, or the host lacks descriptors.
    pub fn try_new(
        mtu: u16,
        frames: OwnedFd,
        activation: Activation,
    ) -> Result<Self, ActivateError> {
        let device = "network";
        let host = |source: io::Error| ActivateError::Host {
            device: device.to_owned(),
            source,
        };
        let tap = Tap::of_socket(frames).map_err(host)?;
        let link = Link::new(tap, ignore());
        let link_up = link.up();
        let mut service = Service::try_new(device, &mut Some(link), mtu, activation)?;
        let events = Events::try_new().map_err(host)?;
        service.prepare(&events).map_err(host)?;
        Ok(Self {
            service,
            events,
            link_up,
        })
    }

    /// A device with its thread, for a transport.
    ///
    /// # Errors
    /// When the host does not make the socket non-blocking.
    pub fn with_thread(mtu: u16, frames: OwnedFd) -> io::Result<Net> {
        Ok(Net::on(Tap::of_socket(frames)?, MAC, mtu, ignore()))
    }

    /// Works as the thread does between two sleeps, and takes what has happened
    /// meanwhile. True when it did not do all that it could.
    ///
    /// # Errors
    /// When the guest broke the device.
    ///
    /// # Panics
    /// When the host lets nobody wait.
    pub fn turn(&mut self) -> Result<bool, Stopped> {
        let worked = self.service.work(&self.events);
        let more = worked.map_err(|fault| Stopped::Guest(fault.to_string()))?;
        let waited = self.service.wait(&self.events, Some(Duration::ZERO));
        waited.expect("the host lets it wait");
        Ok(more)
    }

    /// There is still somebody at the other end.
    pub fn is_link_up(&self) -> bool {
        self.link_up.load(Ordering::Acquire)
    }

    /// Frames that were none, or that nobody could take.
    pub fn dropped(&self) -> u64 {
        self.service.dropped
    }

    /// The queues, as a pause gives them back.
    pub fn into_queues(self) -> [ActiveQueue; 2] {
        self.service.into_parts().1
    }
}

fn ignore() -> Lost {
    Arc::new(|_| ())
}
