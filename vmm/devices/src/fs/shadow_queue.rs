//! The driver's side of a virtqueue in bounce memory (virtio 1.2 section 2.7),
//! with the file server as the device: here it is the device that may lie.
//!
//! Each slot has two descriptors of its own, for request and reply, so a
//! descriptor's index names the slot, and there is no list of free ones for
//! anybody to corrupt.

use std::io;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use vhost::VringConfigData;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::bounce::Bounce;

/// Bytes of a queue's part of the bounce memory.
const QUEUE_BYTES: u64 = Bounce::RINGS_BYTES / 2;
/// Entries of each queue: two for each slot, as a power of two.
const SIZE: u16 = 256;

/// Offsets in a queue's part.
const AVAILABLE: u64 = 16 * SIZE as u64;
const USED: u64 = AVAILABLE + 8 * SIZE as u64;

const _: () = assert!(2 * Bounce::SLOTS <= SIZE);
const _: () = assert!(USED + 8 * SIZE as u64 + 8 <= QUEUE_BYTES);

/// A file server that broke the queue's protocol.
#[derive(Debug, Error)]
pub(super) enum Broken {
    /// More used entries than requests.
    #[error("it returned {returned} requests, of {in_flight} that it had")]
    Returned {
        /// Entries in the used ring that are new.
        returned: u16,
        /// Requests that it had.
        in_flight: u16,
    },
    /// A descriptor that is no request's.
    #[error("it returned a request {id} that it did not have")]
    Unknown {
        /// As in the used ring.
        id: u32,
    },
    /// Our own memory cannot be reached.
    #[error("the queue cannot be reached")]
    Memory(#[from] GuestMemoryError),
}

/// A request that the file server has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) slot: u16,
    /// Bytes that it says to have written.
    pub(super) written: u32,
}

/// A part of bounce memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) address: u64,
    pub(super) bytes: u32,
}

pub(super) struct ShadowQueue {
    base: u64,
    next_available: Wrapping<u16>,
    /// `next_available` when the file server was last notified.
    notified_at: Wrapping<u16>,
    next_used: Wrapping<u16>,
    in_flight: u16,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
}

