//! The interrupt of a device on the mmio transport.

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use crate::{Faulted, Interrupt};

/// One line for everything, told apart by the interrupt status register
/// (virtio 1.2 section 4.2.2).
pub(crate) struct MmioInterrupt {
    status: AtomicU32,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
    guest_faults: AtomicU64,
    faulted: Faulted,
    line: EventFd,
}

impl MmioInterrupt {
    pub(crate) fn new(line: EventFd, faulted: Faulted) -> Self {
        Self {
            status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            guest_faults: AtomicU64::new(0),
            faulted,
            line,
        }
    }

    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(crate) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(crate) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    pub(crate) fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Faults that the device has told of, since it was made.
    pub(crate) fn guest_faults(&self) -> u64 {
        self.guest_faults.load(Ordering::Relaxed)
    }

    /// As after a reset of the device. The generation goes on counting, so
    /// that no value repeats for a driver that read half of the space.
    pub(crate) fn clear(&self) {
        self.status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    pub(crate) fn restore(&self, status: u32, config_generation: u32, needs_reset: bool) {
        self.status.store(status, Ordering::Release);
        self.config_generation
            .store(config_generation, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// Fires the line again, for a driver that a pause kept from hearing it.
    pub(crate) fn fire_if_pending(&self) {
        if self.status() != 0 {
            self.fire();
        }
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        self.fire();
    }

    fn fire(&self) {
        // Fails only when the counter is full, and then the line is raised
        // anyhow.
        let _ = self.line.write(1);
    }
}

impl Interrupt for MmioInterrupt {
    fn used_buffers(&self, _queue: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn needs_reset(&self) {
        // Section 2.1.2: after DRIVER_OK the device must send a configuration
        // change notification with it.
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn guest_fault(&self, fault: &dyn Error) {
        // The first only: a guest could fill the host's log.
        if self.guest_faults.fetch_add(1, Ordering::Relaxed) == 0 {
            (self.faulted)(fault);
        }
        self.needs_reset();
    }
}
