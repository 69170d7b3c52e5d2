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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type State = (u32, String, Option<bool>, Vec<u8>);

    proptest! {
        #[test]
        fn decode_of_encode_is_the_state_and_of_anything_longer_or_shorter_nothing(
            state: State,
            version: u32,
            more in prop::collection::vec(any::<u8>(), 1..9),
        ) {
            let saved = encode(version, &state);
            let decoded = decode::<State>("device", version, &saved).expect("its own");
            prop_assert_eq!(decoded, state);
            prop_assert!(decode::<State>("device", version.wrapping_add(1), &saved).is_err());
            let longer = [saved.as_slice(), &more].concat();
            prop_assert!(decode::<State>("device", version, &longer).is_err());
            for length in 0..saved.len() {
                prop_assert!(decode::<State>("device", version, &saved[..length]).is_err());
            }
        }

        /// A length that it claims costs nothing before it is there.
        #[test]
        fn decode_any_bytes_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode::<State>("device", 1, &bytes);
            if let Some(version) = bytes.first_mut() {
                *version = 1;
            }
            let _ = decode::<State>("device", 1, &bytes);
        }
    }
}
