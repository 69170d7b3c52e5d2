//! Buffers of the guest for the next frame from the tap.

use std::collections::VecDeque;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::GuestMemoryMmap;
use vmm_virtio::{ActiveQueue, Chain, ChainError};

use super::header::{Accepted, FLAGS, HEADER_BYTES, NUM_BUFFERS};
use super::tap::Pieces;
use super::worker::Fault;

/// Requests taken from the receive queue and not filled yet, in their order.
/// With `VIRTIO_NET_F_MRG_RXBUF` a frame fills as many as it needs (virtio 1.2
/// section 5.1.6.4), without it exactly one; the rest is kept for the next, so
/// that each is read and checked once.
pub(super) struct Room {
    accepted: Accepted,
    /// Of the largest frame, header included.
    frame_bytes: usize,
    chains: VecDeque<Chain>,
    bytes: usize,
    pieces: usize,
}

impl Room {
    pub(super) fn new(accepted: Accepted, mtu: u16) -> Self {
        Self {
            accepted,
            frame_bytes: accepted.largest_frame(mtu),
            chains: VecDeque::new(),
            bytes: 0,
            pieces: 0,
        }
    }

    /// Takes what the next frame may need. False when the driver must offer
    /// more first, which it is then asked to tell.
    pub(super) fn gather(
        &mut self,
        rx: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, Fault> {
        while !self.is_enough(rx) {
            match rx.pop(memory)? {
                Some(chain) => self.take(chain)?,
                None if rx.listen(memory)? => {}
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    fn is_enough(&self, rx: &ActiveQueue) -> bool {
        if !self.accepted.has(VIRTIO_NET_F_MRG_RXBUF) {
            return !self.chains.is_empty();
        }
        // A driver that has offered all it can, or in crumbs, gets what fits: more will not come.
        self.bytes >= self.frame_bytes
            || self.chains.len() >= usize::from(rx.size())
            || self.pieces >= Pieces::MAX
    }

    fn take(&mut self, chain: Chain) -> Result<(), Fault> {
        // Section 5.1.6.3.1: each buffer holds at least the header.
        let bytes = chain.writable.len();
        if bytes < HEADER_BYTES {
            let head = chain.head;
            return Err(Fault::NoRoom { head, bytes });
        }
        self.bytes += bytes;
        self.pieces += chain.writable.count();
        self.chains.push_back(chain);
        Ok(())
    }

    /// The memory of it, for at most the largest frame.
    pub(super) fn pieces<'m>(&self, memory: &'m GuestMemoryMmap) -> Result<Pieces<'m>, ChainError> {
        let mut pieces = Pieces::default();
        for chain in &self.chains {
            let left = self.frame_bytes - pieces.bytes();
            let length = chain.writable.len().min(left);
            let mut fits = true;
            chain.writable.for_each_slice(memory, 0, length, |slice| {
                fits = pieces.push(&slice);
                fits
            })?;
            if !fits {
                break;
            }
        }
        Ok(pieces)
    }

    /// Gives the driver the frame of so many bytes that has been put there.
    pub(super) fn complete(
        &mut self,
        rx: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
        mut bytes: usize,
    ) -> Result<(), Fault> {
        let mut filled = Vec::new();
        for chain in &self.chains {
            let length = chain.writable.len().min(bytes);
            if length == 0 {
                break;
            }
            bytes -= length;
            filled.push((chain.head, length as u32));
        }
        if let Some(first) = self.chains.front() {
            let header = &first.writable;
            // Section 5.1.6.4.1: 1 without VIRTIO_NET_F_MRG_RXBUF; and a driver that knows nothing
            // of checksums is told nothing of them. As many as the queue's entries at the most.
            let count = filled.len() as u16;
            header.write_at(memory, NUM_BUFFERS, &count.to_le_bytes())?;
            if !self.accepted.has(VIRTIO_NET_F_GUEST_CSUM) {
                header.write_at(memory, FLAGS, &[0])?;
            }
        }
        // All at once: a driver that sees the first of a frame takes the others to be there.
        rx.complete_together(memory, &filled)?;
        for chain in self.chains.drain(..filled.len()) {
            self.bytes -= chain.writable.len();
            self.pieces -= chain.writable.count();
        }
        Ok(())
    }

    /// Puts back what no frame has come for.
    pub(super) fn put_back(self, rx: &mut ActiveQueue) {
        for _ in self.chains {
            rx.undo_pop();
        }
    }
}
