//! The panic notification port (ACPI device `QEMU0001`; QEMU's
//! docs/specs/pvpanic).

/// What the guest tells about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestPanic {
    /// The kernel panicked, and nothing in the guest will go on.
    Panicked,
    /// The kernel panicked, and a crash kernel in the guest takes over.
    CrashLoaded,
}

/// One port, one byte wide. Stateless.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pvpanic;

impl Pvpanic {
    /// Bit 0: the guest has panicked.
    const PANICKED: u8 = 1 << 0;
    /// Bit 1: the guest's crash kernel runs.
    const CRASH_LOADED: u8 = 1 << 1;

    /// Reads: the events that can be told.
    pub fn read(self, data: &mut [u8]) {
        data.fill(0);
        if let Some(events) = data.first_mut() {
            *events = Self::PANICKED | Self::CRASH_LOADED;
        }
    }

    /// Writes. Bits that were not offered are ignored.
    pub fn write(self, data: &[u8]) -> Option<GuestPanic> {
        let events = *data.first()?;
        if events & Self::PANICKED != 0 {
            Some(GuestPanic::Panicked)
        } else if events & Self::CRASH_LOADED != 0 {
            Some(GuestPanic::CrashLoaded)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_offers_both_events() {
        let mut data = [0xff];
        Pvpanic.read(&mut data);
        assert_eq!(data, [3]);
    }

    #[test]
    fn write_tells_events_apart_and_ignores_unknown_bits() {
        assert_eq!(Pvpanic.write(&[1]), Some(GuestPanic::Panicked));
        assert_eq!(Pvpanic.write(&[2]), Some(GuestPanic::CrashLoaded));
        assert_eq!(Pvpanic.write(&[3]), Some(GuestPanic::Panicked));
        assert_eq!(Pvpanic.write(&[0xfc]), None);
        assert_eq!(Pvpanic.write(&[]), None);
    }
}
