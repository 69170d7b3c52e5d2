//! Packets of the socket device (virtio 1.2 section 5.10.6).
//!
//! The header is decoded here, and not by the virtio-vsock crate, because that
//! takes payloads in one buffer only: Linux scatters them when a program in the
//! guest sends with `MSG_ZEROCOPY`.

/// Length of a header.
pub(super) const HEADER_BYTES: usize = 44;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const TYPE_STREAM: u16 = 1;

/// Asks for a connection.
pub(super) const OP_REQUEST: u16 = 1;
/// Accepts one.
pub(super) const OP_RESPONSE: u16 = 2;
/// Refuses or breaks one, or confirms its end.
pub(super) const OP_RST: u16 = 3;
/// Ends one or both directions.
pub(super) const OP_SHUTDOWN: u16 = 4;
/// Carries payload.
pub(super) const OP_RW: u16 = 5;
/// Tells the sender's buffer space.
pub(super) const OP_CREDIT_UPDATE: u16 = 6;
/// Asks for the receiver's buffer space.
pub(super) const OP_CREDIT_REQUEST: u16 = 7;

/// `flags` of [`OP_SHUTDOWN`]: the sender will not receive any more
/// (`VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE` is the bit's number).
pub(super) const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// The sender will not send any more.
pub(super) const SHUTDOWN_SEND: u32 = 1 << 1;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) socket_type: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let u16_at = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            socket_type: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn encode_puts_fields_where_the_specification_has_them() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            dst_port: 1024,
            len: 5,
            socket_type: TYPE_STREAM,
            op: OP_RW,
            flags: 0,
            buf_alloc: 0x0001_0000,
            fwd_cnt: 7,
        };
        assert_eq!(
            header.encode(),
            [
                3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 0, 4, 0, 0, 5, 0, 0, 0,
                1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1, 0, 7, 0, 0, 0,
            ]
        );
    }

    proptest! {
        #[test]
        fn encode_of_decode_is_the_same_bytes(bytes in proptest::array::uniform32(any::<u8>()), rest in proptest::array::uniform12(any::<u8>())) {
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::decode(&all).encode(), all);
        }
    }
}
