//! A queue in use, as a device sees it.

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::{Chain, ChainError, Interrupt};

/// A queue in use.
///
/// Any error means that the driver broke the queue's protocol (virtio 1.2
/// section 2.7): the device tells it as a guest fault and goes idle.
pub struct ActiveQueue {
    /// Index of the queue in the device.
    pub index: u16,
    /// The queue; its addresses have been checked against guest memory.
    pub queue: Queue,
    /// Fires when the driver notifies this queue.
    pub notified: EventFd,
    /// Requests given back since the driver was last considered for an
    /// interrupt.
    completed: Wrapping<u16>,
}

/// A queue that the driver broke.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The rings are out of their bounds.
    #[error("queue {queue} is broken")]
    Ring {
        /// Index of the queue.
        queue: u16,
        /// In what way.
        #[source]
        source: virtio_queue::Error,
    },
    /// A request is out of its bounds.
    #[error("request {head} in queue {queue} is malformed")]
    Chain {
        /// Index of the queue.
        queue: u16,
        /// Its first descriptor.
        head: u16,
        /// In what way.
        #[source]
        source: ChainError,
    },
}

/// Where the entries of both rings begin, after flags and index (sections 2.7.6
/// and 2.7.8). Entries of the available ring take two bytes, of the used ring
/// eight.
const RING_ENTRIES: u64 = 4;

impl ActiveQueue {
    /// A queue that nothing has been taken from since its positions were set.
    pub fn new(index: u16, queue: Queue, notified: EventFd) -> Self {
        Self {
            index,
            queue,
            notified,
            completed: Wrapping(0),
        }
    }

    /// Entries of its rings: so many requests at most can be in it at a time.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next request, if there is one.
    ///
    /// # Errors
    /// When the available ring or the request is malformed.
    pub fn pop(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Chain>, QueueError> {
        let queue = self.index;
        let size = self.queue.size();
        let chain = self
            .queue
            .iter(memory)
            .map_err(|source| QueueError::Ring { queue, source })?
            .next();
        let Some(chain) = chain else {
            return Ok(None);
        };
        let head = chain.head_index();
        match Chain::read(chain, size) {
            Ok(chain) => Ok(Some(chain)),
            Err(source) => Err(QueueError::Chain {
                queue,
                head,
                source,
            }),
        }
    }

    /// Puts the request that was popped last back, as if it had not been
    /// taken. Called again, it puts back the one before: only as many as were
    /// popped last and have not been completed.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a request back to the driver, with `written` bytes in its
    /// writable part.
    ///
    /// # Errors
    /// When `head` is not a descriptor of this queue, or the used ring cannot
    /// be written.
    pub fn complete(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.completed += 1;
        self.queue
            .add_used(memory, head, written)
            .map_err(|source| self.broken(source))
    }

    /// Gives several requests back at once, each a head and the bytes written
    /// to it: the driver sees all of them or none. At most as many as the queue
    /// has entries.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn complete_together(
        &mut self,
        memory: &GuestMemoryMmap,
        requests: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let Some((&(last, written), others)) = requests.split_last() else {
            return Ok(());
        };
        // The others lie in the ring beyond its index, which the last one then moves past all.
        let first = Wrapping(self.queue.next_used());
        let mut position = first;
        for &(head, written) in others {
            if head >= self.queue.size() {
                return Err(self.broken(virtio_queue::Error::InvalidDescriptorIndex));
            }
            let entry = u64::from(position.0 % self.queue.size());
            let element = u64::from(head) | u64::from(written) << 32;
            memory
                .write_slice(
                    &element.to_le_bytes(),
                    self.ring_address(self.queue.used_ring(), RING_ENTRIES + 8 * entry)?,
                )
                .map_err(|source| self.broken(virtio_queue::Error::GuestMemory(source)))?;
            position += 1;
        }
        self.completed += position - first;
        self.queue.set_next_used(position.0);
        self.complete(memory, last, written)
    }

