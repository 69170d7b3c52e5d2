//! The I/O APIC as a register model (Intel 82093AA datasheet, chapter 3).
//!
//! With a split irqchip the local APICs are KVM's, and this is all there is
//! outside them: it turns each unmasked pin into a message-signalled interrupt,
//! which the owner hands to KVM as a routing table. Only edge-triggered pins
//! are served: no device of this machine has a level-triggered line, so there
//! is no remote IRR and no end of interrupt to follow.

use serde::{Deserialize, Serialize};

/// Pins: the bus's legacy 16, one for each virtio slot, and room to spare.
const PINS: usize = 64;
/// `IOAPICVER`: the version that Linux knows, with the index of the last pin in
/// bits 16 to 23.
const VERSION: u32 = 0x11 | (PINS as u32 - 1) << 16;

/// Offset of the register that selects a register.
const SELECT: u64 = 0x00;
/// Offset of the window to the selected register.
const WINDOW: u64 = 0x10;

const REGISTER_ID: u8 = 0;
const REGISTER_VERSION: u8 = 1;
const REGISTER_ARBITRATION: u8 = 2;
/// First of the redirection table's registers, two for each pin.
const REGISTER_TABLE: u8 = 0x10;

/// Redirection entry: the pin delivers nothing.
const MASKED: u64 = 1 << 16;
/// Redirection entry: delivery status and remote IRR are the hardware's.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;

/// Where message-signalled interrupts are written to (Intel SDM volume 3,
/// section 11.11.1).
const MSI_ADDRESS: u32 = 0xfee0_0000;
/// MSI data: assert.
const MSI_ASSERT: u32 = 1 << 14;

/// What KVM is to deliver when a pin's line rises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiRoute {
    /// The pin, which is also the line's number (GSI).
    pub pin: u32,
    /// Lower half of the message's address.
    pub address_low: u32,
    /// Upper half: destination bits above 8, which this model never sets.
    pub address_high: u32,
    /// The message.
    pub data: u32,
}

/// The I/O APIC's state: plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApicState {
    /// Version of this structure: 1.
    pub version: u32,
    /// Selected register.
    pub select: u8,
    /// Identifier, bits 24 to 27 of its register.
    pub id: u8,
    /// Redirection entries, one for each pin.
    pub entries: Vec<u64>,
}

/// An I/O APIC of 64 pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoApic {
    select: u8,
    id: u8,
    entries: [u64; PINS],
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

impl IoApic {
    /// Pins.
    pub const PINS: u32 = PINS as u32;
    /// Bytes that the registers take.
    pub const BYTES: u64 = 0x1000;
    /// Version of [`IoApicState`].
    pub const STATE_VERSION: u32 = 1;

    /// As after a reset: every pin masked.
    pub fn new() -> Self {
        Self {
            select: 0,
            id: 0,
            entries: [MASKED; PINS],
        }
    }

    /// Reads. Only 32-bit accesses have a meaning; the rest reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let value = match offset {
            SELECT => u32::from(self.select),
            WINDOW => self.read_selected(),
            _ => 0,
        };
        *data = value.to_le_bytes();
    }

    /// Writes. True when what some pin delivers has changed: then the owner
    /// takes up [`routes`](Self::routes) anew.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return false;
        };
        let value = u32::from_le_bytes(data);
        match offset {
            SELECT => {
                self.select = value as u8;
                false
            }
            WINDOW => self.write_selected(value),
            _ => false,
        }
    }

    /// One message for each pin that is not masked, in the order of the pins.
    pub fn routes(&self) -> Vec<MsiRoute> {
        let unmasked = |(_, entry): &(usize, &u64)| **entry & MASKED == 0;
        let route = |(pin, entry)| route(pin as u32, entry);
        self.entries
            .iter()
            .enumerate()
            .filter(unmasked)
            .map(|(pin, &entry)| route((pin, entry)))
            .collect()
    }

    /// State to be saved.
    pub fn save(&self) -> IoApicState {
        IoApicState {
            version: Self::STATE_VERSION,
            select: self.select,
            id: self.id,
            entries: self.entries.to_vec(),
        }
    }

    /// From a saved state; nothing when it is of another version or has another
    /// number of pins.
    pub fn restore(state: &IoApicState) -> Option<Self> {
        if state.version != Self::STATE_VERSION {
            return None;
        }
        Some(Self {
            select: state.select,
            id: state.id & 0xf,
            entries: state.entries.as_slice().try_into().ok()?,
        })
    }

    /// Index of the entry that the selected register belongs to, and whether it
    /// is its upper half.
    fn selected_entry(&self) -> Option<(usize, bool)> {
        let index = self.select.checked_sub(REGISTER_TABLE)?;
        let pin = usize::from(index / 2);
        (pin < PINS).then_some((pin, index % 2 == 1))
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            REGISTER_ID | REGISTER_ARBITRATION => u32::from(self.id) << 24,
            REGISTER_VERSION => VERSION,
            _ => match self.selected_entry() {
                Some((pin, true)) => (self.entries[pin] >> 32) as u32,
                Some((pin, false)) => self.entries[pin] as u32,
                None => 0,
            },
        }
    }

    fn write_selected(&mut self, value: u32) -> bool {
        if self.select == REGISTER_ID {
            self.id = (value >> 24) as u8 & 0xf;
            return false;
        }
        let Some((pin, upper)) = self.selected_entry() else {
            return false;
        };
        let old = self.entries[pin];
        let new = if upper {
            (old & u64::from(u32::MAX)) | (u64::from(value) << 32)
        } else {
            (old & !u64::from(u32::MAX)) | (u64::from(value) & !READ_ONLY)
        };
        self.entries[pin] = new;
        // Most writes set up pins that stay masked; a new routing table costs a
        // call into KVM.
        let delivers = old & new & MASKED == 0;
        delivers && (old & MASKED != new & MASKED || route(0, old) != route(0, new))
    }
}

