//! What the memory device saves: which blocks are plugged, and what was asked for.

use vmm_virtio::RestoreError;

use super::DEVICE;
use super::blocks::Blocks;
use crate::saved;

const VERSION: u32 = 1;

pub(super) fn save(blocks: &Blocks) -> Vec<u8> {
    saved::encode(VERSION, blocks)
}

/// Of the same region as `blocks`.
pub(super) fn restore(blocks: &Blocks, state: &[u8]) -> Result<Blocks, RestoreError> {
    let restored: Blocks = saved::decode(DEVICE, VERSION, state)?;
    if blocks.fits(&restored) {
        Ok(restored)
    } else {
        Err(RestoreError {
            device: DEVICE.to_owned(),
            reason: "it is of another region".to_owned(),
        })
    }
}
