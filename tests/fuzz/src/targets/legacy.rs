//! The register models that are no virtio devices: accesses of any width at any
//! offset.

use std::fs::File;

use arbitrary::{Result, Unstructured};
use vmm_devices::{AcpiPm, IoApic, Pvpanic, Serial};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_virtio::{EmptySlot, Transport};

/// Tries one input.
pub fn run(data: &[u8]) {
    let _ = play(&mut Unstructured::new(data));
}

fn play(input: &mut Unstructured<'_>) -> Result<()> {
    let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let output = File::create("/dev/null").expect("always there");
    let mut serial = Serial::new(irq, output);
    let mut ioapic = IoApic::new();
    while !input.is_empty() {
        let [choice, form]: [u8; 2] = input.arbitrary()?;
        let mut bytes = [0_u8; 8];
        input.fill_buffer(&mut bytes)?;
        let length = match form & 0xf {
            0..=5 => 4,
            6..=9 => 1,
            other => usize::from(other - 10),
        };
        let written = &bytes[..length];
        let mut read = vec![0xaa; length];
        let mut offset = u64::from(form >> 4);
        if choice & 0x80 != 0 {
            offset = input.arbitrary()?;
        }
        match choice % 5 {
            0 => {
                let before = ioapic.routes();
                let offset = offset & 0x10;
                let changed = ioapic.write(offset, written);
                assert!(changed || ioapic.routes() == before, "a change is told");
                ioapic.read(offset, &mut read);
            }
            1 => {
                serial.write(offset, written);
                serial.read(offset, &mut read);
                let again = serial.save();
                assert!(again.received.len() <= 64, "what a UART holds");
            }
            2 => {
                let _ = AcpiPm.write(offset, written);
                AcpiPm.read(&mut read);
                assert!(read.iter().all(|byte| *byte == 0));
            }
            3 => {
                let _ = Pvpanic.write(written);
                Pvpanic.read(&mut read);
            }
            _ => {
                EmptySlot.write(offset, written);
                EmptySlot.read(offset, &mut read);
            }
        }
    }
    Ok(())
}
