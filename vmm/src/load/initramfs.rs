//! The initial RAM file system, at the top of the memory below the hole.

use std::fs::File;
use std::io;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::layout::PAGE_SIZE;
use crate::memory::Span;

/// An initramfs that cannot be loaded.
#[derive(Debug, Error)]
pub enum InitramfsError {
    /// Its size cannot be found out.
    #[error("cannot find out the size of the initramfs")]
    Size(#[source] io::Error),
    /// No bytes in it.
    #[error("the initramfs is empty or not a regular file")]
    Empty,
    /// Larger than the memory that the kernel leaves.
    #[error(
        "the initramfs of {bytes} bytes does not fit: beside the kernel there are {available} bytes; give the VM more memory"
    )]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// Memory below the hole that the kernel does not take.
        available: u64,
    },
    /// The file cannot be read to its end.
    #[error("cannot read the initramfs of {bytes} bytes")]
    Read {
        /// Its size.
        bytes: u64,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Loads the initramfs between the kernel and the end of the memory below the
/// hole, as high as it goes, on a page boundary: the boot protocol has 32 bits
/// for its address.
///
/// # Errors
/// When it does not fit, or cannot be read.
pub fn load(
    memory: &GuestMemoryMmap,
    file: &mut File,
    kernel_end: u64,
    memory_end: u64,
) -> Result<Span, InitramfsError> {
    let size = file.metadata().map_err(InitramfsError::Size)?.len();
    let span = place(size, kernel_end, memory_end)?;
    memory
        .read_exact_volatile_from(GuestAddress(span.start), file, size as usize)
        .map_err(|source| InitramfsError::Read {
            bytes: size,
            source,
        })?;
    Ok(span)
}

fn place(size: u64, kernel_end: u64, memory_end: u64) -> Result<Span, InitramfsError> {
    if size == 0 {
        return Err(InitramfsError::Empty);
    }
    let start = memory_end
        .checked_sub(size)
        .map(|start| start & !(PAGE_SIZE - 1))
        .filter(|&start| start >= kernel_end)
        .ok_or(InitramfsError::TooLarge {
            bytes: size,
            available: memory_end.saturating_sub(kernel_end),
        })?;
    Ok(Span { start, size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn place_empty_file_is_refused() {
        assert!(matches!(place(0, 0, 1 << 20), Err(InitramfsError::Empty)));
    }

    proptest! {
        #[test]
        fn place_any_size_is_page_aligned_between_kernel_and_end(
            size in 1u64..1 << 33,
            kernel_end in 0u64..1 << 32,
            memory_end in 0u64..=0xc000_0000,
        ) {
            match place(size, kernel_end, memory_end) {
                Ok(span) => {
                    prop_assert_eq!(span.start % PAGE_SIZE, 0);
                    prop_assert!(span.start >= kernel_end && span.end() <= memory_end);
                }
                Err(_) => prop_assert!(kernel_end + size + PAGE_SIZE > memory_end),
            }
        }
    }
}
