//! What a hostile driver does with a queue, for property tests.

use proptest::prelude::*;
use vmm_virtio::mock::{Buffer, MockQueue};

/// Buffers begin at a multiple of it, the first at 0: where tests put requests.
pub(crate) const BUFFER: u64 = 0x1000;
/// Buffers that a driver uses more often than others.
pub(crate) const BUFFERS: u64 = 8;

/// Something that a driver does.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// Offers a request of some buffers, readable ones first: a sound one, most
    /// of the time.
    Offer {
        readable: Vec<(u64, u32)>,
        writable: Vec<(u64, u32)>,
    },
    /// Writes a descriptor, which may be in use.
    Describe {
        index: u16,
        buffer: (u64, u32),
        flags: u16,
        next: u16,
    },
    /// Offers a descriptor as head, whatever it is.
    Publish(u16),
    /// Claims to have offered more or less.
    Claim(u16),
}

impl Act {
    /// Does it, with the buffers from `base` on.
    pub(crate) fn perform(self, queue: &mut MockQueue, base: u64) {
        let buffer = |(address, length): (u64, u32), writable| Buffer {
            address: base.wrapping_add(address),
            length,
            writable,
        };
        match self {
            Self::Offer { readable, writable } => {
                let readable = readable.into_iter().map(|it| buffer(it, false));
                let writable = writable.into_iter().map(|it| buffer(it, true));
                let buffers: Vec<_> = readable.chain(writable).collect();
                queue.offer(&buffers);
            }
            Self::Describe {
                index,
                buffer: it,
                flags,
                next,
            } => queue.write_descriptor(index, buffer(it, false), flags, next),
            Self::Publish(head) => queue.publish(head),
            Self::Claim(index) => queue.corrupt_available_index(index),
        }
    }
}

/// Anything that the driver of a queue of `size` entries may do.
pub(crate) fn act(size: u16) -> impl Strategy<Value = Act> {
    let buffers = || prop::collection::vec(buffer(), 0..4);
    prop_oneof![
        20 => (buffers(), buffers())
            .prop_map(|(readable, writable)| Act::Offer { readable, writable }),
        2 => (0..size, buffer(), 0u16..8, 0..=size).prop_map(|(index, buffer, flags, next)| {
            Act::Describe { index, buffer, flags, next }
        }),
        2 => (0..=size).prop_map(Act::Publish),
        1 => any::<u16>().prop_map(Act::Claim),
    ]
}

fn buffer() -> impl Strategy<Value = (u64, u32)> {
    let address = prop_oneof![
        20 => (0..BUFFERS).prop_map(|index| index * BUFFER),
        4 => 0..BUFFERS * BUFFER,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        20 => prop::sample::select(vec![0u32, 1, 39, 40, 44, 56, 100, 200, 0x1000]),
        4 => 0u32..0x2000,
        1 => any::<u32>(),
    ];
    (address, length)
}