/// The message for a redirection entry (Intel SDM volume 3, section 11.11).
fn route(pin: u32, entry: u64) -> MsiRoute {
    let destination = (entry >> 56) as u32;
    let logical = (entry >> 11) as u32 & 1;
    let vector = entry as u32 & 0xff;
    let delivery_mode = (entry >> 8) as u32 & 7;
    MsiRoute {
        pin,
        address_low: MSI_ADDRESS | (destination << 12) | (logical << 2),
        address_high: 0,
        data: MSI_ASSERT | (delivery_mode << 8) | vector,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(ioapic: &mut IoApic, register: u8, value: u32) -> bool {
        let _ = ioapic.write(SELECT, &u32::from(register).to_le_bytes());
        ioapic.write(WINDOW, &value.to_le_bytes())
    }

    fn read(ioapic: &mut IoApic, register: u8) -> u32 {
        let _ = ioapic.write(SELECT, &u32::from(register).to_le_bytes());
        let mut data = [0; 4];
        ioapic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn read_version_tells_64_pins() {
        assert_eq!(read(&mut IoApic::new(), 1), 0x003f_0011);
    }

    #[test]
    fn routes_after_reset_are_none() {
        assert_eq!(IoApic::new().routes(), []);
    }

    #[test]
    fn write_unmasking_a_pin_changes_routes_once() {
        let mut ioapic = IoApic::new();
        // Pin 16, destination 3, then vector 0x31, fixed, physical, unmasked.
        assert!(!write(&mut ioapic, 0x10 + 33, 3 << 24));
        assert!(write(&mut ioapic, 0x10 + 32, 0x31));
        assert!(!write(&mut ioapic, 0x10 + 32, 0x31));
        assert_eq!(
            ioapic.routes(),
            [MsiRoute {
                pin: 16,
                address_low: 0xfee0_3000,
                address_high: 0,
                data: 0x4031,
            }]
        );
        assert!(write(&mut ioapic, 0x10 + 32, 0x31 | 1 << 16));
        assert_eq!(ioapic.routes(), []);
    }

    #[test]
    fn write_last_pin_is_kept_and_beyond_is_ignored() {
        let mut ioapic = IoApic::new();
        assert!(write(&mut ioapic, 0x10 + 126, 0x77));
        assert_eq!(ioapic.routes()[0].pin, 63);
        assert!(!write(&mut ioapic, 0x10 + 128, 0x77));
        assert_eq!(ioapic.routes().len(), 1);
    }

    #[test]
    fn restore_other_version_is_refused() {
        let mut state = IoApic::new().save();
        state.version = 2;
        assert_eq!(IoApic::restore(&state), None);
    }

    proptest! {
        #[test]
        fn write_tells_exactly_when_routes_change(
            writes in proptest::collection::vec((any::<u8>(), any::<u32>()), 0..200),
        ) {
            let mut ioapic = IoApic::new();
            for (register, value) in writes {
                let before = ioapic.routes();
                let changed = write(&mut ioapic, register, value);
                prop_assert_eq!(changed, before != ioapic.routes());
                prop_assert_eq!(IoApic::restore(&ioapic.save()), Some(ioapic.clone()));
            }
        }

        #[test]
        fn access_of_any_width_never_panics(offset in 0u64..0x1000, data in proptest::collection::vec(any::<u8>(), 0..=8)) {
            let mut ioapic = IoApic::new();
            let _ = ioapic.write(offset, &data);
            ioapic.read(offset, &mut data.clone());
        }
    }
}
