//! The mmio transport (virtio 1.2 section 4.2), version 2 registers only.

mod empty;
mod queue_setup;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio as registers;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::MmioInterrupt;
use crate::{
    ActivateError, Activation, ActiveQueue, Faulted, Interrupt, Transport, TransportError,
    TransportState, VirtioDevice,
};

pub use empty::EmptySlot;
use queue_setup::QueueSetup;
use status::Status;

/// Size of a transport's address range: registers, and the device's
/// configuration space from 0x100 on.
pub const MMIO_BYTES: u64 = 0x1000;

/// "virt", little-endian: what `MagicValue` reads as.
const MAGIC: u32 = 0x7472_6976;
/// `Version` of the registers since virtio 1.0.
const REGISTERS_VERSION: u32 = 2;
/// Linux prints it and does nothing else with it. "BLKH".
const VENDOR: u32 = 0x484b_4c42;
/// End of the registers, start of the device's configuration space.
const CONFIG: u64 = registers::VIRTIO_MMIO_CONFIG as u64;

/// Feature bits of the transport and the rings, which no device has to know.
const OWN_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1;

/// A device on the mmio bus.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemoryMmap,
    interrupt: Arc<MmioInterrupt>,
    events: Vec<EventFd>,
    queues: Vec<QueueSetup>,
    status: Status,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    /// The device serves its queues.
    active: bool,
    /// Those with the registers.
    guest_faults: u64,
    start_error: Option<ActivateError>,
}

