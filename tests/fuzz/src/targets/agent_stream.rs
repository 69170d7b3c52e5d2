//! The header of a stdio stream, as the agent reads it.

use agent_protocol::{
    MAX_STREAM_HEADER_BYTES, STREAM_ACCEPTED, STREAM_REFUSED, decode_stream_header,
    encode_stream_header,
};

const _: () = assert!(STREAM_ACCEPTED != STREAM_REFUSED);

/// Tries one input.
pub fn run(data: &[u8]) {
    let Ok(header) = decode_stream_header(data) else {
        return;
    };
    assert!(data.len() <= MAX_STREAM_HEADER_BYTES);
    // Encoded anew, which may make it longer, it is the same.
    if let Ok(bytes) = encode_stream_header(&header) {
        let again = decode_stream_header(&bytes[2..]).expect("its own");
        assert_eq!(again, header);
    }
}
