//! A queue's registers while the driver sets it up.

use virtio_bindings::virtio_mmio as registers;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::QueueState;

/// What the driver has written about one queue. Once `ready`, it is a queue
/// that fits guest memory.
#[derive(Clone, Debug)]
pub(super) struct QueueSetup {
    max_size: u16,
    state: QueueState,
}

impl QueueSetup {
    /// Nothing when no queue can have this size.
    pub(super) fn try_new(max_size: u16) -> Option<Self> {
        Queue::new(max_size).ok()?;
        Some(Self::new(max_size))
    }

    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            state: QueueState {
                size: max_size,
                ..QueueState::default()
            },
        }
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(super) fn is_ready(&self) -> bool {
        self.state.ready
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    /// Writes one of the registers from `QueueNum` to `QueueDeviceHigh`. False
    /// when the driver may not.
    pub(super) fn write_register(&mut self, offset: u32, value: u32) -> bool {
        // Section 4.2.2.2: not while the queue is ready.
        if self.state.ready {
            return false;
        }
        let state = &mut self.state;
        match offset {
            registers::VIRTIO_MMIO_QUEUE_NUM => match u16::try_from(value) {
                Ok(size) if size.is_power_of_two() && size <= self.max_size => state.size = size,
                _ => return false,
            },
            registers::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut state.descriptor_table, value),
            registers::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut state.descriptor_table, value),
            registers::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut state.available_ring, value),
            registers::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut state.available_ring, value),
            registers::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut state.used_ring, value),
            registers::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut state.used_ring, value),
            _ => return false,
        }
        true
    }

    /// Takes what was written as final. False, and not ready, when the rings
    /// are misaligned or outside guest memory.
    pub(super) fn make_ready(&mut self, memory: &GuestMemoryMmap) -> bool {
        if self.state.ready {
            return true;
        }
        self.state.ready = true;
        self.state.ready = self.queue(memory, false).is_some();
        self.state.ready
    }

    /// The queue, if it is ready.
    pub(super) fn queue(&self, memory: &GuestMemoryMmap, event_idx: bool) -> Option<Queue> {
        let state = &self.state;
        if !state.ready {
            return None;
        }
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(state.size).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(state.descriptor_table))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(state.available_ring))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(state.used_ring))
            .ok()?;
        queue.set_next_avail(state.next_available);
        queue.set_next_used(state.next_used);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }

    /// Remembers how far the device got.
    pub(super) fn take_positions(&mut self, queue: &Queue) {
        self.state.next_available = queue.next_avail();
        self.state.next_used = queue.next_used();
    }

    pub(super) fn save(&self) -> QueueState {
        self.state
    }

    /// Nothing when the state is no queue of this size in this memory.
    pub(super) fn restore(
        max_size: u16,
        state: &QueueState,
        memory: &GuestMemoryMmap,
    ) -> Option<Self> {
        let restored = Self {
            max_size,
            state: *state,
        };
        let fits = state.size.is_power_of_two()
            && state.size <= max_size
            && (!state.ready || restored.queue(memory, false).is_some());
        fits.then_some(restored)
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !u64::from(u32::MAX)) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & u64::from(u32::MAX)) | (u64::from(value) << 32);
}
