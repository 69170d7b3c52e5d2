//! What the network device saves: what its driver has read of it, which must not
//! change under it. The link is the host's, and made anew.

use serde::{Deserialize, Serialize};
use vmm_virtio::RestoreError;

use crate::saved;

const VERSION: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NetState {
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
}

impl NetState {
    pub(super) fn encode(self) -> Vec<u8> {
        saved::encode(VERSION, &self)
    }

    pub(super) fn decode(device: &str, bytes: &[u8]) -> Result<Self, RestoreError> {
        saved::decode(device, VERSION, bytes)
    }
}