impl MmioTransport {
    /// Puts a device behind registers. `irq` is written once for each
    /// interrupt: an edge-triggered line, registered as `KVM_IRQFD`. `faulted`
    /// is called once, when the driver first breaks the device's queues.
    ///
    /// # Errors
    /// When the device asks for an impossible queue, or the host has no
    /// descriptors left.
    pub fn try_new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        irq: EventFd,
        faulted: Faulted,
    ) -> Result<Self, TransportError> {
        let mut queues = Vec::new();
        let mut events = Vec::new();
        for (queue, &size) in device.queue_max_sizes().iter().enumerate() {
            queues
                .push(QueueSetup::try_new(size).ok_or(TransportError::QueueSize { queue, size })?);
            events.push(
                EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)
                    .map_err(|source| TransportError::QueueEvent { queue, source })?,
            );
        }
        Ok(Self {
            device,
            memory,
            interrupt: Arc::new(MmioInterrupt::new(irq, faulted)),
            events,
            queues,
            status: Status::default(),
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            active: false,
            guest_faults: 0,
            start_error: None,
        })
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | OWN_FEATURES
    }

    fn read_register(&self, offset: u32) -> u32 {
        let selected = self.queues.get(self.queue_select as usize);
        match offset {
            registers::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            registers::VIRTIO_MMIO_VERSION => REGISTERS_VERSION,
            registers::VIRTIO_MMIO_DEVICE_ID => self.device.device_type(),
            registers::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            registers::VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => self.offered_features() as u32,
                1 => (self.offered_features() >> 32) as u32,
                _ => 0,
            },
            registers::VIRTIO_MMIO_QUEUE_NUM_MAX => {
                selected.map_or(0, |queue| u32::from(queue.max_size()))
            }
            registers::VIRTIO_MMIO_QUEUE_READY => {
                selected.map_or(0, |queue| u32::from(queue.is_ready()))
            }
            registers::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            registers::VIRTIO_MMIO_STATUS => {
                u32::from(self.status.read(self.interrupt.is_reset_needed()))
            }
            // No shared memory: its length and base read as -1 (section 4.2.2,
            // SHMLen and SHMBase).
            registers::VIRTIO_MMIO_SHM_LEN_LOW
            | registers::VIRTIO_MMIO_SHM_LEN_HIGH
            | registers::VIRTIO_MMIO_SHM_BASE_LOW
            | registers::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            registers::VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        let legal = match offset {
            registers::VIRTIO_MMIO_DEVICE_FEATURES_SEL => {
                self.device_features_select = value;
                true
            }
            registers::VIRTIO_MMIO_DRIVER_FEATURES_SEL => {
                self.driver_features_select = value;
                true
            }
            registers::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            registers::VIRTIO_MMIO_QUEUE_SEL => {
                self.queue_select = value;
                true
            }
            registers::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            registers::VIRTIO_MMIO_INTERRUPT_ACK => {
                self.interrupt.acknowledge(value);
                true
            }
            registers::VIRTIO_MMIO_STATUS => self.write_status(value),
            registers::VIRTIO_MMIO_QUEUE_READY => self.write_queue_ready(value),
            registers::VIRTIO_MMIO_SHM_SEL => true,
            _ => self.write_queue_register(offset, value),
        };
        if !legal {
            self.guest_faults += 1;
        }
    }

    /// Section 3.1.1 step 4: the driver writes its features between `DRIVER`
    /// and `FEATURES_OK`.
    fn accept_features(&mut self, value: u32) -> bool {
        if !self.status.is_negotiating() {
            return false;
        }
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            // Bits beyond 63 do not exist: a driver that writes none of them
            // does no harm.
            _ => return value == 0,
        };
        let mask = u64::from(u32::MAX) << shift;
        self.driver_features = (self.driver_features & !mask) | (u64::from(value) << shift);
        true
    }

    fn notify(&mut self, queue: u32) -> bool {
        match self.events.get(queue as usize) {
            Some(event) if self.status.is_driver_ok() => {
                // Fails only when the counter is full: then it is set anyhow.
                let _ = event.write(1);
                true
            }
            _ => false,
        }
    }

    fn write_status(&mut self, value: u32) -> bool {
        let Ok(value) = u8::try_from(value) else {
            return false;
        };
        if value == 0 {
            self.reset();
            return true;
        }
        let Some(mut next) = self.status.advance(value) else {
            return false;
        };
        if next.has_features_ok() && !self.status.has_features_ok() && !self.are_features_fine() {
            // Section 3.1.1 step 6: the driver reads FEATURES_OK back as clear.
            next = next.without_features_ok();
        }
        let starts = next.is_driver_ok() && !self.status.is_driver_ok();
        self.status = next;
        if starts {
            self.activate();
        }
        true
    }

    /// Section 6.2: a device may refuse to go on without `VIRTIO_F_VERSION_1`.
    fn are_features_fine(&self) -> bool {
        self.driver_features & !self.offered_features() == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn write_queue_ready(&mut self, value: u32) -> bool {
        let configurable = self.status.is_configuring();
        let driver_ok = self.status.is_driver_ok();
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return value == 0;
        };
        match value {
            1 if configurable => queue.make_ready(&self.memory),
            // Drivers take down queues that a reset has taken down already.
            0 if !queue.is_ready() => true,
            0 if configurable => {
                queue.reset();
                true
            }
            0 if driver_ok => {
                // A single queue cannot be taken from a device at work: all
                // stop, and the driver learns that it has to start anew.
                self.device.reset();
                self.active = false;
                self.queues.iter_mut().for_each(QueueSetup::reset);
                self.interrupt.needs_reset();
                true
            }
            _ => false,
        }
    }

    fn write_queue_register(&mut self, offset: u32, value: u32) -> bool {
        if !self.status.is_configuring() {
            return false;
        }
        match self.queues.get_mut(self.queue_select as usize) {
            Some(queue) => queue.write_register(offset, value),
            None => false,
        }
    }

    fn activate(&mut self) {
        self.start_error = None;
        match self.try_activate() {
            Ok(()) => self.active = true,
            Err(error @ ActivateError::Queues { .. }) => self.interrupt.guest_fault(&error),
            Err(error @ ActivateError::Host { .. }) => {
                self.start_error = Some(error);
                self.interrupt.needs_reset();
            }
        }
    }

    fn try_activate(&mut self) -> Result<(), ActivateError> {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::new();
        for (index, (setup, event)) in self.queues.iter().zip(&self.events).enumerate() {
            // A driver may leave queues alone that it has no use for.
            let Some(queue) = setup.queue(&self.memory, event_idx) else {
                continue;
            };
            let notified = event.try_clone().map_err(|source| ActivateError::Host {
                device: format!("device of type {}", self.device.device_type()),
                source,
            })?;
            // Devices have few queues.
            queues.push(ActiveQueue::new(index as u16, queue, notified));
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues,
            interrupt: self.interrupt.clone(),
        };
        self.device.activate(activation)
    }

    fn reset(&mut self) {
        self.device.reset();
        self.active = false;
        self.queues.iter_mut().for_each(QueueSetup::reset);
        self.interrupt.clear();
        for event in &self.events {
            // Non-blocking: empties the counter, or finds it empty.
            let _ = event.read();
        }
        self.status = Status::default();
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
    }
}

