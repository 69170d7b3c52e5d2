//! Requests and responses, as they are in guest memory (virtio 1.2 section
//! 5.15.6; `struct virtio_mem_req` and `virtio_mem_resp` of Linux' `virtio_mem.h`).

use super::blocks::State;

/// Bytes of a request.
pub(super) const REQUEST_BYTES: usize = 24;
/// Bytes of a response.
pub(super) const RESPONSE_BYTES: usize = 10;

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Named),
    Unplug(Named),
    UnplugAll,
    State(Named),
}

/// Blocks as the guest names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) address: u64,
    pub(super) count: u16,
}

impl Request {
    /// `None` for a type that does not exist.
    pub(super) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let mut address = [0; 8];
        address.copy_from_slice(&bytes[8..16]);
        let named = Named {
            address: u64::from_le_bytes(address),
            count: u16::from_le_bytes([bytes[16], bytes[17]]),
        };
        match u16::from_le_bytes([bytes[0], bytes[1]]) {
            0 => Some(Self::Plug(named)),
            1 => Some(Self::Unplug(named)),
            2 => Some(Self::UnplugAll),
            3 => Some(Self::State(named)),
            _ => None,
        }
    }
}

/// What it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    Ack,
    /// The answer to a question.
    State(State),
    Nack,
    /// Not now.
    Busy,
    Error,
}

impl Response {
    pub(super) fn encode(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state) = match self {
            Self::Ack | Self::State(State::Plugged) => (0_u8, 0_u8),
            Self::State(State::Unplugged) => (0, 1),
            Self::State(State::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        let mut bytes = [0; RESPONSE_BYTES];
        bytes[0] = kind;
        bytes[8] = state;
        bytes
    }
}
