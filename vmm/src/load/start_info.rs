//! What the PVH boot protocol tells the kernel: `hvm_start_info` and the tables
//! that it points to (Xen's public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::layout::{COMMAND_LINE, MEMORY_MAP, MODULE_LIST, START_INFO};
use crate::memory::Span;

/// Guest memory that must be there is not.
#[derive(Debug, Error)]
#[error("cannot write {what} to guest memory")]
pub struct StartInfoError {
    what: &'static str,
    #[source]
    source: vm_memory::GuestMemoryError,
}

/// What the kernel is told.
pub struct StartInfo<'a> {
    /// Address of the ACPI root pointer.
    pub rsdp: u64,
    /// The memory map.
    pub memory_map: &'a [hvm_memmap_table_entry],
    /// Where the initramfs is.
    pub initramfs: Option<Span>,
}

impl StartInfo<'_> {
    /// Writes it where the first vCPU will look: at [`START_INFO`].
    ///
    /// # Errors
    /// When the VM has no memory there.
    pub fn write(&self, memory: &GuestMemoryMmap) -> Result<(), StartInfoError> {
        let failed = |what| move |source| StartInfoError { what, source };
        let mut address = GuestAddress(MEMORY_MAP);
        for entry in self.memory_map {
            memory
                .write_obj(*entry, address)
                .map_err(failed("the memory map"))?;
            address.0 += size_of::<hvm_memmap_table_entry>() as u64;
        }
        if let Some(Span { start, size }) = self.initramfs {
            let module = hvm_modlist_entry {
                paddr: start,
                size,
                ..Default::default()
            };
            memory
                .write_obj(module, GuestAddress(MODULE_LIST))
                .map_err(failed("the module list"))?;
        }
        let start_info = hvm_start_info {
            magic: XEN_HVM_START_MAGIC_VALUE,
            // The first version with a memory map.
            version: 1,
            nr_modules: u32::from(self.initramfs.is_some()),
            modlist_paddr: MODULE_LIST,
            cmdline_paddr: COMMAND_LINE,
            rsdp_paddr: self.rsdp,
            memmap_paddr: MEMORY_MAP,
            memmap_entries: self.memory_map.len() as u32,
            ..Default::default()
        };
        memory
            .write_obj(start_info, GuestAddress(START_INFO))
            .map_err(failed("the start info"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_config::Memory;

    #[test]
    fn write_without_initramfs_lists_no_module() {
        let config = Memory {
            size_mib: 64,
            max_mib: 64,
        };
        let memory = crate::memory::map(config).expect("mapped");
        let memory_map = crate::memory::map_for_guest(config);
        StartInfo {
            rsdp: 0xe0000,
            memory_map: &memory_map,
            initramfs: None,
        }
        .write(&memory)
        .expect("written");
        let start_info: hvm_start_info = memory
            .read_obj(GuestAddress(START_INFO))
            .expect("in memory");
        assert_eq!(start_info.nr_modules, 0);
        assert_eq!(start_info.memmap_entries as usize, memory_map.len());
        let last: hvm_memmap_table_entry = memory
            .read_obj(GuestAddress(
                MEMORY_MAP + 24 * (u64::from(start_info.memmap_entries) - 1),
            ))
            .expect("in memory");
        assert_eq!(last.addr + last.size, 64 << 20);
    }
}
