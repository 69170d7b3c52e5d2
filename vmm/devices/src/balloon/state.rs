//! What the balloon device saves: nothing but the version.

use vmm_virtio::RestoreError;

use crate::saved;

const VERSION: u32 = 1;

pub(super) fn save() -> Vec<u8> {
    saved::encode(VERSION, &())
}

pub(super) fn restore(state: &[u8]) -> Result<(), RestoreError> {
    saved::decode(super::DEVICE, VERSION, state)
}
