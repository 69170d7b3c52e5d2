//! The least that any monitor must do before a guest's first instruction: the
//! same memory, the same interrupt controller, one vCPU, and nothing else.
#![expect(unsafe_code, reason = "KVM maps memory that only we can vouch for")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const MEMORY_BYTES: usize = 512 << 20;
const IOAPIC_PINS: u64 = 64;
const CODE_AT: u64 = 0x1000;
/// `out %al, $0x10; hlt`: an exit that needs no interrupt controller.
const PROBE: [u8; 3] = [0xe6, 0x10, 0xf4];

/// Time from `KVM_CREATE_VM` until just before the first `KVM_RUN`, whose
/// instructions are then really executed.
///
/// # Errors
/// When KVM refuses a step.
pub fn create_to_first_run() -> Result<Duration> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let started = Instant::now();
    let vm = kvm.create_vm()?;
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])?;
    let region = memory.iter().next().context("no memory")?;
    let slot = kvm_userspace_memory_region {
        memory_size: region.len(),
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        ..Default::default()
    };
    // SAFETY: the region is mapped for as long as `memory` lives, which is
    // longer than the VM: it was made earlier in this scope than the vCPU runs.
    unsafe { vm.set_user_memory_region(slot) }?;
    let mut split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    split.args[0] = IOAPIC_PINS;
    vm.enable_cap(&split)?;
    memory.write_slice(&PROBE, GuestAddress(CODE_AT))?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut special = vcpu.get_sregs()?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_sregs(&special)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = CODE_AT;
    registers.rflags = 2;
    vcpu.set_regs(&registers)?;
    let elapsed = started.elapsed();
    ensure!(
        matches!(vcpu.run()?, VcpuExit::IoOut(0x10, _)),
        "the guest's first instruction did not run"
    );
    Ok(elapsed)
}