impl ShadowQueue {
    pub(super) fn try_new(index: u64) -> io::Result<Self> {
        Ok(Self {
            base: index * QUEUE_BYTES,
            next_available: Wrapping(0),
            notified_at: Wrapping(0),
            next_used: Wrapping(0),
            in_flight: 0,
            kick: EventFd::new(EFD_NONBLOCK)?,
            call: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// As before its first use.
    pub(super) fn clear(&mut self, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        memory.write_slice(&vec![0; QUEUE_BYTES as usize], GuestAddress(self.base))?;
        self.next_available = Wrapping(0);
        self.notified_at = Wrapping(0);
        self.next_used = Wrapping(0);
        self.in_flight = 0;
        let _ = self.kick.read();
        let _ = self.call.read();
        Ok(())
    }

    pub(super) fn config(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: Bounce::front_end_address(self.base),
            avail_ring_addr: Bounce::front_end_address(self.base + AVAILABLE),
            used_ring_addr: Bounce::front_end_address(self.base + USED),
            log_addr: None,
        }
    }

    pub(super) fn size() -> u16 {
        SIZE
    }

    /// Descriptor table, available and used ring, in bounce memory.
    #[cfg(feature = "stepped")]
    pub(super) fn addresses(&self) -> [u64; 3] {
        [0, AVAILABLE, USED].map(|offset| self.base + offset)
    }

    /// Makes a slot's request available; [`notify`](Self::notify) tells the
    /// file server.
    pub(super) fn submit(
        &mut self,
        memory: &GuestMemoryMmap,
        slot: u16,
        request: Part,
        reply: Option<Part>,
    ) -> Result<(), Broken> {
        let head = 2 * slot;
        let next = if reply.is_some() {
            VRING_DESC_F_NEXT
        } else {
            0
        };
        self.write_descriptor(memory, head, request, next)?;
        if let Some(reply) = reply {
            self.write_descriptor(memory, head + 1, reply, VRING_DESC_F_WRITE)?;
        }
        let entry = u64::from(self.next_available.0 % SIZE);
        let available = self.base + AVAILABLE;
        memory.write_obj(head, GuestAddress(available + 4 + 2 * entry))?;
        self.next_available += 1;
        self.in_flight += 1;
        memory.store(
            self.next_available.0,
            GuestAddress(available + 2),
            Ordering::Release,
        )?;
        Ok(())
    }

    /// Tells the file server about new requests, if it wants to know (section
    /// 2.7.10).
    pub(super) fn notify(&mut self, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        // Its wish must be read after our index is visible.
        fence(Ordering::SeqCst);
        let event: u16 = memory.load(
            GuestAddress(self.base + USED + 4 + 8 * u64::from(SIZE)),
            Ordering::Relaxed,
        )?;
        let (old, new) = (self.notified_at, self.next_available);
        if new - Wrapping(event) - Wrapping(1) < new - old {
            // Fails only when the counter is full, and then it is set.
            let _ = self.kick.write(1);
        }
        self.notified_at = new;
        Ok(())
    }

    /// Takes the next returned request.
    pub(super) fn take_used(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Used>, Broken> {
        let used = self.base + USED;
        let index: u16 = memory.load(GuestAddress(used + 2), Ordering::Acquire)?;
        let returned = (Wrapping(index) - self.next_used).0;
        if returned == 0 {
            return Ok(None);
        }
        if returned > self.in_flight {
            return Err(Broken::Returned {
                returned,
                in_flight: self.in_flight,
            });
        }
        let entry = used + 4 + 8 * u64::from(self.next_used.0 % SIZE);
        let id: u32 = memory.read_obj(GuestAddress(entry))?;
        let written = memory.read_obj(GuestAddress(entry + 4))?;
        self.next_used += 1;
        self.in_flight -= 1;
        match u16::try_from(id) {
            Ok(head) if head % 2 == 0 && head / 2 < Bounce::SLOTS => Ok(Some(Used {
                slot: head / 2,
                written,
            })),
            _ => Err(Broken::Unknown { id }),
        }
    }

    /// Asks to be told about the next returned request. True when there is one
    /// already.
    pub(super) fn listen(&self, memory: &GuestMemoryMmap) -> Result<bool, Broken> {
        memory.store(
            self.next_used.0,
            GuestAddress(self.base + AVAILABLE + 4 + 2 * u64::from(SIZE)),
            Ordering::Relaxed,
        )?;
        // Its index must be read after our wish is visible.
        fence(Ordering::SeqCst);
        let index: u16 = memory.load(GuestAddress(self.base + USED + 2), Ordering::Relaxed)?;
        Ok(index != self.next_used.0)
    }

    /// Returns a request as the file server would, or would not.
    #[cfg(test)]
    pub(super) fn pretend_used(&self, memory: &GuestMemoryMmap, index: u16, id: u32, written: u32) {
        let used = self.base + USED;
        let entry = used + 4 + 8 * u64::from(index % SIZE);
        for (address, value) in [(entry, id), (entry + 4, written)] {
            memory
                .write_obj(value, GuestAddress(address))
                .expect("in memory");
        }
        memory
            .write_obj(index.wrapping_add(1), GuestAddress(used + 2))
            .expect("in memory");
    }

    fn write_descriptor(
        &self,
        memory: &GuestMemoryMmap,
        index: u16,
        part: Part,
        flags: u32,
    ) -> Result<(), Broken> {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&part.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&part.bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&(flags as u16).to_le_bytes());
        bytes[14..16].copy_from_slice(&(index + 1).to_le_bytes());
        memory.write_slice(&bytes, GuestAddress(self.base + 16 * u64::from(index)))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn queue() -> (Bounce, ShadowQueue) {
        let bounce = Bounce::try_new().expect("memory");
        let mut queue = ShadowQueue::try_new(1).expect("queue");
        queue.clear(bounce.memory()).expect("clear");
        (bounce, queue)
    }

    fn submit(bounce: &Bounce, queue: &mut ShadowQueue, slot: u16) {
        let part = Part {
            address: 0x10000,
            bytes: 40,
        };
        queue
            .submit(bounce.memory(), slot, part, Some(part))
            .expect("submits");
    }

    #[test]
    fn take_used_gives_the_slot_that_was_submitted() {
        let (bounce, mut queue) = queue();
        submit(&bounce, &mut queue, 5);
        queue.notify(bounce.memory()).expect("notify");
        assert!(queue.kick.read().is_ok());
        assert_eq!(queue.take_used(bounce.memory()).expect("sound"), None);
        queue.pretend_used(bounce.memory(), 0, 10, 16);
        assert!(queue.listen(bounce.memory()).expect("listen"));
        let used = queue.take_used(bounce.memory()).expect("sound");
        let expected = Used {
            slot: 5,
            written: 16,
        };
        assert_eq!(used, Some(expected));
        assert!(!queue.listen(bounce.memory()).expect("listen"));
    }

    #[test]
    fn take_used_without_requests_in_flight_is_broken() {
        let (bounce, mut queue) = queue();
        queue.pretend_used(bounce.memory(), 0, 0, 16);
        assert!(matches!(
            queue.take_used(bounce.memory()),
            Err(Broken::Returned {
                returned: 1,
                in_flight: 0
            })
        ));
    }

    #[test]
    fn take_used_with_an_odd_or_unknown_descriptor_is_broken() {
        for id in [1, 2 * u32::from(Bounce::SLOTS), u32::MAX] {
            let (bounce, mut queue) = queue();
            submit(&bounce, &mut queue, 0);
            queue.pretend_used(bounce.memory(), 0, id, 16);
            assert!(matches!(
                queue.take_used(bounce.memory()),
                Err(Broken::Unknown { .. })
            ));
        }
    }

    proptest! {
        /// Whatever the file server writes into its rings.
        #[test]
        fn take_used_from_any_ring_never_panics_and_never_returns_more_than_was_submitted(
            ring in proptest::collection::vec(any::<u8>(), 64),
            slots in 0u16..20,
        ) {
            let (bounce, mut queue) = queue();
            for slot in 0..slots {
                submit(&bounce, &mut queue, slot);
            }
            bounce.memory().write_slice(&ring, GuestAddress(QUEUE_BYTES + USED)).expect("write");
            let mut taken = 0;
            while let Ok(Some(used)) = queue.take_used(bounce.memory()) {
                prop_assert!(used.slot < Bounce::SLOTS);
                taken += 1;
            }
            prop_assert!(taken <= slots);
        }
    }
}
