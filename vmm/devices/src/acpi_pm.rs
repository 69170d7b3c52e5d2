//! Power management of hardware-reduced ACPI: the sleep control, sleep status
//! and reset registers (ACPI 6.5 sections 4.8.3.6 and 4.8.3.7).

/// What the guest asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SleepRequest {
    /// S5: power off.
    PowerOff,
    /// The reset register was written with its value.
    Reset,
}

/// The three registers, each one byte wide, at consecutive ports. Stateless: a
/// machine that slept would have to be told when to wake, and this one never
/// sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AcpiPm;

impl AcpiPm {
    /// Offset of the sleep control register.
    pub const SLEEP_CONTROL: u64 = 0;
    /// Offset of the sleep status register.
    pub const SLEEP_STATUS: u64 = 1;
    /// Offset of the reset register.
    pub const RESET: u64 = 2;
    /// Ports taken.
    pub const PORTS: u64 = 3;
    /// What the guest writes to reset; the `RESET_VALUE` of the FADT.
    pub const RESET_VALUE: u8 = 1;
    /// What `_S5` gives as sleep type.
    pub const S5_SLEEP_TYPE: u8 = 5;

    /// Bits 2 to 4 of the control register: the sleep type.
    const SLEEP_TYPE_SHIFT: u8 = 2;
    const SLEEP_TYPE_MASK: u8 = 0b111;
    /// Bit 5 of the control register: go to sleep.
    const SLEEP_ENABLE: u8 = 1 << 5;

    /// Reads: all zero, for no wake-up is pending (`WAK_STS`), and the control
    /// register's bits are write-only.
    pub fn read(self, data: &mut [u8]) {
        data.fill(0);
    }

    /// Writes. Other sleep types than S5 are described nowhere, so a guest that
    /// asks for them gets nothing.
    pub fn write(self, offset: u64, data: &[u8]) -> Option<SleepRequest> {
        let &[value] = data else {
            return None;
        };
        let sleep_type = (value >> Self::SLEEP_TYPE_SHIFT) & Self::SLEEP_TYPE_MASK;
        match offset {
            Self::SLEEP_CONTROL
                if value & Self::SLEEP_ENABLE != 0 && sleep_type == Self::S5_SLEEP_TYPE =>
            {
                Some(SleepRequest::PowerOff)
            }
            Self::RESET if value == Self::RESET_VALUE => Some(SleepRequest::Reset),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_s5_with_enable_powers_off() {
        let request = AcpiPm.write(AcpiPm::SLEEP_CONTROL, &[(5 << 2) | (1 << 5)]);
        assert_eq!(request, Some(SleepRequest::PowerOff));
    }

    #[test]
    fn write_s5_without_enable_does_nothing() {
        assert_eq!(AcpiPm.write(AcpiPm::SLEEP_CONTROL, &[5 << 2]), None);
    }

    #[test]
    fn write_other_sleep_type_does_nothing() {
        let request = AcpiPm.write(AcpiPm::SLEEP_CONTROL, &[(3 << 2) | (1 << 5)]);
        assert_eq!(request, None);
    }

    #[test]
    fn write_reset_value_resets_and_only_that_value() {
        for value in 0..=u8::MAX {
            let expected = (value == 1).then_some(SleepRequest::Reset);
            assert_eq!(AcpiPm.write(AcpiPm::RESET, &[value]), expected);
        }
    }

    #[test]
    fn write_wider_than_a_byte_does_nothing() {
        assert_eq!(AcpiPm.write(AcpiPm::RESET, &[1, 0]), None);
    }
}
