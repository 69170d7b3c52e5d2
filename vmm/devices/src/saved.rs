//! How the devices encode what they save.

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmm_virtio::RestoreError;

/// Encodes a device's state, its version first.
pub(crate) fn encode<T: Serialize>(version: u32, state: &T) -> Vec<u8> {
    // Plain data into memory: nothing here can fail.
    postcard::to_stdvec(&(version, state)).unwrap_or_default()
}

/// Decodes what [`encode`] made.
///
/// # Errors
/// When it is of another version, malformed, or followed by something.
pub(crate) fn decode<T: DeserializeOwned>(
    device: &str,
    version: u32,
    bytes: &[u8],
) -> Result<T, RestoreError> {
    let error = |reason: String| RestoreError {
        device: device.to_owned(),
        reason,
    };
    let (saved, rest) = postcard::take_from_bytes::<u32>(bytes)
        .map_err(|malformed| error(malformed.to_string()))?;
    if saved != version {
        return Err(error(format!(
            "it is of version {saved}, this build reads version {version}"
        )));
    }
    match postcard::take_from_bytes(rest) {
        Ok((state, [])) => Ok(state),
        Ok((_, rest)) => Err(error(format!("{} bytes follow it", rest.len()))),
        Err(malformed) => Err(error(malformed.to_string())),
    }
}
