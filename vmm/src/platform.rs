//! Connects the register models of the devices to the buses, and what the guest
//! asks of them to what it is for: interrupt routes, the end of the VM.

use std::sync::Arc;

use vmm_config::control::ExitReason;
use vmm_devices::{AcpiPm, GuestPanic, IoApic, Pvpanic, Serial, SleepRequest};
use vmm_virtio::Transport;

use crate::bus::Registers;
use crate::kvm::Routes;
use crate::lifecycle::Lifecycle;
use crate::log::{describe, log};

/// The I/O APIC: a change of its pins becomes a change of KVM's routes.
pub struct RoutedIoApic {
    ioapic: IoApic,
    routes: Routes,
    refused: bool,
}

impl RoutedIoApic {
    /// All pins masked.
    pub fn new(routes: Routes) -> Self {
        Self {
            ioapic: IoApic::new(),
            routes,
            refused: false,
        }
    }
}

impl Registers for RoutedIoApic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.ioapic.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if !self.ioapic.write(offset, data) {
            return;
        }
        // The guest chose them: what KVM refuses delivers nothing, and is told once, for a guest
        // could go on for ever.
        if let Err(error) = self.routes.replace(&self.ioapic.routes())
            && !self.refused
        {
            self.refused = true;
            log(&describe(&error));
        }
    }
}

/// Sleep and reset registers.
pub struct Power(pub Arc<Lifecycle>);

impl Registers for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        AcpiPm.read(data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match AcpiPm.write(offset, data) {
            Some(SleepRequest::PowerOff) => self.0.report_end(ExitReason::PowerOff),
            Some(SleepRequest::Reset) => self.0.report_end(ExitReason::Reset),
            None => {}
        }
    }
}

/// The panic port.
pub struct Panics(pub Arc<Lifecycle>);

impl Registers for Panics {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        Pvpanic.read(data);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        match Pvpanic.write(data) {
            // A crash kernel ends the VM as well, once it has done its work.
            Some(GuestPanic::Panicked | GuestPanic::CrashLoaded) => self.0.report_panic(),
            None => {}
        }
    }
}

/// A virtio slot, with a device or free.
pub struct VirtioSlot {
    /// What is in it, as in "socket device".
    pub name: String,
    /// Its registers.
    pub transport: Box<dyn Transport>,
    /// Where it is told that the device cannot start.
    pub lifecycle: Arc<Lifecycle>,
}

impl Registers for VirtioSlot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.transport.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.transport.write(offset, data);
        // The host's fault, not the guest's, which would wait for its device until somebody loses
        // patience with both.
        if let Some(error) = self.transport.start_error() {
            self.lifecycle.report_device_failure(&self.name, error);
        }
    }
}

/// The serial line.
impl Registers for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        Serial::read(self, offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        Serial::write(self, offset, data);
    }
}

/// The keyboard controller that is not there. Its status must read as zero: all
/// ones would be a controller whose input buffer is full, for which software
/// waits.
pub struct KeyboardController(pub Arc<Lifecycle>);

impl KeyboardController {
    /// "Pulse output line 0": how a PC is reset when all else fails.
    const RESET_COMMAND: u8 = 0xfe;
}

impl Registers for KeyboardController {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data == [Self::RESET_COMMAND] {
            self.0.report_end(ExitReason::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
    use vmm_virtio::{
        ActivateError, Activation, ActiveQueue, MmioTransport, RestoreError, VirtioDevice,
    };

    fn lifecycle() -> Arc<Lifecycle> {
        Arc::new(Lifecycle::try_new().expect("event"))
    }

    #[test]
    fn power_off_register_ends_with_power_off() {
        let lifecycle = lifecycle();
        Power(Arc::clone(&lifecycle)).write(0, &[(5 << 2) | (1 << 5)]);
        assert_eq!(lifecycle.state().ended, Some(ExitReason::PowerOff));
    }

    #[test]
    fn panic_port_then_reset_register_ends_with_panic() {
        let lifecycle = lifecycle();
        Panics(Arc::clone(&lifecycle)).write(0, &[1]);
        Power(Arc::clone(&lifecycle)).write(2, &[1]);
        assert_eq!(lifecycle.state().ended, Some(ExitReason::GuestPanic));
    }

    #[test]
    fn keyboard_controller_reads_as_idle_and_resets() {
        let lifecycle = lifecycle();
        let mut controller = KeyboardController(Arc::clone(&lifecycle));
        let mut status = [0xff];
        controller.read(0, &mut status);
        assert_eq!(status, [0]);
        controller.write(0, &[0xfe]);
        assert_eq!(lifecycle.state().ended, Some(ExitReason::Reset));
    }

    /// A device that does not start.
    struct Refusing(fn(String) -> ActivateError);

    impl VirtioDevice for Refusing {
        fn device_type(&self) -> u32 {
            4
        }
        fn queue_max_sizes(&self) -> &[u16] {
            &[]
        }
        fn features(&self) -> u64 {
            0
        }
        fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
        fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
        fn activate(&mut self, _activation: Activation) -> Result<(), ActivateError> {
            Err(self.0("device".to_owned()))
        }
        fn pause(&mut self) -> Vec<ActiveQueue> {
            Vec::new()
        }
        fn reset(&mut self) {}
        fn save(&self) -> Vec<u8> {
            Vec::new()
        }
        fn restore(&mut self, _state: &[u8]) -> Result<(), RestoreError> {
            Ok(())
        }
    }

    /// What becomes of a VM the driver of which starts this device.
    fn start(device: Refusing) -> Option<ExitReason> {
        let lifecycle = lifecycle();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).expect("memory");
        let line = EventFd::new(EFD_NONBLOCK).expect("eventfd");
        let device = Box::new(device);
        let transport = MmioTransport::try_new(device, memory, line, Box::new(|_| ()));
        let mut slot = VirtioSlot {
            name: "device".to_owned(),
            transport: Box::new(transport.expect("transport")),
            lifecycle: Arc::clone(&lifecycle),
        };
        for (register, value) in [
            (0x70, 1u32), // Status: ACKNOWLEDGE
            (0x70, 3),    // and DRIVER
            (0x24, 1),    // DriverFeaturesSel
            (0x20, 1),    // DriverFeatures: VIRTIO_F_VERSION_1
            (0x70, 11),   // and FEATURES_OK
            (0x70, 15),   // and DRIVER_OK
        ] {
            slot.write(register, &value.to_le_bytes());
        }
        lifecycle.state().ended
    }

    #[test]
    fn device_that_the_host_cannot_start_ends_the_vm_with_the_reason() {
        let ended = start(Refusing(|device| ActivateError::Host {
            device,
            source: std::io::Error::other("no descriptors left"),
        }));
        let expected = ExitReason::DeviceFailed {
            device: "device".to_owned(),
            error: "device cannot start: no descriptors left".to_owned(),
        };
        assert_eq!(ended, Some(expected));
    }

    #[test]
    fn device_that_its_driver_keeps_from_starting_does_not_end_the_vm() {
        let ended = start(Refusing(|device| ActivateError::Queues { device }));
        assert_eq!(ended, None);
    }
}
