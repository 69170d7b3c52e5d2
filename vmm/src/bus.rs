//! Which device answers at an address: ports and memory-mapped registers.

use std::ops::RangeInclusive;
use std::sync::Mutex;

use thiserror::Error;

/// Registers on a bus. Called on the vCPU threads, so it must not block for
/// long.
pub trait Registers: Send {
    /// Reads at an offset from the start of the device's range. `data` comes
    /// filled with ones; its length is 1 to 8, and the access ends within the
    /// range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes likewise.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Two devices at one address: a mistake in the machine's layout.
#[derive(Debug, Error)]
#[error("{name} at {start:#x}-{end:#x} overlaps {other}")]
pub struct Overlap {
    name: String,
    start: u64,
    end: u64,
    other: String,
}

struct Attached {
    range: RangeInclusive<u64>,
    name: String,
    registers: Mutex<Box<dyn Registers>>,
}

/// The devices of one address space, ports or memory.
#[derive(Default)]
pub struct Bus {
    /// In the order of their addresses.
    attached: Vec<Attached>,
}

impl Bus {
    /// Puts a device at a range of addresses.
    ///
    /// # Errors
    /// When another device is there.
    pub fn attach(
        &mut self,
        name: impl Into<String>,
        range: RangeInclusive<u64>,
        registers: impl Registers + 'static,
    ) -> Result<(), Overlap> {
        let name = name.into();
        let at = self
            .attached
            .partition_point(|other| other.range.end() < range.start());
        if let Some(next) = self.attached.get(at)
            && next.range.start() <= range.end()
        {
            return Err(Overlap {
                name,
                start: *range.start(),
                end: *range.end(),
                other: next.name.clone(),
            });
        }
        self.attached.insert(
            at,
            Attached {
                range,
                name,
                registers: Mutex::new(Box::new(registers)),
            },
        );
        Ok(())
    }

    /// Puts a device where another is, at the range that starts there, and
    /// returns the one that was there: no access reaches that any more. Waits
    /// for one that is under way. Nothing, and nothing is changed, when no range
    /// starts there.
    pub fn replace(
        &self,
        start: u64,
        registers: impl Registers + 'static,
    ) -> Option<Box<dyn Registers>> {
        let (attached, _) = self.find(start, 1).filter(|(_, offset)| *offset == 0)?;
        let registers = Box::new(registers);
        Some(std::mem::replace(
            &mut *lock(&attached.registers),
            registers,
        ))
    }

    /// Reads on behalf of the guest. Where no device is, or where the access
    /// leaves the device's range, all bits are one, as on a bus that nobody
    /// drives.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((attached, offset)) = self.find(address, data.len()) {
            lock(&attached.registers).read(offset, data);
        }
    }

    /// Writes on behalf of the guest. Where no device is, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((attached, offset)) = self.find(address, data.len()) {
            lock(&attached.registers).write(offset, data);
        }
    }

    fn find(&self, address: u64, bytes: usize) -> Option<(&Attached, u64)> {
        let last = address.checked_add((bytes as u64).checked_sub(1)?)?;
        let at = self
            .attached
            .partition_point(|attached| *attached.range.end() < address);
        let attached = self.attached.get(at)?;
        (attached.range.contains(&address) && attached.range.contains(&last))
            .then(|| (attached, address - attached.range.start()))
    }
}

/// A device whose thread panicked is still the device: its registers hold plain
/// values that are valid whatever was going on.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    type Writes = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

    /// Answers with its number; remembers what is written.
    struct Numbered(u8, Writes);

    impl Registers for Numbered {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0);
            data[0] = data[0].wrapping_add(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.1
                .lock()
                .expect("not poisoned")
                .push((offset, data.to_vec()));
        }
    }

    fn numbered(number: u8) -> Numbered {
        Numbered(number, Arc::default())
    }

    #[test]
    fn attach_overlapping_range_is_refused_and_names_both() {
        let mut bus = Bus::default();
        bus.attach("first", 0x10..=0x1f, numbered(1)).expect("free");
        let error = bus
            .attach("second", 0x1f..=0x2f, numbered(2))
            .expect_err("taken");
        assert_eq!(error.to_string(), "second at 0x1f-0x2f overlaps first");
    }

    #[test]
    fn read_where_nothing_is_gives_ones() {
        let mut data = [0; 4];
        Bus::default().read(0x64, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn read_across_the_end_of_a_range_reaches_no_device() {
        let mut bus = Bus::default();
        bus.attach("device", 0x10..=0x13, numbered(7))
            .expect("free");
        let mut data = [0; 4];
        bus.read(0x12, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn write_reaches_the_device_with_its_offset() {
        let writes = Arc::default();
        let mut bus = Bus::default();
        bus.attach("device", 0x100..=0x1ff, Numbered(0, Arc::clone(&writes)))
            .expect("free");
        bus.write(0x150, &[1, 2]);
        assert_eq!(*writes.lock().expect("not poisoned"), [(0x50, vec![1, 2])]);
    }

    #[test]
    fn replace_gives_back_what_was_there_and_later_accesses_reach_the_other() {
        let mut bus = Bus::default();
        bus.attach("device", 0x10..=0x1f, numbered(1))
            .expect("free");
        assert!(bus.replace(0x11, numbered(2)).is_none());
        assert!(bus.replace(0x20, numbered(2)).is_none());
        let mut old = bus.replace(0x10, numbered(2)).expect("there");
        let mut data = [0; 1];
        old.read(0, &mut data);
        assert_eq!(data, [1]);
        bus.read(0x10, &mut data);
        assert_eq!(data, [2]);
    }

    #[test]
    fn replace_while_others_read_gives_each_one_device_or_the_other() {
        let mut bus = Bus::default();
        bus.attach("device", 0x10..=0x17, numbered(0))
            .expect("free");
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut last = 0;
                    while last < 100 {
                        let mut data = [0; 8];
                        bus.read(0x10, &mut data);
                        assert_eq!(data, [data[0]; 8]);
                        assert!(data[0] >= last, "one that was taken away");
                        last = data[0];
                    }
                });
            }
            for number in 1..=100 {
                bus.replace(0x10, numbered(number)).expect("there");
            }
        });
    }

    proptest! {
        #[test]
        fn read_any_address_reaches_the_device_whose_range_it_is(
            address: u64,
            bytes in 1usize..=8,
            starts in proptest::collection::btree_set(0u64..64, 1..20),
        ) {
            let mut bus = Bus::default();
            for start in starts.iter().rev() {
                let base = start * 16;
                bus.attach(format!("device {start}"), base..=base + 7, numbered(*start as u8)).expect("apart");
            }
            let address = address % 2048;
            let mut data = vec![0; bytes];
            bus.read(address, &mut data);
            let inside = starts.contains(&(address / 16)) && address % 16 + bytes as u64 <= 8;
            let expected = if inside { (address / 16 + address % 16) as u8 } else { 0xff };
            prop_assert_eq!(data[0], expected);
        }

        #[test]
        fn read_at_the_end_of_the_address_space_never_panics(bytes in 0usize..=8, back in 0u64..16) {
            let mut bus = Bus::default();
            bus.attach("last", u64::MAX - 3..=u64::MAX, numbered(1)).expect("free");
            bus.read(u64::MAX - back, &mut vec![0; bytes]);
        }
    }
}