    /// Tells the driver about completed requests, if it wants to know (section
    /// 2.7.7 and, with `VIRTIO_F_EVENT_IDX`, 2.7.7.2). To be called after each
    /// batch of [`complete`](Self::complete).
    ///
    /// # Errors
    /// When the rings cannot be read.
    pub fn signal(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
    ) -> Result<(), QueueError> {
        let mut wanted = self
            .queue
            .needs_notification(memory)
            .map_err(|source| self.broken(source))?;
        // The queue counts one of those that were completed together.
        if !wanted && self.queue.event_idx_enabled() {
            let event = Wrapping(self.used_event(memory)?);
            wanted = Wrapping(self.queue.next_used()) - event - Wrapping(1) < self.completed;
        }
        self.completed = Wrapping(0);
        if wanted {
            interrupt.used_buffers(self.index);
        }
        Ok(())
    }

    /// Asks the driver for notifications. True when requests are there already,
    /// for which none may come: go on popping.
    ///
    /// # Errors
    /// When the rings cannot be reached.
    pub fn listen(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(memory)
            .map_err(|source| self.broken(source))
    }

    /// The completed request that the driver waits for (section 2.7.10).
    fn used_event(&self, memory: &GuestMemoryMmap) -> Result<u16, QueueError> {
        let offset = RING_ENTRIES + 2 * u64::from(self.queue.size());
        let address = self.ring_address(self.queue.avail_ring(), offset)?;
        memory
            .load(address, Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(|source| self.broken(virtio_queue::Error::GuestMemory(source)))
    }

    fn ring_address(&self, ring: u64, offset: u64) -> Result<GuestAddress, QueueError> {
        ring.checked_add(offset)
            .map(GuestAddress)
            .ok_or_else(|| self.broken(virtio_queue::Error::AddressOverflow))
    }

    fn broken(&self, source: virtio_queue::Error) -> QueueError {
        QueueError::Ring {
            queue: self.index,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{self, Buffer, MockQueue, Raised};
    use proptest::prelude::*;

    const SIZE: u16 = 8;

    fn bench(event_idx: bool) -> (GuestMemoryMmap, MockQueue, ActiveQueue) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("memory");
        let driver = MockQueue::new(&memory, 0x1000, SIZE);
        let device = driver.active(0, event_idx);
        (memory, driver, device)
    }

    fn offer(driver: &mut MockQueue) -> u16 {
        driver.offer(&[Buffer {
            address: 0x4000,
            length: 16,
            writable: true,
        }])
    }

    #[test]
    fn undo_pop_of_several_gives_the_same_requests_again() {
        let (memory, mut driver, mut device) = bench(false);
        let heads = [(); 3].map(|()| offer(&mut driver));
        let pop = |device: &mut ActiveQueue| device.pop(&memory).expect("sound").expect("one");
        let first = heads.map(|_| pop(&mut device));
        device.undo_pop();
        device.undo_pop();
        let again = [pop(&mut device), pop(&mut device)];
        assert_eq!(first[1..], again);
        assert_eq!(again.map(|chain| chain.head), heads[1..]);
    }

    #[test]
    fn complete_together_of_a_head_that_is_none_gives_nothing_back() {
        let (memory, mut driver, mut device) = bench(false);
        let head = offer(&mut driver);
        for heads in [[head, SIZE], [SIZE, head]] {
            let requests = heads.map(|head| (head, 1));
            assert!(device.complete_together(&memory, &requests).is_err());
            assert_eq!(driver.take_used(), None);
        }
    }

    proptest! {
        /// Whichever the driver waits for, it hears of it, and in the order in
        /// which they were given back.
        #[test]
        fn complete_together_tells_of_each_request_once_and_when_it_is_awaited(
            counts in prop::collection::vec(0usize..=SIZE.into(), 1..20),
            ahead in 0u16..SIZE,
        ) {
            let (memory, mut driver, mut device) = bench(true);
            let (interrupt, raised) = mock::interrupt();
            let mut done = 0_u16;
            for count in counts {
                let requests: Vec<_> = (0..count)
                    .map(|index| (offer(&mut driver), index as u32))
                    .collect();
                let event = done.wrapping_add(ahead);
                driver.wait_for_used(event);
                device.complete_together(&memory, &requests).expect("sound");
                device.signal(&memory, interrupt.as_ref()).expect("sound");
                prop_assert_eq!(raised.try_recv() == Ok(Raised::Used(0)), usize::from(ahead) < count);
                let used: Vec<_> = std::iter::from_fn(|| driver.take_used()).collect();
                prop_assert_eq!(used, requests);
                done = done.wrapping_add(count as u16);
            }
        }
    }
}
