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
pub struct VirtioSlot(pub Box<dyn Transport>);

impl Registers for VirtioSlot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
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
}
