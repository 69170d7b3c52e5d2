//! The kernel: an uncompressed ELF with a PVH entry note.

use std::fs::File;

use linux_loader::loader::elf::{Elf, Error as ElfError, PvhBootCapability};
use linux_loader::loader::{Error as LoaderError, KernelLoader};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::layout::HIGH_RAM;

/// A kernel that cannot be booted.
#[derive(Debug, Error)]
pub enum KernelError {
    /// Not an ELF.
    #[error(
        "the kernel is not an uncompressed 64-bit ELF: pass vmlinux, not bzImage or vmlinuz; the file may also be cut short"
    )]
    NotElf(#[source] LoaderError),
    /// An ELF, but a program.
    #[error("the ELF is no kernel: it is entered below 1 MiB; pass vmlinux")]
    NotKernel(#[source] LoaderError),
    /// Some segment is outside memory, or the file ends before it.
    #[error(
        "the kernel cannot be loaded: the file is cut short, or it needs more than {memory_mib} MiB of memory"
    )]
    Segments {
        /// Memory of the VM.
        memory_mib: u64,
        /// What the loader says.
        #[source]
        source: LoaderError,
    },
    /// Without the note that says where to enter.
    #[error("the kernel has no PVH entry note: build it with CONFIG_PVH=y")]
    NoPvhNote,
    /// The file says more memory than there is.
    #[error("the kernel ends at {end:#x}, but memory at {memory_end:#x}: give the VM more memory")]
    TooLarge {
        /// First address after the kernel.
        end: u64,
        /// First address after the memory that it can lie in.
        memory_end: u64,
    },
}

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Where the first vCPU starts, in 32-bit protected mode without paging.
    pub entry: u64,
    /// First address after the kernel and its zeroed data.
    pub end: u64,
}

/// Loads the kernel where its ELF says. `memory_end` is the end of the RAM
/// below the hole.
///
/// # Errors
/// When the file is no such kernel, or does not fit.
pub fn load(
    memory: &GuestMemoryMmap,
    file: &mut File,
    memory_end: u64,
) -> Result<Kernel, KernelError> {
    let loaded = Elf::load(memory, None, file, Some(GuestAddress(HIGH_RAM)))
        .map_err(|source| classify(source, memory))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(KernelError::NoPvhNote);
    };
    if loaded.kernel_end > memory_end {
        return Err(KernelError::TooLarge {
            end: loaded.kernel_end,
            memory_end,
        });
    }
    Ok(Kernel {
        entry: entry.0,
        end: loaded.kernel_end,
    })
}

fn classify(source: LoaderError, memory: &GuestMemoryMmap) -> KernelError {
    match source {
        LoaderError::Elf(
            ElfError::ReadKernelImage | ElfError::InvalidProgramHeaderAddress | ElfError::Overflow,
        )
        | LoaderError::MemoryOverflow => KernelError::Segments {
            // What lies above the hole is out of its reach.
            memory_mib: memory
                .iter()
                .next()
                .map_or(0, vm_memory::GuestMemoryRegion::len)
                >> 20,
            source,
        },
        LoaderError::Elf(ElfError::InvalidEntryAddress) => KernelError::NotKernel(source),
        source => KernelError::NotElf(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use vm_memory::Bytes;

    const ENTRY: u32 = 0x20_0000;
    const MEMORY_END: u64 = 4 << 20;

    /// A minimal ELF: one loaded segment and the PVH note, if wanted.
    fn elf(note: bool, memory_size: u64) -> Vec<u8> {
        let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
        elf.resize(16, 0);
        elf.extend(2u16.to_le_bytes()); // ET_EXEC
        elf.extend(62u16.to_le_bytes()); // EM_X86_64
        elf.extend(1u32.to_le_bytes());
        elf.extend(u64::from(ENTRY).to_le_bytes());
        elf.extend(64u64.to_le_bytes()); // program headers follow this header
        elf.extend(0u64.to_le_bytes());
        elf.extend(0u32.to_le_bytes());
        elf.extend(64u16.to_le_bytes());
        elf.extend(56u16.to_le_bytes());
        elf.extend(2u16.to_le_bytes());
        elf.extend([0; 6]);
        let data = 64 + 2 * 56;
        let mut header = |type_: u32, offset: u64, address: u64, file: u64, size: u64| {
            elf.extend(type_.to_le_bytes());
            elf.extend(5u32.to_le_bytes());
            for value in [offset, address, address, file, size, 4] {
                elf.extend(value.to_le_bytes());
            }
        };
        header(1, data, u64::from(ENTRY), 4, memory_size);
        header(4, data + 4, 0, 20, 20);
        elf.extend([0xf4; 4]);
        elf.extend(4u32.to_le_bytes());
        elf.extend(4u32.to_le_bytes());
        elf.extend(if note { 18u32 } else { 1 }.to_le_bytes());
        elf.extend(b"Xen\0");
        elf.extend(ENTRY.to_le_bytes());
        elf
    }

    fn load_bytes(bytes: &[u8]) -> (GuestMemoryMmap, Result<Kernel, KernelError>) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_END as usize)])
            .expect("4 MiB can be mapped");
        let path = std::env::temp_dir().join(format!(
            "bulkhead-vmm-kernel-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let mut file = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .expect("temporary file");
        std::fs::remove_file(&path).expect("just made");
        file.write_all(bytes).expect("written");
        let result = load(&memory, &mut file, MEMORY_END);
        (memory, result)
    }

    #[test]
    fn load_elf_with_pvh_note_puts_it_where_it_says() {
        let (memory, kernel) = load_bytes(&elf(true, 0x1000));
        let kernel = kernel.expect("loads");
        assert_eq!(
            kernel,
            Kernel {
                entry: u64::from(ENTRY),
                end: u64::from(ENTRY) + 0x1000
            }
        );
        let code: u32 = memory
            .read_obj(GuestAddress(u64::from(ENTRY)))
            .expect("in memory");
        assert_eq!(code, 0xf4f4_f4f4);
    }

    #[test]
    fn load_elf_without_pvh_note_says_how_to_build_it() {
        let error = load_bytes(&elf(false, 0x1000)).1.expect_err("no note");
        assert!(error.to_string().contains("CONFIG_PVH"), "{error}");
    }

    #[test]
    fn load_garbage_says_that_it_is_no_elf() {
        let error = load_bytes(&[0x5a; 4096]).1.expect_err("garbage");
        assert!(matches!(error, KernelError::NotElf(_)), "{error}");
    }

    #[test]
    fn load_kernel_larger_than_memory_is_refused() {
        let error = load_bytes(&elf(true, MEMORY_END)).1.expect_err("too large");
        assert!(matches!(error, KernelError::TooLarge { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn load_damaged_kernel_never_panics(at in 0usize..200, byte: u8, cut in 0usize..220) {
            let mut bytes = elf(true, 0x1000);
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(cut.max(1));
            let _ = load_bytes(&bytes);
        }
    }
}
