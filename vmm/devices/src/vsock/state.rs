//! What the socket device saves.

use serde::{Deserialize, Serialize};
use vmm_virtio::RestoreError;

use crate::saved;

const VERSION: u32 = 1;

/// Connections are not in it: their clients are gone when the state is taken
/// up, and the guest is told to end its side (virtio 1.2 section 5.10.6.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VsockState {
    pub(super) guest_cid: u32,
    /// The agent listens.
    pub(super) guest_ready: bool,
}

impl VsockState {
    pub(super) fn encode(self) -> Vec<u8> {
        saved::encode(VERSION, &self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, RestoreError> {
        saved::decode("socket device", VERSION, bytes)
    }
}
