//! One KVM virtual machine: memory slots, interrupt controller, event
//! descriptors.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_PMU_CAP_DISABLE, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::layout::IOAPIC_PINS;

/// What KVM refused.
#[derive(Debug, Error)]
pub enum VmError {
    /// `KVM_CREATE_VM`.
    #[error("cannot create a VM: {}", create_hint(.0))]
    Create(#[source] io::Error),
    /// `KVM_SET_USER_MEMORY_REGION`.
    #[error("KVM does not take guest memory of {size} bytes at {start:#x}")]
    MemorySlot {
        /// Guest physical address.
        start: u64,
        /// Bytes.
        size: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `KVM_ENABLE_CAP` of the split irqchip.
    #[error("KVM cannot split the interrupt controller (KVM_CAP_SPLIT_IRQCHIP)")]
    SplitIrqchip(#[source] io::Error),
    /// `KVM_ENABLE_CAP` of the disabled PMU.
    #[error("KVM cannot take the performance counters from the VM (KVM_CAP_PMU_CAPABILITY)")]
    DisablePmu(#[source] io::Error),
    /// `KVM_IRQFD`.
    #[error("KVM cannot connect an event to interrupt line {gsi}")]
    Irqfd {
        /// The line.
        gsi: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `KVM_IOEVENTFD`.
    #[error("KVM cannot connect an event to writes at {address:#x}")]
    Ioeventfd {
        /// Guest physical address.
        address: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What to check when KVM makes no VM.
fn create_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            "permission denied: check the owner and mode of /dev/kvm, and the security modules' log"
        }
        Some(libc::EBUSY) => {
            "another hypervisor (such as VirtualBox or VMware) holds the CPU's virtualisation: stop it"
        }
        Some(libc::ENODEV | libc::EOPNOTSUPP | libc::EIO) => {
            "the CPU's virtualisation is off or missing: enable VT-x or AMD-V in the firmware, or nesting on the host of this machine, and load kvm_intel or kvm_amd"
        }
        Some(libc::ENOMEM) => {
            "the host has no memory for it: check the pod cgroup's memory.max and the host's free memory"
        }
        _ => "check that guests of another monitor start on this host, and the kernel's log",
    }
}

/// A virtual machine. It lives as long as any holder of it, and its memory
/// with it.
#[derive(Clone)]
pub struct Vm {
    pub(super) fd: Arc<VmFd>,
    /// Fields are dropped in this order: the memory goes after the machine.
    _memory: GuestMemoryMmap,
}

impl Vm {
    /// Creates the VM with its memory: one slot per region. It has its slots
    /// before anything else, because a slot that is added after the interrupt
    /// controller waits for a grace period of the host's RCU: milliseconds.
    ///
    /// # Errors
    /// When the host cannot run VMs at all, or does not take the memory.
    pub fn create(kvm: &Kvm, memory: &GuestMemoryMmap) -> Result<Self, VmError> {
        let fd = kvm
            .create_vm()
            .map_err(|errno| VmError::Create(errno.into()))?;
        let vm = Self {
            fd: Arc::new(fd),
            _memory: memory.clone(),
        };
        for (slot, region) in memory.iter().enumerate() {
            vm.map_region(slot as u32, region)?;
        }
        Ok(vm)
    }

    fn map_region(&self, slot: u32, region: &vm_memory::GuestRegionMmap) -> Result<(), VmError> {
        #![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes an address")]
        let start = region.start_addr().raw_value();
        let size = region.len();
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start,
            memory_size: size,
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: `userspace_addr` and `memory_size` are those of one live mapping, made for guest
        // memory only and never viewed as a Rust reference. It outlives the guest's use of it,
        // because this VM holds it, and every vCPU holds this VM.
        unsafe { self.fd.set_user_memory_region(slot) }.map_err(|errno| VmError::MemorySlot {
            start,
            size,
            source: errno.into(),
        })
    }

    /// Local APICs in the kernel, the I/O APIC in this process, no PIC and no
    /// PIT. Must precede the first vCPU.
    ///
    /// # Errors
    /// When KVM cannot.
    pub fn split_irqchip(&self) -> Result<(), VmError> {
        let mut capability = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        capability.args[0] = u64::from(IOAPIC_PINS);
        self.fd
            .enable_cap(&capability)
            .map_err(|errno| VmError::SplitIrqchip(errno.into()))
    }

    /// Takes the performance counters from the guest, where this KVM can (since
    /// Linux 5.18): they tell about neighbours. CPUID shows none in any case.
    ///
    /// # Errors
    /// When KVM says that it can and then does not.
    pub fn disable_pmu(&self) -> Result<(), VmError> {
        let offered = self.fd.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
        if offered & KVM_PMU_CAP_DISABLE as i32 == 0 {
            return Ok(());
        }
        let mut capability = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            ..Default::default()
        };
        capability.args[0] = u64::from(KVM_PMU_CAP_DISABLE);
        self.fd
            .enable_cap(&capability)
            .map_err(|errno| VmError::DisablePmu(errno.into()))
    }

    /// Lets an event raise an interrupt line: one edge per write.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn connect_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(|errno| VmError::Irqfd {
                gsi,
                source: errno.into(),
            })
    }

    /// Lets a 32-bit write of `value` at `address` raise an event instead of
    /// leaving the guest.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn connect_notification(
        &self,
        event: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), VmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(|errno| VmError::Ioeventfd {
                address,
                source: errno.into(),
            })
    }

    /// Takes an event from its interrupt line. What was raised before has
    /// reached the guest's interrupt controller when it returns. Does nothing
    /// when they are not connected.
    pub fn disconnect_interrupt(&self, event: &EventFd, gsi: u32) {
        // Fails only when they are not connected.
        let _ = self.fd.unregister_irqfd(event, gsi);
    }

    /// Undoes [`connect_notification`](Self::connect_notification): such writes
    /// leave the guest again. Does nothing when they are not connected.
    pub fn disconnect_notification(&self, event: &EventFd, address: u64, value: u32) {
        // Fails only when they are not connected.
        let _ = self
            .fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), value);
    }
}
