//! Network device (virtio 1.2 section 5.1): one pair of queues, connected to a
//! tap interface of the host.
//!
//! Frames move between guest memory and the tap with one system call each and
//! no copy of ours. Checksums and the cutting of large TCP segments are left to
//! whoever has to do them in the end, often nobody: each frame has a header that
//! says what is still to be done (section 5.1.6), which the tap understands.
//!
//! ```text
//! guest: transmit queue --header checked--> writev --> tap --> the pod's network namespace
//!        receive queue  <------------------ readv  <-- tap
//! ```
//!
//! - A frame is taken from the tap only when there is room for the largest that
//!   can come; until then frames wait in the tap, whose queue is the kernel's to
//!   bound and to drop from.
//! - A frame of the guest that the tap has no room for waits in the guest's
//!   queue, so that the guest's own queueing decides what is sent first.
//! - A frame that is none (too short, too long, a header that the guest did not
//!   negotiate or that the tap refuses) is dropped and counted, as by any other
//!   network card.
//! - When the interface is deleted, the link is down, for good: that is told by
//!   callback, and to the driver. What it sends then is dropped.

mod header;
mod link;
mod room;
mod state;
#[cfg(feature = "stepped")]
pub(crate) mod stepped;
mod tap;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_virtio::{ActivateError, Activation, ActiveQueue, RestoreError, VirtioDevice};

use crate::event_loop::Worker;
use link::Link;
use state::NetState;
use tap::Tap;
use worker::Service;

/// Entries of the receive and the transmit queue, as QEMU has them.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Called when the tap is gone.
type Lost = Arc<dyn Fn(io::Error) + Send + Sync>;

/// What a network device needs.
pub struct NetConfig {
    /// The guest's address on the network.
    pub mac: [u8; 6],
    /// Longest packet, without Ethernet's header, that the guest may send. That
    /// the tap's is not larger is the caller's to see to: longer frames are
    /// dropped.
    pub mtu: u16,
    /// An open `/dev/net/tun`, attached to an interface by `TUNSETIFF` with
    /// `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`. Becomes non-blocking. Nobody
    /// else may read or write it from now on; the device sets the length of
    /// the header and the offloads.
    pub tap: OwnedFd,
    /// Called once, on the device's thread or on that which starts the device,
    /// when the tap is of no use any more. Must not block.
    pub lost: Arc<dyn Fn(io::Error) + Send + Sync>,
}

/// A descriptor that is not the tap it should be.
#[derive(Debug, Error)]
pub enum NetError {
    /// Not a tap, or its interface is gone.
    #[error("the descriptor passed as tap is not attached to an interface")]
    NotAttached(#[source] io::Error),
    /// Attached in another way.
    #[error(
        "the tap has flags {flags:#x}: it needs IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, and not IFF_NAPI_FRAGS"
    )]
    Flags {
        /// As `TUNGETIFF` says.
        flags: i32,
    },
    /// `O_NONBLOCK`.
    #[error("cannot make the tap non-blocking")]
    Blocking(#[source] io::Error),
}

/// The network device.
pub struct Net {
    mac: [u8; 6],
    mtu: u16,
    link_up: Arc<AtomicBool>,
    /// Here while the device does not serve, else with the worker.
    link: Option<Link>,
    worker: Option<Worker<Service>>,
}

impl Net {
    /// A device that does not serve yet: frames wait in the tap.
    ///
    /// # Errors
    /// When the descriptor is not such a tap.
    pub fn try_new(config: NetConfig) -> Result<Self, NetError> {
        let tap = Tap::try_new(config.tap)?;
        Ok(Self::on(tap, config.mac, config.mtu, config.lost))
    }

    fn on(tap: Tap, mac: [u8; 6], mtu: u16, lost: Lost) -> Self {
        let link = Link::new(tap, lost);
        Self {
            mac,
            mtu,
            link_up: link.up(),
            link: Some(link),
            worker: None,
        }
    }

    fn device_name(&self) -> String {
        let mac = self.mac.map(|byte| format!("{byte:02x}")).join(":");
        format!("network {mac}")
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        header::FEATURES | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// Section 5.1.4: address, status, pairs of queues, MTU.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = if self.link_up.load(Ordering::Acquire) {
            VIRTIO_NET_S_LINK_UP as u16
        } else {
            0
        };
        let mut space = [0; 12];
        space[..6].copy_from_slice(&self.mac);
        space[6..8].copy_from_slice(&status.to_le_bytes());
        space[8..10].copy_from_slice(&1u16.to_le_bytes());
        space[10..].copy_from_slice(&self.mtu.to_le_bytes());
        crate::config_space::read(&space, offset, data);
    }

    /// Since virtio 1.0 the address is read-only (section 5.1.4.2).
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let device = self.device_name();
        let worker = Service::spawn(&device, &mut self.link, self.mtu, activation)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        let Some(service) = self.worker.take().and_then(Worker::stop) else {
            return Vec::new();
        };
        let (link, queues) = service.into_parts();
        self.link = Some(link);
        queues.into()
    }

    fn reset(&mut self) {
        self.pause();
    }

    fn save(&self) -> Vec<u8> {
        NetState {
            mac: self.mac,
            mtu: self.mtu,
        }
        .encode()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let device = self.device_name();
        let NetState { mac, mtu } = NetState::decode(&device, state)?;
        if (mac, mtu) == (self.mac, self.mtu) {
            return Ok(());
        }
        Err(RestoreError {
            device,
            reason: format!("it is of address {mac:02x?} and MTU {mtu}"),
        })
    }
}
