//! One request: its descriptors, read once and checked.

use std::ops::Deref;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions, VolatileSlice,
};

/// A request of the driver.
///
/// It is a copy of the descriptors, so the driver cannot change them while the
/// device works, and it holds no borrow of guest memory, so a device can keep
/// it for as long as the work takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Index of the first descriptor; names the request to the driver.
    pub head: u16,
    /// What the device reads.
    pub readable: Segments,
    /// What the device writes.
    pub writable: Segments,
}

/// Why a request cannot be served.
#[derive(Debug, Error)]
pub enum ChainError {
    /// The chain does not end, or leads to a descriptor that is not there.
    #[error("its descriptors do not end after {count}")]
    Endless {
        /// How many were read.
        count: usize,
    },
    /// No descriptors at all.
    #[error("it has no descriptors")]
    Empty,
    /// A readable descriptor after a writable one (virtio 1.2 section
    /// 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// A buffer that guest memory does not hold.
    #[error("its buffer of {bytes} bytes at {address:#x} is outside guest memory")]
    Outside {
        /// Guest physical address.
        address: u64,
        /// Length.
        bytes: u32,
    },
    /// An access beyond the request's end.
    #[error("bytes {offset} to {end} are needed, but it has {length}")]
    TooShort {
        /// First byte wanted.
        offset: usize,
        /// First byte not wanted.
        end: usize,
        /// Bytes there.
        length: usize,
    },
    /// Guest memory that cannot be reached although it was checked.
    #[error("guest memory cannot be accessed")]
    Memory(#[source] GuestMemoryError),
}

impl Chain {
    /// Reads and checks all descriptors of a chain in a queue of `queue_size`
    /// entries.
    ///
    /// # Errors
    /// See [`ChainError`]. A chain longer than the queue is endless (section
    /// 2.7.5.3.1 forbids it for indirect ones as well).
    pub fn read<M>(mut chain: DescriptorChain<M>, queue_size: u16) -> Result<Self, ChainError>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        let mut request = Self {
            head: chain.head_index(),
            readable: Segments::default(),
            writable: Segments::default(),
        };
        let mut count = 0;
        let mut more = false;
        while let Some(descriptor) = chain.next() {
            count += 1;
            if count > usize::from(queue_size) {
                return Err(ChainError::Endless { count });
            }
            more = descriptor.has_next();
            let (address, bytes) = (descriptor.addr(), descriptor.len());
            let access = if descriptor.is_write_only() {
                Permissions::Write
            } else {
                Permissions::Read
            };
            if bytes > 0 && !chain.memory().check_range(address, bytes as usize, access) {
                return Err(ChainError::Outside {
                    address: address.0,
                    bytes,
                });
            }
            if descriptor.is_write_only() {
                request.writable.push(address, bytes);
            } else if request.writable.list.is_empty() {
                request.readable.push(address, bytes);
            } else {
                return Err(ChainError::Order);
            }
        }
        // The iterator ends in silence on whatever it cannot follow.
        if more {
            Err(ChainError::Endless { count })
        } else if count == 0 {
            Err(ChainError::Empty)
        } else {
            Ok(request)
        }
    }
}

/// The readable or the writable part of a request: a string of bytes scattered
/// over guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    list: Vec<(GuestAddress, u32)>,
    length: usize,
}

impl Segments {
    /// Bytes in it. At most 4 GiB: the chain's iterator refuses more.
    pub fn len(&self) -> usize {
        self.length
    }

    /// No bytes in it.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Descriptors that it is scattered over.
    pub fn count(&self) -> usize {
        self.list.len()
    }