impl Transport for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            self.device.read_config(offset - CONFIG, data);
        } else if let (Ok(data), 0) = (<&mut [u8; 4]>::try_from(data), offset % 4) {
            *data = self.read_register(offset as u32).to_le_bytes();
        } else {
            // Section 4.2.2.2: registers are 32 bits wide and aligned.
            self.guest_faults += 1;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            if self.status.has_driver() {
                self.device.write_config(offset - CONFIG, data);
            } else {
                self.guest_faults += 1;
            }
        } else if let (Ok(data), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset as u32, u32::from_le_bytes(data));
        } else {
            self.guest_faults += 1;
        }
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    fn pause(&mut self) {
        if !self.active {
            return;
        }
        for active in self.device.pause() {
            if let Some(setup) = self.queues.get_mut(usize::from(active.index)) {
                setup.take_positions(&active.queue);
            }
        }
        self.active = false;
    }

    fn resume(&mut self) {
        if self.active || !self.status.is_driver_ok() || self.interrupt.is_reset_needed() {
            return;
        }
        self.activate();
        // Notifications that came while nobody listened, either way.
        for event in &self.events {
            let _ = event.write(1);
        }
        self.interrupt.fire_if_pending();
    }

    fn save(&self) -> Result<TransportState, TransportError> {
        let device_type = self.device.device_type();
        if self.active {
            return Err(TransportError::Running { device_type });
        }
        Ok(TransportState {
            version: TransportState::VERSION,
            device_type,
            status: self.status.read(self.interrupt.is_reset_needed()),
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.config_generation(),
            queues: self.queues.iter().map(QueueSetup::save).collect(),
            device: self.device.save(),
        })
    }

    fn restore(&mut self, state: &TransportState) -> Result<(), TransportError> {
        let device_type = self.device.device_type();
        let contradiction = |field| TransportError::Contradiction { device_type, field };
        if state.version != TransportState::VERSION {
            return Err(TransportError::Version {
                version: state.version,
            });
        }
        if state.device_type != device_type {
            return Err(TransportError::DeviceType {
                saved: state.device_type,
                present: device_type,
            });
        }
        let (status, needs_reset) = Status::restore(state.status).ok_or(contradiction("status"))?;
        if status.has_features_ok() && state.driver_features & !self.offered_features() != 0 {
            return Err(contradiction("driver_features"));
        }
        if state.queues.len() != self.queues.len() {
            return Err(contradiction("queues"));
        }
        let mut queues = Vec::new();
        for (queue, saved) in self.queues.iter().zip(&state.queues) {
            let restored = QueueSetup::restore(queue.max_size(), saved, &self.memory)
                .ok_or(contradiction("queues"))?;
            queues.push(restored);
        }
        self.device
            .restore(&state.device)
            .map_err(|source| TransportError::Device {
                device_type,
                source,
            })?;
        self.queues = queues;
        self.status = status;
        self.driver_features = state.driver_features;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.interrupt
            .restore(state.interrupt_status, state.config_generation, needs_reset);
        Ok(())
    }

    fn guest_faults(&self) -> u64 {
        self.guest_faults + self.interrupt.guest_faults()
    }

    fn start_error(&self) -> Option<&ActivateError> {
        self.start_error.as_ref()
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        self.device.reset();
    }
}
