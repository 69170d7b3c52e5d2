//! The first bytes of a stdio stream.

use protobuf::Message;
use thiserror::Error;

use crate::api::StreamHeader;

/// Longest encoded header, without its two bytes of length.
pub const MAX_STREAM_HEADER_BYTES: usize = 1024;
/// The agent's one-byte answer to a header that it accepts.
pub const STREAM_ACCEPTED: u8 = 0;
/// The agent's one-byte answer to a header that it refuses.
pub const STREAM_REFUSED: u8 = 1;

/// A header that cannot be sent or understood.
#[derive(Debug, Error)]
pub enum StreamHeaderError {
    /// Longer than [`MAX_STREAM_HEADER_BYTES`].
    #[error("stream header of {bytes} bytes: at most {MAX_STREAM_HEADER_BYTES}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Not a protobuf message of this shape.
    #[error("stream header cannot be read")]
    Malformed(#[source] protobuf::Error),
}

/// Encodes a header with its big-endian length in front.
///
/// # Errors
/// When the identities in it make it longer than the contract allows.
pub fn encode_stream_header(header: &StreamHeader) -> Result<Vec<u8>, StreamHeaderError> {
    let body = header
        .write_to_bytes()
        .map_err(StreamHeaderError::Malformed)?;
    let length = u16::try_from(body.len())
        .ok()
        .filter(|length| usize::from(*length) <= MAX_STREAM_HEADER_BYTES)
        .ok_or(StreamHeaderError::TooLong { bytes: body.len() })?;
    Ok([&length.to_be_bytes()[..], &body].concat())
}

/// Decodes a header from the bytes after its length.
///
/// # Errors
/// Too long, or not a header.
pub fn decode_stream_header(body: &[u8]) -> Result<StreamHeader, StreamHeaderError> {
    if body.len() > MAX_STREAM_HEADER_BYTES {
        return Err(StreamHeaderError::TooLong { bytes: body.len() });
    }
    StreamHeader::parse_from_bytes(body).map_err(StreamHeaderError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{ProcessId, stream_header::Kind};
    use proptest::prelude::*;
    use protobuf::{EnumOrUnknown, MessageField};

    fn header(container_id: String) -> StreamHeader {
        StreamHeader {
            process: MessageField::some(ProcessId {
                container_id,
                ..ProcessId::default()
            }),
            kind: EnumOrUnknown::new(Kind::STDOUT),
            ..StreamHeader::default()
        }
    }

    #[test]
    fn encode_identity_beyond_the_limit_is_refused() {
        let long = header("x".repeat(MAX_STREAM_HEADER_BYTES));
        assert!(matches!(
            encode_stream_header(&long),
            Err(StreamHeaderError::TooLong { .. })
        ));
    }

    proptest! {
        #[test]
        fn decode_of_encode_is_the_header(id in "[a-z0-9-]{0,76}") {
            let bytes = encode_stream_header(&header(id.clone())).expect("encodes");
            let (length, body) = bytes.split_at(2);
            prop_assert_eq!(usize::from(u16::from_be_bytes([length[0], length[1]])), body.len());
            prop_assert_eq!(decode_stream_header(body).expect("decodes"), header(id));
        }

        #[test]
        fn decode_any_bytes_never_panics(body in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = decode_stream_header(&body);
        }
    }
}
