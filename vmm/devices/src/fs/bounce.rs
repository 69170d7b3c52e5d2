//! The memory that the file server sees: a memfd of its own, with the shadow
//! queues and slots for requests in it, and nothing of the guest's.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, VolatileSlice,
};

use super::request::{MAX_REPLY_BYTES, MAX_REQUEST_BYTES};

/// Where the file server believes that we have this memory. It only translates
/// addresses with it, and need not learn any of ours.
const FRONT_END_ADDRESS: u64 = 0x1_0000_0000;

/// Both shadow queues fit in it by far.
const RINGS_BYTES: usize = 64 * 1024;
/// Holds a name or two and a page of directory entries.
const SMALL_BYTES: usize = 8 * 1024;
/// Holds a request with the largest payload, or its reply.
const LARGE_BYTES: usize = 1024 * 1024 + 12 * 1024;

/// Slots for requests of the queue that must not wait.
const PRIORITY_SLOTS: usize = 16;
/// Slots for metadata.
const SMALL_SLOTS: usize = 64;
/// Slots for data: at this many in flight, more do not make it faster.
const LARGE_SLOTS: usize = 8;

const TOTAL_BYTES: usize =
    RINGS_BYTES + (PRIORITY_SLOTS + SMALL_SLOTS) * SMALL_BYTES + LARGE_SLOTS * LARGE_BYTES;

const _: () = assert!(MAX_REQUEST_BYTES + 4096 <= LARGE_BYTES);
const _: () = assert!(MAX_REPLY_BYTES + 4096 <= LARGE_BYTES);

/// What a slot is for. A request that needs one kind never waits for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotKind {
    /// The queue that must not wait.
    Priority,
    /// Metadata.
    Small,
    /// Data.
    Large,
}

/// A slot's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) index: u16,
    pub(super) kind: SlotKind,
    pub(super) address: u64,
    pub(super) bytes: usize,
}

/// The bounce memory.
pub(super) struct Bounce {
    memory: GuestMemoryMmap,
    file: File,
}

impl Bounce {
    /// Number of all slots.
    pub(super) const SLOTS: u16 = (PRIORITY_SLOTS + SMALL_SLOTS + LARGE_SLOTS) as u16;
    /// Length of the part before the slots.
    pub(super) const RINGS_BYTES: u64 = RINGS_BYTES as u64;

    pub(super) fn try_new() -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"file-requests", flags)?);
        file.set_len(TOTAL_BYTES as u64)?;
        // Truncated by the file server, it would end us with SIGBUS.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let region = MmapRegionBuilder::new(TOTAL_BYTES)
            .with_mmap_prot(nix::libc::PROT_READ | nix::libc::PROT_WRITE)
            .with_mmap_flags(nix::libc::MAP_SHARED | nix::libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file.try_clone()?, 0))
            .build()
            .map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(region, GuestAddress(0))
            .ok_or_else(|| io::Error::other("bounce memory has no end"))?;
        let memory = GuestMemoryMmap::from_regions(vec![region]).map_err(io::Error::other)?;
        Ok(Self { memory, file })
    }

    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// How the file server is told about it.
    pub(super) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: TOTAL_BYTES as u64,
            userspace_addr: FRONT_END_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// An address of the bounce memory as the file server is told about rings.
    pub(super) fn front_end_address(address: u64) -> u64 {
        FRONT_END_ADDRESS + address
    }

    /// Part of a slot.
    pub(super) fn slice(&self, address: u64, bytes: usize) -> io::Result<VolatileSlice<'_>> {
        self.memory
            .get_slice(GuestAddress(address), bytes)
            .map_err(io::Error::other)
    }

    /// Every slot, in the order of their indices.
    pub(super) fn slots() -> impl Iterator<Item = Slot> {
        let kinds = [
            (SlotKind::Priority, PRIORITY_SLOTS, SMALL_BYTES),
            (SlotKind::Small, SMALL_SLOTS, SMALL_BYTES),
            (SlotKind::Large, LARGE_SLOTS, LARGE_BYTES),
        ];
        let mut address = RINGS_BYTES as u64;
        kinds
            .into_iter()
            .flat_map(|(kind, count, bytes)| std::iter::repeat_n((kind, bytes), count))
            .enumerate()
            .map(move |(index, (kind, bytes))| {
                let slot = Slot {
                    index: index as u16,
                    kind,
                    address,
                    bytes,
                };
                address += bytes as u64;
                slot
            })
    }

    /// Whether a request and its reply fit into a small slot, each from an
    /// eight-byte boundary.
    pub(super) fn is_small(request: usize, reply: usize) -> bool {
        request.next_multiple_of(8) + reply <= SMALL_BYTES
    }

    /// Gives the memory of the large slots back to the host.
    pub(super) fn release_large(&self) -> io::Result<()> {
        let bytes = LARGE_SLOTS * LARGE_BYTES;
        let start = TOTAL_BYTES - bytes;
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, flags, start as i64, bytes as i64)?;
        Ok(())
    }

    /// Bytes of host memory that it takes at the moment.
    #[cfg(test)]
    pub(super) fn resident_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().map_or(0, |data| data.blocks() * 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn slots_lie_apart_and_fill_the_memory() {
        let mut end = RINGS_BYTES as u64;
        let mut count = 0;
        for slot in Bounce::slots() {
            assert_eq!(slot.address, end);
            assert_eq!(slot.index, count);
            end += slot.bytes as u64;
            count += 1;
        }
        assert_eq!(end, TOTAL_BYTES as u64);
        assert_eq!(count, Bounce::SLOTS);
    }

    #[test]
    fn memory_cannot_be_truncated() {
        let bounce = Bounce::try_new().expect("memory");
        assert!(bounce.file.set_len(4096).is_err());
        assert!(bounce.file.set_len(2 * TOTAL_BYTES as u64).is_err());
    }

    #[test]
    fn release_large_gives_memory_back_and_keeps_the_rest() {
        let bounce = Bounce::try_new().expect("memory");
        let slots: Vec<Slot> = Bounce::slots().collect();
        let (small, large) = (slots[20], slots[slots.len() - 1]);
        for slot in [small, large] {
            bounce
                .memory()
                .write_slice(&vec![7; slot.bytes], GuestAddress(slot.address))
                .expect("in memory");
        }
        let before = bounce.resident_bytes();
        bounce.release_large().expect("releases");
        assert!(bounce.resident_bytes() + LARGE_BYTES as u64 <= before);
        let kept: u8 = bounce
            .memory()
            .read_obj(GuestAddress(small.address))
            .expect("in memory");
        assert_eq!(kept, 7);
    }
}
