//! File system device (virtio 1.2 section 5.11): a directory of the host,
//! served by an upstream virtiofsd that never sees guest memory.
//!
//! The device is a vhost-user front end, but the memory and the queues that it
//! offers to the file server are its own: "shadow queues" in a sealed memfd of
//! about 9 MiB. Each request of the guest is checked, copied into a slot there
//! and passed on; the reply is checked and copied back:
//!
//! ```text
//! guest: hiprio, request queue --check, copy--> bounce memory: two queues, slots --vhost-user--> virtiofsd
//! ```
//!
//! So a broken file server cannot reach into the guest, and a guest cannot make
//! it stumble over a malformed request, which would cost all containers of the
//! pod their files. A request that is malformed is answered `EINVAL`, an
//! operation that virtiofsd does not have `ENOSYS`.
//!
//! Metadata and data have slots of their own: a `FUSE_LOOKUP` never waits for a
//! `FUSE_READ`. Without a free slot requests stay in the guest's queue. The
//! memory of data slots that have been idle for a second is given back.
//!
//! When the file server ends or breaks the protocol, that is told once, by
//! callback; the device then needs a reset and cannot be started again.

mod bounce;
mod relay;
mod request;
mod server;
mod shadow_queue;
mod state;
#[cfg(feature = "stepped")]
pub(crate) mod stepped;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_virtio::{ActivateError, Activation, ActiveQueue, RestoreError, VirtioDevice};

use crate::event_loop::Worker;
use relay::{Guest, Relay};
use server::Server;
pub use server::ServerFailed;
use state::FileSystemState;
use worker::Service;

/// Room for the tag in the configuration space (section 5.11.4).
const TAG_BYTES: usize = 36;
/// Entries of the queues. Linux sends at most as many pages with a request as
/// the request queue has entries, less a few: 1 MiB is 256.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
/// How long a reset waits for the file server to finish what it has. One that
/// hangs on a dead disk for longer is given up, and the pod with it: a vCPU
/// waits meanwhile.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 10_000 });

/// Called when the file server has failed.
type Failed = Arc<dyn Fn(ServerFailed) + Send + Sync>;

/// What a file system device needs.
pub struct FileSystemConfig {
    /// Name by which the guest mounts it: 1 to 36 bytes.
    pub tag: String,
    /// Connected to the file server, which waits for a vhost-user front end.
    pub socket: UnixStream,
    /// Called once, on the device's thread, when the file server has failed.
    /// Must not block. The pod cannot go on.
    pub failed: Arc<dyn Fn(ServerFailed) + Send + Sync>,
}

/// A device that cannot be made.
#[derive(Debug, Error)]
pub enum FileSystemError {
    /// The tag does not fit the configuration space.
    #[error("file system tag {tag:?} has {} bytes: need 1 to {TAG_BYTES}", tag.len())]
    Tag {
        /// As configured.
        tag: String,
    },
    /// No memory or descriptors for its requests.
    #[error("cannot make bounce memory for share {share}")]
    Bounce {
        /// The share's tag.
        share: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The file system device.
pub struct FileSystem {
    tag: String,
    failed: Failed,
    /// To end a file server's connection that a thread waits for.
    socket: UnixStream,
    /// Here while the device does not serve, else with the worker. Nothing when
    /// the file server has failed.
    relay: Option<Relay>,
    worker: Option<Worker<Service>>,
    abandon: Arc<AtomicBool>,
}

impl FileSystem {
    /// A device that does not serve yet, and has not spoken to the file server.
    ///
    /// # Errors
    /// When the tag is too long, or the host lacks memory or descriptors.
    pub fn try_new(config: FileSystemConfig) -> Result<Self, FileSystemError> {
        let FileSystemConfig {
            tag,
            socket,
            failed,
        } = config;
        if tag.is_empty() || tag.len() > TAG_BYTES {
            return Err(FileSystemError::Tag { tag });
        }
        let make = || Ok((Server::try_new(socket.try_clone()?)?, socket));
        let (server, socket) = make().map_err(|source| FileSystemError::Bounce {
            share: tag.clone(),
            source,
        })?;
        Ok(Self {
            tag,
            failed,
            socket,
            relay: Some(Relay::new(server)),
            worker: None,
            abandon: Arc::default(),
        })
    }

    fn device_name(&self) -> String {
        format!("file system {}", self.tag)
    }

    fn stop(&mut self, abandon: bool) -> Vec<ActiveQueue> {
        let Some(worker) = self.worker.take() else {
            return Vec::new();
        };
        self.abandon.store(abandon, Ordering::Release);
        let give_up = || {
            let _ = self.socket.shutdown(Shutdown::Both);
        };
        let Some(service) = worker.stop_within(PATIENCE, give_up) else {
            return Vec::new();
        };
        if !service.dead {
            self.relay = Some(service.relay);
        }
        service.guest.queues.into()
    }
}

impl VirtioDevice for FileSystem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// None of section 5.11.3: there is no notification queue.
    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Section 5.11.4: the tag, padded with zeros, then the number of
        // request queues.
        let mut space = [0; TAG_BYTES + 4];
        space[..self.tag.len()].copy_from_slice(self.tag.as_bytes());
        space[TAG_BYTES..].copy_from_slice(&1u32.to_le_bytes());
        crate::config_space::read(&space, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let device = self.device_name();
        let Some(guest) = Guest::new(activation) else {
            return Err(ActivateError::Queues { device });
        };
        let Some(relay) = self.relay.take() else {
            let source = io::Error::other("its file server has failed");
            return Err(ActivateError::Host { device, source });
        };
        self.abandon.store(false, Ordering::Release);
        let service = Service {
            share: self.tag.clone(),
            relay,
            guest,
            failed: Arc::clone(&self.failed),
            dead: false,
            abandon: Arc::clone(&self.abandon),
        };
        let worker = service
            .spawn()
            .map_err(|source| ActivateError::Host { device, source })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        self.stop(false)
    }

    fn reset(&mut self) {
        self.stop(true);
        if let Some(relay) = &mut self.relay {
            relay.setxattr_ext = false;
        }
    }

    fn save(&self) -> Vec<u8> {
        FileSystemState {
            tag: self.tag.clone(),
            setxattr_ext: self.relay.as_ref().is_some_and(|relay| relay.setxattr_ext),
        }
        .encode()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let device = self.device_name();
        let state = FileSystemState::decode(&device, state)?;
        if state.tag != self.tag {
            return Err(RestoreError {
                device,
                reason: format!("it is of share {}", state.tag),
            });
        }
        if let Some(relay) = &mut self.relay {
            relay.setxattr_ext = state.setxattr_ext;
        }
        Ok(())
    }
}
