//! Puts what the guest boots into its memory: the PVH boot protocol of Xen,
//! which Linux speaks on any hypervisor.

mod command_line;
mod initramfs;
mod kernel;
mod start_info;

use std::fs::File;
use std::io;
use std::thread::{Builder, JoinHandle};

use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_config::{Memory, VmConfig};

use crate::acpi;
use crate::layout::HOLE_START;
use crate::memory;

pub use command_line::{CommandLine, CommandLineError};
pub use initramfs::InitramfsError;
pub use kernel::KernelError;
use start_info::StartInfo;
pub use start_info::StartInfoError;

/// What the guest cannot boot, and why.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initramfs.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The command line.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// The boot protocol's tables.
    #[error(transparent)]
    StartInfo(#[from] StartInfoError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// No thread.
    #[error("cannot start the thread that loads the kernel: check the pod cgroup's pids.max")]
    Thread(#[source] io::Error),
    /// A defect of ours, told on stderr.
    #[error("the thread that loads the kernel panicked")]
    Panicked,
}

/// What the guest boots.
pub struct Image {
    /// The kernel's file.
    pub kernel: File,
    /// The initramfs' file.
    pub initramfs: Option<File>,
    /// The kernel's words.
    pub command_line: CommandLine,
    /// What the ACPI tables describe.
    pub machine: acpi::Machine,
    /// What the memory map describes.
    pub memory: Memory,
}

impl Image {
    /// What this configuration says, but for the files.
    ///
    /// # Errors
    /// When the command line is too long.
    pub fn try_new(
        config: &VmConfig,
        kernel: File,
        initramfs: Option<File>,
    ) -> Result<Self, LoadError> {
        Ok(Self {
            kernel,
            initramfs,
            command_line: CommandLine::try_new(config)?,
            machine: acpi::Machine {
                cpus: config.vcpus.max,
                serial: config.console.is_some(),
            },
            memory: config.memory,
        })
    }

    /// Begins to load everything into guest memory, on a thread of its own: it
    /// is mostly waiting for pages, and so is the creation of a VM.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub fn begin_loading(self, memory: GuestMemoryMmap) -> Result<Loading, LoadError> {
        Builder::new()
            .name("load".to_owned())
            .spawn(move || self.load(&memory))
            .map(Loading)
            .map_err(LoadError::Thread)
    }

    /// Loads everything. Returns the kernel's entry point.
    fn load(mut self, memory: &GuestMemoryMmap) -> Result<u64, LoadError> {
        let low_end = memory::ram_spans(self.memory)[0].end();
        debug_assert!(low_end <= HOLE_START);
        let kernel = kernel::load(memory, &mut self.kernel, low_end)?;
        let initramfs = match &mut self.initramfs {
            Some(file) => Some(initramfs::load(memory, file, kernel.end, low_end)?),
            None => None,
        };
        self.command_line.write(memory)?;
        let rsdp = acpi::write(self.machine, memory)?;
        StartInfo {
            rsdp,
            memory_map: &memory::map_for_guest(self.memory),
            initramfs,
        }
        .write(memory)?;
        Ok(kernel.entry)
    }
}

/// An image on its way into guest memory.
pub struct Loading(JoinHandle<Result<u64, LoadError>>);

impl Loading {
    /// Waits until all is there. Returns the kernel's entry point.
    ///
    /// # Errors
    /// When the image cannot be booted.
    pub fn finish(self) -> Result<u64, LoadError> {
        self.0.join().unwrap_or(Err(LoadError::Panicked))
    }
}
