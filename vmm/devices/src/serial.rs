//! The serial line of a PC (16550A), output only.

use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState as UartState};
use vmm_sys_util::eventfd::EventFd;

/// A UART whose output goes to a file. Bytes that the file does not take are
/// lost, as on a line with nobody at its end: the guest never waits for it.
pub struct Serial {
    uart: Uart<Line, NoEvents, File>,
}

/// A UART's registers: plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// Version of this structure: 1.
    pub version: u32,
    /// Divisor latch, low and high byte.
    pub baud_divisor: [u8; 2],
    /// Interrupt enable.
    pub interrupt_enable: u8,
    /// Interrupt identification.
    pub interrupt_identification: u8,
    /// Line control.
    pub line_control: u8,
    /// Line status.
    pub line_status: u8,
    /// Modem control.
    pub modem_control: u8,
    /// Modem status.
    pub modem_status: u8,
    /// Scratch.
    pub scratch: u8,
    /// Received and not yet read by the guest.
    pub received: Vec<u8>,
}

/// A state that is no UART's.
#[derive(Debug, Error)]
#[error(
    "saved serial line of version {version} does not fit version {}",
    Serial::STATE_VERSION
)]
pub struct SerialRestoreError {
    version: u32,
}

/// The interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl Serial {
    /// Ports taken.
    pub const PORTS: u64 = 8;
    /// Version of [`SerialState`].
    pub const STATE_VERSION: u32 = 1;

    /// A UART after reset; `irq` is written once for each interrupt.
    pub fn new(irq: EventFd, output: File) -> Self {
        Self {
            uart: Uart::new(Line(irq), output),
        }
    }

    /// Reads a register. Wider accesses than a byte read as zero.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(offset), [data]) = (u8::try_from(offset), data) {
            *data = self.uart.read(offset);
        }
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), &[data]) = (u8::try_from(offset), data) {
            // The output or the line does not take it: nothing that the guest
            // could be told, and the registers are as they should be.
            let _ = self.uart.write(offset, data);
        }
    }

    /// State to be saved.
    pub fn save(&self) -> SerialState {
        let state = self.uart.state();
        SerialState {
            version: Self::STATE_VERSION,
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// A UART that goes on from a saved state.
    ///
    /// # Errors
    /// When it is of another version, or holds more than a UART can.
    pub fn restore(
        state: &SerialState,
        irq: EventFd,
        output: File,
    ) -> Result<Self, SerialRestoreError> {
        let version = state.version;
        if version != Self::STATE_VERSION {
            return Err(SerialRestoreError { version });
        }
        let uart_state = UartState {
            baud_divisor_low: state.baud_divisor[0],
            baud_divisor_high: state.baud_divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        };
        Uart::from_state(&uart_state, Line(irq), NoEvents, output)
            .map(|uart| Self { uart })
            .map_err(|_| SerialRestoreError { version })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn irq() -> EventFd {
        EventFd::new(EFD_NONBLOCK).expect("eventfd")
    }

    #[test]
    fn write_data_register_reaches_the_output() {
        let mut file = tempfile::tempfile().expect("file");
        let mut serial = Serial::new(irq(), file.try_clone().expect("clone"));
        for byte in b"hello" {
            serial.write(0, &[*byte]);
        }
        let mut written = String::new();
        file.rewind().expect("rewind");
        file.read_to_string(&mut written).expect("read");
        assert_eq!(written, "hello");
    }

    #[test]
    fn restore_of_save_keeps_registers() {
        let file = tempfile::tempfile().expect("file");
        let mut serial = Serial::new(irq(), file.try_clone().expect("clone"));
        serial.write(7, &[0x5a]);
        let state = serial.save();
        let mut restored = Serial::restore(&state, irq(), file).expect("restores");
        let mut scratch = [0];
        restored.read(7, &mut scratch);
        assert_eq!(scratch, [0x5a]);
        assert_eq!(restored.save(), state);
    }

    #[test]
    fn access_of_two_bytes_does_nothing() {
        let file = tempfile::tempfile().expect("file");
        let mut serial = Serial::new(irq(), file);
        serial.write(7, &[1, 2]);
        let mut data = [0xff; 2];
        serial.read(7, &mut data);
        assert_eq!(data, [0, 0]);
    }
}
