//! A hostile driver: what it has in guest memory, decided by a fuzz target's
//! input.

use arbitrary::{Result, Unstructured};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_virtio::mock::{Buffer, MockQueue};

/// Where buffers are; rings lie below.
pub const BUFFERS: u64 = 0x2_0000;
/// Distance of the buffers that are used more often than other places.
const BUFFER: u64 = 0x1000;
/// How many of them there are.
const COUNT: u64 = 8;

/// Descriptor flags: more follow, for the device to write, a table elsewhere.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Guest memory and the queues in it.
pub struct Driver {
    /// All of it, from 0 on.
    pub memory: GuestMemoryMmap,
    /// The device's queues, in their order.
    pub queues: Vec<MockQueue>,
    bytes: u64,
}

impl Driver {
    /// A driver of queues of these sizes, in so many bytes of memory.
    pub fn new(sizes: &[u16], bytes: usize) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory");
        let mut base = 0x1000;
        let mut queues = Vec::new();
        for &size in sizes {
            queues.push(MockQueue::new(&memory, base, size));
            base += (26 * u64::from(size) + 64).next_multiple_of(0x1000);
        }
        assert!(base <= BUFFERS, "rings below the buffers");
        Self {
            memory,
            queues,
            bytes: bytes as u64,
        }
    }

    /// Puts bytes into memory, as far as they fit.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(address));
    }

    /// A place in memory beyond the rings.
    pub fn place(&self, input: &mut Unstructured<'_>) -> Result<u64> {
        let choice: u8 = input.arbitrary()?;
        Ok(if choice < 0xe0 {
            BUFFERS + u64::from(choice) % COUNT * BUFFER
        } else {
            BUFFERS + u64::from(input.arbitrary::<u32>()?) % (self.bytes - BUFFERS)
        })
    }

    /// Writes anything anywhere, rings included.
    pub fn scribble(&self, input: &mut Unstructured<'_>) -> Result<()> {
        let page: u8 = input.arbitrary()?;
        let offset: u16 = input.arbitrary()?;
        let length = usize::from(input.arbitrary::<u8>()? % 65);
        let bytes = take(input, length)?;
        self.put(u64::from(page) * 0x1000 + u64::from(offset) % 0x1000, bytes);
        Ok(())
    }

    /// Does something with a queue that no sound driver may do, or may.
    pub fn misbehave(&mut self, queue: usize, input: &mut Unstructured<'_>) -> Result<()> {
        match input.arbitrary::<u8>()? % 8 {
            0..=2 => {
                let counts: u8 = input.arbitrary()?;
                let mut buffers = Vec::new();
                for index in 0..usize::from(counts % 8) {
                    let mut buffer = self.any_buffer(input)?;
                    buffer.writable = index >= usize::from(counts >> 4) % 8;
                    buffers.push(buffer);
                }
                self.queues[queue].offer(&buffers);
            }
            3 => {
                let index = input.arbitrary::<u16>()? % self.queues[queue].size();
                let buffer = self.any_buffer(input)?;
                let flags = input.arbitrary::<u16>()? & 0xf;
                let next = input.arbitrary::<u16>()? % (self.queues[queue].size() + 1);
                self.queues[queue].write_descriptor(index, buffer, flags, next);
            }
            4 => {
                let head = input.arbitrary::<u16>()? % (self.queues[queue].size() + 1);
                self.queues[queue].publish(head);
            }
            5 => {
                let index = input.arbitrary()?;
                self.queues[queue].corrupt_available_index(index);
            }
            6 => self.offer_indirect(queue, input)?,
            _ => self.scribble(input)?,
        }
        Ok(())
    }

    /// A request whose descriptors are in a table elsewhere, which may hold
    /// anything.
    fn offer_indirect(&mut self, queue: usize, input: &mut Unstructured<'_>) -> Result<()> {
        let table = self.place(input)?;
        let entries = u16::from(input.arbitrary::<u8>()? % 9);
        for entry in 0..entries {
            let buffer = self.any_buffer(input)?;
            let choice: u8 = input.arbitrary()?;
            let mut flags = u16::from(choice >> 6) & WRITE;
            if entry + 1 < entries {
                flags |= NEXT;
            }
            if choice.is_multiple_of(32) {
                flags ^= input.arbitrary::<u16>()?;
            }
            let mut bytes = buffer.address.to_le_bytes().to_vec();
            bytes.extend(buffer.length.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend((entry + 1).to_le_bytes());
            self.put(table + 16 * u64::from(entry), &bytes);
        }
        let head = input.arbitrary::<u16>()? % self.queues[queue].size();
        let whole = Buffer {
            address: table,
            length: 16 * u32::from(entries),
            writable: false,
        };
        self.queues[queue].write_descriptor(head, whole, INDIRECT, 0);
        self.queues[queue].publish(head);
        Ok(())
    }

    fn any_buffer(&self, input: &mut Unstructured<'_>) -> Result<Buffer> {
        let choice: u8 = input.arbitrary()?;
        let address = if choice < 0xf8 {
            self.place(input)?
        } else {
            input.arbitrary()?
        };
        let length = match choice & 7 {
            0 => input.arbitrary::<u32>()?,
            1 => 0,
            2 => 44,
            3 => 0x1000,
            _ => u32::from(input.arbitrary::<u8>()?),
        };
        Ok(Buffer {
            address,
            length,
            writable: choice & 8 != 0,
        })
    }
}

/// The next bytes of the input, or as many as are left.
pub fn take<'a>(input: &mut Unstructured<'a>, length: usize) -> Result<&'a [u8]> {
    input.bytes(length.min(input.len()))
}
