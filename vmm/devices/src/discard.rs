//! Giving guest memory back to the host.

use std::io;

use libc::{MADV_DONTNEED, madvise};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// Pages are given back whole.
const PAGE_BYTES: usize = 4096;

/// Gives the whole pages of this range of guest memory back to the host: from now
/// on they read as zeros, and cost the host nothing until they are written.
/// What of the range is not guest memory is left out.
///
/// # Errors
/// What the kernel says (madvise(2)).
pub(crate) fn discard(memory: &GuestMemoryMmap, start: u64, bytes: usize) -> io::Result<()> {
    #![expect(unsafe_code, reason = "madvise takes an address")]
    let slices = memory
        .get_slices(GuestAddress(start), bytes, Permissions::Write)
        .map_err(io::Error::other)?;
    for slice in slices {
        let Ok(slice) = slice else {
            continue;
        };
        let guard = slice.ptr_guard_mut();
        let first = guard.as_ptr() as usize;
        let whole = first.next_multiple_of(PAGE_BYTES);
        let end = (first + slice.len()) / PAGE_BYTES * PAGE_BYTES;
        if whole >= end {
            continue;
        }
        // SAFETY: the pages lie in a live mapping that was made for guest memory only and is
        // never viewed as a Rust reference: that its bytes change is what it is for.
        let result = unsafe { madvise(whole as *mut _, end - whole, MADV_DONTNEED) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn discard_clears_whole_pages_and_nothing_beside_them() {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 0x4000),
            (GuestAddress(0x4000), 0x4000),
        ])
        .expect("memory");
        memory
            .write_slice(&vec![7; 0x8000], GuestAddress(0))
            .expect("is there");
        discard(&memory, 0x1800, 0x4000).expect("discards");
        let mut bytes = vec![0; 0x8000];
        memory
            .read_slice(&mut bytes, GuestAddress(0))
            .expect("is there");
        // From the first whole page to the last, over the seam between two regions.
        for (address, byte) in bytes.iter().enumerate() {
            let wanted = if (0x2000..0x5000).contains(&address) {
                0
            } else {
                7
            };
            assert_eq!(*byte, wanted, "{address:#x}");
        }
    }

    #[test]
    fn discard_outside_memory_changes_nothing() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).expect("memory");
        memory.write_obj(7_u8, GuestAddress(0)).expect("is there");
        let _ = discard(&memory, 0x10_0000, 0x1000);
        let _ = discard(&memory, u64::MAX, usize::MAX);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).expect("is there"), 7);
    }
}
