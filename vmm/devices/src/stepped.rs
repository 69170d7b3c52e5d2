//! Devices without their threads, one step at a time: the input of a fuzz target
//! alone decides what happens, and when.

use thiserror::Error;

pub use crate::fs::ServerFailed;
pub use crate::fs::stepped::SteppedFileSystem;
pub use crate::net::stepped::SteppedNet;
pub use crate::vsock::stepped::SteppedVsock;

/// Why a device goes on no further, as its thread would have told.
#[derive(Debug, Error)]
pub enum Stopped {
    /// The guest broke the device, and must reset it.
    #[error("the guest broke the device: {0}")]
    Guest(String),
    /// The file server is of no use any more.
    #[error(transparent)]
    Server(ServerFailed),
}
