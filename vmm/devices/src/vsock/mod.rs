//! Socket device (virtio 1.2 section 5.10): stream connections from host
//! clients to programs in the guest.
//!
//! The host's side is one listening Unix stream socket. A client connects,
//! writes `CONNECT <port>\n` (decimal) and reads one line:
//! - `OK <port>\n`: the guest has accepted, and what follows is the stream;
//! - `ERROR malformed\n`: it wrote something else;
//! - `ERROR busy\n`: there are 1024 connections;
//! - `ERROR refused\n`: nobody listens on this port in the guest, or the
//!   guest's driver has broken the device and must reset it.
//!
//! After an error the connection is closed. A driver that breaks the device
//! closes all connections. A client that connects before the
//! guest is ready waits, without polling, until the guest knocks: it asks for
//! a connection to the host's port [`READY_PORT`], which is refused like all
//! that the guest asks for, and lets everybody in.
//!
//! Either side may end one direction (`shutdown(SHUT_WR)` on one side is the
//! end of the stream on the other). What was sent before a close arrives
//! before it. A guest that resets a connection closes it for the client, after
//! what came before the reset.
//!
//! Per connection the device keeps at most 256 KiB, for a client that does not
//! read; the guest is told to wait then. In the other direction it reads from
//! a client only what the guest has room for, right into guest memory.

mod connection;
mod credit;
#[cfg(test)]
mod fake_guest;
mod greeting;
mod packet;
mod state;
#[cfg(feature = "stepped")]
pub(crate) mod stepped;
mod table;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_virtio::{ActivateError, Activation, ActiveQueue, RestoreError, VirtioDevice};

use crate::event_loop::Worker;
use state::VsockState;
use table::Table;
use worker::Service;

/// The host's context identifier (section 5.10.4).
pub const HOST_CID: u64 = 2;
/// The host port on which the guest's agent knocks when it listens.
pub const READY_PORT: u32 = 1024;

const DEVICE: &str = "socket device";
/// Entries of the rx, tx and event queues: what Linux fills is a few.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// Called when the guest knocks.
type Ready = Arc<dyn Fn() + Send + Sync>;
/// Called when the host has failed the device.
type Failed = Arc<dyn Fn(io::Error) + Send + Sync>;

/// What a socket device needs.
pub struct VsockConfig {
    /// The guest's context identifier, at least 3.
    pub guest_cid: u32,
    /// The host's side. Becomes non-blocking.
    pub listener: UnixListener,
    /// Called on the device's thread when the guest is ready: once, and once
    /// more after each reset of the device. Must not block.
    pub ready: Arc<dyn Fn() + Send + Sync>,
    /// Called once, on the device's thread, when the host does not let it go
    /// on. Must not block. Nobody reaches the guest any more.
    pub failed: Arc<dyn Fn(io::Error) + Send + Sync>,
}

/// The socket device.
pub struct Vsock {
    guest_cid: u32,
    /// Here while the device does not serve, else with the worker.
    table: Option<Table>,
    worker: Option<Worker<Service>>,
    reset_due: bool,
    failed: Failed,
}

impl Vsock {
    /// A device that does not serve yet: clients that connect already wait in
    /// the listener's queue.
    ///
    /// # Errors
    /// When the listener cannot be made non-blocking.
    pub fn try_new(config: VsockConfig) -> io::Result<Self> {
        let VsockConfig {
            guest_cid,
            listener,
            ready,
            failed,
        } = config;
        listener.set_nonblocking(true)?;
        Ok(Self {
            guest_cid,
            table: Some(Table::new(guest_cid, listener, ready)),
            worker: None,
            reset_due: false,
            failed,
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// None of section 5.10.3: then there are stream sockets only.
    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::config_space::read(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = Arc::clone(&self.failed);
        let worker = Service::spawn(&mut self.table, self.reset_due, activation, failed)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        let Some(service) = self.worker.take().and_then(Worker::stop) else {
            return Vec::new();
        };
        self.table = Some(service.table);
        self.reset_due = service.reset_due;
        vec![service.rx, service.tx, service.event]
    }

    fn reset(&mut self) {
        self.pause();
        if let Some(table) = &mut self.table {
            table.reset();
        }
        self.reset_due = false;
    }

    fn save(&self) -> Vec<u8> {
        VsockState {
            guest_cid: self.guest_cid,
            guest_ready: self.table.as_ref().is_some_and(Table::is_guest_ready),
        }
        .encode()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let state = VsockState::decode(state)?;
        if state.guest_cid != self.guest_cid {
            return Err(RestoreError {
                device: DEVICE.to_owned(),
                reason: format!(
                    "it is of the guest with context identifier {}, this one has {}",
                    state.guest_cid, self.guest_cid
                ),
            });
        }
        if let Some(table) = &mut self.table {
            table.restore(state.guest_ready);
        }
        self.reset_due = true;
        Ok(())
    }
}
