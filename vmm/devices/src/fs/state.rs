//! What the file system device saves.

use serde::{Deserialize, Serialize};
use vmm_virtio::RestoreError;

use crate::saved;

const VERSION: u32 = 1;

/// The file server's state (open files, inodes) is not in it: it travels from
/// file server to file server, by vhost-user's own means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileSystemState {
    pub(super) tag: String,
    /// Guest and file server agreed on the longer layout of `FUSE_SETXATTR`.
    pub(super) setxattr_ext: bool,
}

impl FileSystemState {
    pub(super) fn encode(&self) -> Vec<u8> {
        saved::encode(VERSION, self)
    }

    pub(super) fn decode(device: &str, bytes: &[u8]) -> Result<Self, RestoreError> {
        saved::decode(device, VERSION, bytes)
    }
}
