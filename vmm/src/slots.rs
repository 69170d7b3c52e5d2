//! Devices and the interrupt lines and notifications that KVM wires them up by.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_virtio::{EmptySlot, Faulted, MmioTransport, Transport, TransportError, VirtioDevice};

use crate::bus::{Bus, Overlap};
use crate::kvm::{Vm, VmError};
use crate::layout::{VIRTIO_MMIO_SLOT_SIZE, VIRTIO_MMIO_SLOTS, virtio_mmio_gsi, virtio_mmio_slot};
use crate::lifecycle::Lifecycle;
use crate::log::{describe, log};
use crate::platform::VirtioSlot;

/// Offset of the register that tells a device of new buffers (virtio 1.2
/// section 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

/// A device that cannot be added.
#[derive(Debug, Error)]
pub enum SlotError {
    /// No more descriptors.
    #[error("cannot make an event for the {device}: check the limit on open files")]
    Event {
        /// For which device.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The transport.
    #[error("cannot add the {device}")]
    Transport {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: TransportError,
    },
    /// More devices than slots.
    #[error("no slot is left for the {device}: the machine has {VIRTIO_MMIO_SLOTS}")]
    Full {
        /// Which device.
        device: String,
    },
    /// KVM's part.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Two devices at one address.
    #[error(transparent)]
    Overlap(#[from] Overlap),
}

/// An interrupt line, and the event that raises it.
pub fn connect_line(vm: &Vm, device: &str, gsi: u32) -> Result<EventFd, SlotError> {
    let event = EventFd::new(EFD_NONBLOCK).map_err(|source| SlotError::Event {
        device: device.to_owned(),
        source,
    })?;
    vm.connect_interrupt(&event, gsi)?;
    Ok(event)
}

/// The virtio slots, filled in order: the guest numbers its devices so.
pub struct Slots<'a> {
    vm: &'a Vm,
    memory: &'a GuestMemoryMmap,
    mmio: &'a mut Bus,
    lifecycle: &'a Arc<Lifecycle>,
    next: u32,
}

impl<'a> Slots<'a> {
    /// All slots are still free.
    pub fn new(
        vm: &'a Vm,
        memory: &'a GuestMemoryMmap,
        mmio: &'a mut Bus,
        lifecycle: &'a Arc<Lifecycle>,
    ) -> Self {
        Self {
            vm,
            memory,
            mmio,
            lifecycle,
            next: 0,
        }
    }

    /// Puts a device into the next slot.
    pub fn add(&mut self, name: &str, device: Box<dyn VirtioDevice>) -> Result<(), SlotError> {
        let slot = self.next;
        if slot >= VIRTIO_MMIO_SLOTS {
            return Err(SlotError::Full {
                device: name.to_owned(),
            });
        }
        let interrupt = connect_line(self.vm, name, virtio_mmio_gsi(slot))?;
        let memory = self.memory.clone();
        let transport = MmioTransport::try_new(device, memory, interrupt, log_fault(name))
            .map_err(|source| SlotError::Transport {
                device: name.to_owned(),
                source,
            })?;
        let notify = virtio_mmio_slot(slot) + QUEUE_NOTIFY;
        for (queue, event) in transport.queue_events().iter().enumerate() {
            self.vm.connect_notification(event, notify, queue as u32)?;
        }
        self.occupy(name.to_owned(), Box::new(transport))
    }

    /// Describes the free slots as such; a device may come later.
    pub fn leave_rest_empty(mut self) -> Result<(), SlotError> {
        while self.next < VIRTIO_MMIO_SLOTS {
            self.occupy(format!("slot {}", self.next), Box::new(EmptySlot))?;
        }
        Ok(())
    }

    fn occupy(&mut self, name: String, transport: Box<dyn Transport>) -> Result<(), SlotError> {
        let start = virtio_mmio_slot(self.next);
        let range = start..=start + VIRTIO_MMIO_SLOT_SIZE - 1;
        let slot = VirtioSlot {
            name: name.clone(),
            transport,
            lifecycle: Arc::clone(self.lifecycle),
        };
        self.mmio.attach(name, range, slot)?;
        self.next += 1;
        Ok(())
    }
}

/// The pod lives on without the device, so that the host's log is all that
/// tells why.
fn log_fault(device: &str) -> Faulted {
    let device = device.to_owned();
    Box::new(move |fault| {
        let fault = describe(fault);
        log(&format!(
            "the guest broke its {device}, which waits for a reset: {fault}; more of this is not logged"
        ));
    })
}