    /// The stretches of guest memory that it is scattered over, in order, with their
    /// bytes.
    pub fn ranges(&self) -> impl Iterator<Item = (GuestAddress, u32)> + '_ {
        self.list.iter().copied()
    }

    /// Copies bytes from `offset` on into `buffer`.
    ///
    /// # Errors
    /// When there are too few.
    pub fn read_at(
        &self,
        memory: &GuestMemoryMmap,
        offset: usize,
        buffer: &mut [u8],
    ) -> Result<(), ChainError> {
        let mut done = 0;
        for (address, bytes) in self.pieces(offset, buffer.len())? {
            memory
                .read_slice(&mut buffer[done..done + bytes], address)
                .map_err(ChainError::Memory)?;
            done += bytes;
        }
        Ok(())
    }

    /// Copies `bytes` to `offset` and on.
    ///
    /// # Errors
    /// When there is too little room.
    pub fn write_at(
        &self,
        memory: &GuestMemoryMmap,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), ChainError> {
        let mut done = 0;
        for (address, length) in self.pieces(offset, bytes.len())? {
            memory
                .write_slice(&bytes[done..done + length], address)
                .map_err(ChainError::Memory)?;
            done += length;
        }
        Ok(())
    }

    /// Calls `visit` with each contiguous piece of guest memory of
    /// `length` bytes from `offset` on, in order, until it returns false. For
    /// descriptors and other memory that can be read or written in place.
    ///
    /// # Errors
    /// When there are too few bytes.
    pub fn for_each_slice<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        offset: usize,
        length: usize,
        mut visit: impl FnMut(VolatileSlice<'m>) -> bool,
    ) -> Result<(), ChainError> {
        for (address, bytes) in self.pieces(offset, length)? {
            let slices = memory
                .get_slices(address, bytes, Permissions::ReadWrite)
                .map_err(ChainError::Memory)?;
            for slice in slices {
                if !visit(slice.map_err(ChainError::Memory)?) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, address: GuestAddress, bytes: u32) {
        self.list.push((address, bytes));
        self.length += bytes as usize;
    }

    /// The parts of the segments that hold `length` bytes from `offset` on.
    fn pieces(
        &self,
        offset: usize,
        length: usize,
    ) -> Result<impl Iterator<Item = (GuestAddress, usize)>, ChainError> {
        let end = offset.saturating_add(length);
        if end > self.length {
            return Err(ChainError::TooShort {
                offset,
                end,
                length: self.length,
            });
        }
        let mut start = 0;
        Ok(self.list.iter().filter_map(move |&(address, bytes)| {
            let (first, bytes) = (start, bytes as usize);
            start += bytes;
            let from = offset.max(first);
            let to = end.min(first + bytes);
            // No overflow: the whole segment was checked to lie in memory.
            (from < to).then(|| (GuestAddress(address.0 + (from - first) as u64), to - from))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{Buffer, MockQueue};
    use crate::{ActiveQueue, QueueError};
    use proptest::prelude::*;
    use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT};

    const NEXT: u16 = VRING_DESC_F_NEXT as u16;

    fn bench() -> (GuestMemoryMmap, MockQueue, ActiveQueue) {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 0x1_0000),
            (GuestAddress(0x1_0000), 0x1_0000),
        ])
        .expect("memory");
        let driver = MockQueue::new(&memory, 0x1000, 16);
        let device = driver.active(0, false);
        (memory, driver, device)
    }

    fn buffer(address: u64, length: u32, writable: bool) -> Buffer {
        Buffer {
            address,
            length,
            writable,
        }
    }

    #[test]
    fn pop_gives_both_parts_of_a_request() {
        let (memory, mut driver, mut device) = bench();
        let head = driver.offer(&[
            buffer(0x4000, 3, false),
            buffer(0x5000, 2, false),
            buffer(0x6000, 8, true),
        ]);
        memory
            .write_slice(b"abc", GuestAddress(0x4000))
            .expect("write");
        memory
            .write_slice(b"de", GuestAddress(0x5000))
            .expect("write");
        let chain = device.pop(&memory).expect("sound").expect("one");
        assert_eq!(chain.head, head);
        assert_eq!((chain.readable.len(), chain.writable.len()), (5, 8));
        let mut bytes = [0; 3];
        chain
            .readable
            .read_at(&memory, 1, &mut bytes)
            .expect("there");
        assert_eq!(&bytes, b"bcd");
        assert!(matches!(
            chain.readable.read_at(&memory, 3, &mut bytes),
            Err(ChainError::TooShort {
                offset: 3,
                end: 6,
                length: 5
            })
        ));
        assert_eq!(device.pop(&memory).expect("sound"), None);
        device.complete(&memory, head, 8).expect("completes");
        assert_eq!(driver.take_used(), Some((head, 8)));
    }

    #[test]
    fn write_at_across_regions_and_segments_keeps_the_order() {
        let (memory, mut driver, mut device) = bench();
        driver.offer(&[buffer(0xfffe, 4, true), buffer(0x4000, 4, true)]);
        let chain = device.pop(&memory).expect("sound").expect("one");
        chain
            .writable
            .write_at(&memory, 1, b"abcdef")
            .expect("there");
        let mut pieces = Vec::new();
        chain
            .writable
            .for_each_slice(&memory, 0, 8, |slice| {
                let mut bytes = vec![0; slice.len()];
                slice.copy_to(&mut bytes);
                pieces.push(bytes);
                true
            })
            .expect("there");
        assert_eq!(pieces, [b"\0a".to_vec(), b"bc".to_vec(), b"def\0".to_vec()]);
    }

    #[test]
    fn pop_undone_gives_the_same_request_again() {
        let (memory, mut driver, mut device) = bench();
        driver.offer(&[buffer(0x4000, 3, false)]);
        let chain = device.pop(&memory).expect("sound");
        device.undo_pop();
        assert_eq!(device.pop(&memory).expect("sound"), chain);
    }

    fn fault(prepare: impl FnOnce(&mut MockQueue)) -> ChainError {
        let (memory, mut driver, mut device) = bench();
        prepare(&mut driver);
        match device.pop(&memory) {
            Err(QueueError::Chain { source, .. }) => source,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn pop_loop_of_descriptors_is_endless() {
        let error = fault(|driver| {
            driver.write_descriptor(0, buffer(0x4000, 1, false), NEXT, 1);
            driver.write_descriptor(1, buffer(0x4000, 1, false), NEXT, 0);
            driver.publish(0);
        });
        assert!(matches!(error, ChainError::Endless { .. }));
    }

    #[test]
    fn pop_chain_to_a_descriptor_that_is_not_there_is_endless() {
        let error = fault(|driver| {
            driver.write_descriptor(0, buffer(0x4000, 1, false), NEXT, 16);
            driver.publish(0);
        });
        assert!(matches!(error, ChainError::Endless { count: 1 }));
    }

    #[test]
    fn pop_head_beyond_the_queue_is_empty() {
        let error = fault(|driver| driver.publish(16));
        assert!(matches!(error, ChainError::Empty));
    }

    #[test]
    fn pop_indirect_table_outside_memory_is_empty() {
        let error = fault(|driver| {
            let flags = VRING_DESC_F_INDIRECT as u16;
            driver.write_descriptor(0, buffer(1 << 40, 32, false), flags, 0);
            driver.publish(0);
        });
        assert!(matches!(error, ChainError::Empty));
    }

    #[test]
    fn pop_readable_after_writable_is_refused() {
        let error = fault(|driver| {
            driver.offer(&[buffer(0x4000, 1, true), buffer(0x4000, 1, false)]);
        });
        assert!(matches!(error, ChainError::Order));
    }

    #[test]
    fn pop_buffer_outside_memory_is_refused() {
        for (address, length) in [(0x1_fff0, 0x20), (1 << 40, 1), (u64::MAX, 2)] {
            let error = fault(|driver| {
                driver.offer(&[buffer(address, length, false)]);
            });
            assert!(matches!(error, ChainError::Outside { .. }), "{address:#x}");
        }
    }

    #[test]
    fn pop_with_an_available_index_far_ahead_is_a_broken_ring() {
        let (memory, driver, mut device) = bench();
        driver.corrupt_available_index(17);
        assert!(matches!(
            device.pop(&memory),
            Err(QueueError::Ring { queue: 0, .. })
        ));
    }

    proptest! {
        /// Whatever is in the descriptor table and the available ring.
        #[test]
        fn pop_from_any_memory_never_panics_and_gives_only_what_lies_in_it(
            ring in prop::collection::vec(any::<u8>(), 16 * 16 + 40),
            small in prop::collection::vec((0u64..0x2_1000, 0u32..0x2000, 0u16..8, 0u16..17), 16),
            plausible: bool,
        ) {
            let (memory, driver, mut device) = bench();
            memory.write_slice(&ring, GuestAddress(0x1000)).expect("write");
            if plausible {
                for (index, (address, length, flags, next)) in small.into_iter().enumerate() {
                    driver.write_descriptor(index as u16, buffer(address, length, false), flags, next);
                }
                driver.corrupt_available_index(u16::from(ring[0]) % 17);
            }
            while let Ok(Some(chain)) = device.pop(&memory) {
                for part in [&chain.readable, &chain.writable] {
                    let mut bytes = vec![0; part.len()];
                    prop_assert!(part.read_at(&memory, 0, &mut bytes).is_ok());
                    prop_assert!(part.write_at(&memory, 1, &bytes).is_err());
                }
            }
        }
    }
}
