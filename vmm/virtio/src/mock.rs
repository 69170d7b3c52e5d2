//! The driver's side of a queue, for tests of devices.
//!
//! Panics where a test has no use for an error.

use std::error::Error;
use std::num::Wrapping;
use std::sync::{Arc, mpsc};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{ActiveQueue, Interrupt};

/// One descriptor as the driver writes it.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
    /// For the device to write.
    pub writable: bool,
}

/// A driver's queue in guest memory, with its rings from `base` on.
pub struct MockQueue {
    memory: GuestMemoryMmap,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next_descriptor: u16,
    next_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
    notified: EventFd,
}

impl MockQueue {
    /// A queue of `size` entries; it takes 26 bytes for each, and a few more.
    pub fn new(memory: &GuestMemoryMmap, base: u64, size: u16) -> Self {
        let entries = u64::from(size);
        let available = base + 16 * entries;
        // Used rings are aligned to 4 bytes.
        let used = (available + 6 + 2 * entries).next_multiple_of(4);
        Self {
            memory: memory.clone(),
            size,
            descriptors: base,
            available,
            used,
            next_descriptor: 0,
            next_available: Wrapping(0),
            next_used: Wrapping(0),
            notified: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
        }
    }

    /// The addresses of descriptor table, available and used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used]
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The device's side of it.
    pub fn active(&self, index: u16, event_idx: bool) -> ActiveQueue {
        let mut queue = Queue::new(self.size).expect("queue size");
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .expect("aligned");
        queue
            .try_set_avail_ring_address(GuestAddress(self.available))
            .expect("aligned");
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .expect("aligned");
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory), "rings in guest memory");
        ActiveQueue::new(index, queue, self.notified.try_clone().expect("eventfd"))
    }

    /// Makes a chain of buffers available and returns its head. Descriptors
    /// are taken in turn: no more than the queue has may be in use.
    pub fn offer(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (position, buffer) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let mut flags = if buffer.writable {
                VRING_DESC_F_WRITE
            } else {
                0
            };
            if position + 1 < buffers.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            self.write_descriptor(index, *buffer, flags as u16, self.next_descriptor);
        }
        self.publish(head);
        head
    }

    /// Writes any descriptor, also a malformed one.
    pub fn write_descriptor(&self, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let at = self.descriptors + 16 * u64::from(index);
        self.write(at, &buffer.address.to_le_bytes());
        self.write(at + 8, &buffer.length.to_le_bytes());
        self.write(at + 12, &flags.to_le_bytes());
        self.write(at + 14, &next.to_le_bytes());
    }

    /// Makes any head available, also one that is in use.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_available.0 % self.size);
        self.write(self.available + 4 + 2 * slot, &head.to_le_bytes());
        self.next_available += 1;
        self.write(self.available + 2, &self.next_available.0.to_le_bytes());
    }

    /// Claims more available entries than were made.
    pub fn corrupt_available_index(&self, index: u16) {
        self.write(self.available + 2, &index.to_le_bytes());
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.notified.write(1).expect("eventfd");
    }

    /// With `VIRTIO_F_EVENT_IDX`: asks for an interrupt when the request at this
    /// position of the used ring, counted from the queue's start, is completed.
    pub fn wait_for_used(&self, position: u16) {
        let at = self.available + 4 + 2 * u64::from(self.size);
        self.write(at, &position.to_le_bytes());
    }

    /// Takes the next completed request: its head and the bytes written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let mut index = [0; 2];
        self.read(self.used + 2, &mut index);
        if u16::from_le_bytes(index) == self.next_used.0 {
            return None;
        }
        let slot = u64::from(self.next_used.0 % self.size);
        let (mut head, mut written) = ([0; 4], [0; 4]);
        self.read(self.used + 4 + 8 * slot, &mut head);
        self.read(self.used + 8 + 8 * slot, &mut written);
        self.next_used += 1;
        Some((u32::from_le_bytes(head) as u16, u32::from_le_bytes(written)))
    }

    fn read(&self, address: u64, bytes: &mut [u8]) {
        self.memory
            .read_slice(bytes, GuestAddress(address))
            .expect("in guest memory");
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("in guest memory");
    }
}

/// What a device told its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Raised {
    /// Used buffers are in this queue.
    Used(u16),
    /// The configuration space has changed.
    Config,
    /// The device needs a reset.
    NeedsReset,
    /// The driver broke the device's protocol.
    GuestFault,
}

struct MockInterrupt(mpsc::Sender<Raised>);

/// An interrupt, and where it is heard.
pub fn interrupt() -> (Arc<dyn Interrupt>, mpsc::Receiver<Raised>) {
    let (raise, raised) = mpsc::channel();
    (Arc::new(MockInterrupt(raise)), raised)
}

impl Interrupt for MockInterrupt {
    // Sending fails when the test has stopped to listen.
    fn used_buffers(&self, queue: u16) {
        let _ = self.0.send(Raised::Used(queue));
    }

    fn config_changed(&self) {
        let _ = self.0.send(Raised::Config);
    }

    fn needs_reset(&self) {
        let _ = self.0.send(Raised::NeedsReset);
    }

    fn guest_fault(&self, _fault: &dyn Error) {
        let _ = self.0.send(Raised::GuestFault);
    }
}
