//! Seeds the guest's generator from the host's before any container exists: a
//! PVH boot hands the kernel no seed.

use std::{fs::File, io};

use crate::kernel_calls::{ENTROPY_BYTES, add_entropy};

/// Least entropy that the host must send, in bytes.
pub const MIN_BYTES: usize = 32;

/// Mixes what the host sent into the kernel's generator and reseeds it.
///
/// # Errors
/// When there is too little of it, or the kernel refuses.
pub fn seed(bytes: &[u8]) -> io::Result<()> {
    if bytes.len() < MIN_BYTES {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let random = File::open("/dev/random")?;
    let mut block = [0; ENTROPY_BYTES];
    let used = bytes.len().min(ENTROPY_BYTES);
    block[..used].copy_from_slice(&bytes[..used]);
    add_entropy(&random, block, used)
}
