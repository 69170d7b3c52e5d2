//! Devices and the interrupt lines and notifications that KVM wires them up by.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_virtio::{EmptySlot, Faulted, MmioTransport, Transport, TransportError, VirtioDevice};

use crate::bus::{Bus, Overlap, Registers};
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
    /// Nothing that can be removed.
    #[error("slot {slot} does not hold a network")]
    NotRemovable {
        /// As asked.
        slot: u32,
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

/// The virtio slots. They are filled in order while the machine is made, because
/// the guest numbers its devices so; those that are left are for devices that
/// come and go while it runs.
pub struct Slots {
    vm: Vm,
    memory: GuestMemoryMmap,
    lifecycle: Arc<Lifecycle>,
    contents: Vec<Content>,
}

/// What is in a slot.
enum Content {
    Nothing,
    /// A device that stays as long as the VM.
    Fixed,
    /// One that may be taken out again.
    Removable(Wiring),
}

impl Content {
    /// Leaves the slot free, if it may be.
    fn remove(&mut self) -> Option<Wiring> {
        match std::mem::replace(self, Self::Nothing) {
            Self::Removable(wiring) => Some(wiring),
            other => {
                *self = other;
                None
            }
        }
    }
}

/// The events of a device, as far as KVM knows them.
struct Wiring {
    interrupt: EventFd,
    notifications: Vec<EventFd>,
}

impl Wiring {
    fn connect(&self, vm: &Vm, slot: u32) -> Result<(), VmError> {
        vm.connect_interrupt(&self.interrupt, virtio_mmio_gsi(slot))?;
        let notify = virtio_mmio_slot(slot) + QUEUE_NOTIFY;
        for (queue, event) in (0..).zip(&self.notifications) {
            vm.connect_notification(event, notify, queue)?;
        }
        Ok(())
    }

    fn disconnect_notifications(&self, vm: &Vm, slot: u32) {
        let notify = virtio_mmio_slot(slot) + QUEUE_NOTIFY;
        for (queue, event) in (0..).zip(&self.notifications) {
            vm.disconnect_notification(event, notify, queue);
        }
    }

    fn disconnect_interrupt(&self, vm: &Vm, slot: u32) {
        vm.disconnect_interrupt(&self.interrupt, virtio_mmio_gsi(slot));
    }
}

impl Slots {
    /// All slots are still free.
    pub fn new(vm: Vm, memory: GuestMemoryMmap, lifecycle: Arc<Lifecycle>) -> Self {
        Self {
            vm,
            memory,
            lifecycle,
            contents: Vec::new(),
        }
    }

    /// Puts a device into the next slot, for as long as the VM lives.
    pub fn add(
        &mut self,
        mmio: &mut Bus,
        name: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), SlotError> {
        let slot = self.contents.len() as u32;
        if slot >= VIRTIO_MMIO_SLOTS {
            return Err(SlotError::Full {
                device: name.to_owned(),
            });
        }
        let (transport, _) = self.wire(slot, name, device)?;
        self.occupy(mmio, name.to_owned(), Box::new(transport))?;
        self.contents.push(Content::Fixed);
        Ok(())
    }

    /// Describes the free slots as such.
    pub fn leave_rest_empty(&mut self, mmio: &mut Bus) -> Result<(), SlotError> {
        while self.contents.len() < VIRTIO_MMIO_SLOTS as usize {
            let name = format!("slot {}", self.contents.len());
            self.occupy(mmio, name, Box::new(EmptySlot))?;
            self.contents.push(Content::Nothing);
        }
        Ok(())
    }

    /// Puts a device into the first free slot of a machine that may run, and
    /// returns the slot's number. The guest finds it there when it probes the
    /// slot again.
    pub fn plug(
        &mut self,
        mmio: &Bus,
        name: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<u32, SlotError> {
        let free = |content: &Content| matches!(content, Content::Nothing);
        let Some(slot) = self.contents.iter().position(free) else {
            return Err(SlotError::Full {
                device: name.to_owned(),
            });
        };
        let (transport, wiring) = self.wire(slot as u32, name, device)?;
        self.replace(mmio, slot as u32, name.to_owned(), Box::new(transport));
        self.contents[slot] = Content::Removable(wiring);
        Ok(slot as u32)
    }

    /// Takes out a device that was [plugged](Self::plug) in, whether or not the
    /// guest still uses it: to a driver that does, registers read as those of an
    /// empty slot, and its buffers stay where they are.
    pub fn unplug(&mut self, mmio: &Bus, slot: u32) -> Result<(), SlotError> {
        let content = self.contents.get_mut(slot as usize);
        let Some(wiring) = content.and_then(Content::remove) else {
            return Err(SlotError::NotRemovable { slot });
        };
        wiring.disconnect_notifications(&self.vm, slot);
        let name = format!("slot {slot}");
        let old = self.replace(mmio, slot, name, Box::new(EmptySlot));
        // Its transport resets the device: from here on it touches neither memory nor its line.
        drop(old);
        wiring.disconnect_interrupt(&self.vm, slot);
        Ok(())
    }

    /// A device behind registers, with its events connected.
    fn wire(
        &self,
        slot: u32,
        name: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(MmioTransport, Wiring), SlotError> {
        let no_event = |source| SlotError::Event {
            device: name.to_owned(),
            source,
        };
        let interrupt = EventFd::new(EFD_NONBLOCK).map_err(no_event)?;
        let line = interrupt.try_clone().map_err(no_event)?;
        let memory = self.memory.clone();
        let transport =
            MmioTransport::try_new(device, memory, line, log_fault(name)).map_err(|source| {
                SlotError::Transport {
                    device: name.to_owned(),
                    source,
                }
            })?;
        let notifications = transport.queue_events().iter().map(EventFd::try_clone);
        let wiring = Wiring {
            interrupt,
            notifications: notifications.collect::<Result<_, _>>().map_err(no_event)?,
        };
        if let Err(error) = wiring.connect(&self.vm, slot) {
            wiring.disconnect_notifications(&self.vm, slot);
            wiring.disconnect_interrupt(&self.vm, slot);
            return Err(error.into());
        }
        Ok((transport, wiring))
    }

    fn occupy(
        &self,
        mmio: &mut Bus,
        name: String,
        transport: Box<dyn Transport>,
    ) -> Result<(), SlotError> {
        let start = virtio_mmio_slot(self.contents.len() as u32);
        let range = start..=start + VIRTIO_MMIO_SLOT_SIZE - 1;
        mmio.attach(name.clone(), range, self.registers(name, transport))?;
        Ok(())
    }

    fn replace(
        &self,
        mmio: &Bus,
        slot: u32,
        name: String,
        transport: Box<dyn Transport>,
    ) -> Option<Box<dyn Registers>> {
        mmio.replace(virtio_mmio_slot(slot), self.registers(name, transport))
    }

    fn registers(&self, name: String, transport: Box<dyn Transport>) -> VirtioSlot {
        VirtioSlot {
            name,
            transport,
            lifecycle: Arc::clone(&self.lifecycle),
        }
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
