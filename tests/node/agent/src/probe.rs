//! Whether this machine can run a guest: by running one.
#![expect(unsafe_code, reason = "KVM takes the address of the guest's memory")]

use kvm_ioctls::{Kvm, VcpuExit};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use std::num::NonZeroUsize;

/// What the tool looks for in the probe's output.
pub(crate) const RUNS: &str = "PROBE a guest runs";

const PAGE: usize = 4096;
/// mov al, 3; add al, 4; out 0x10, al; hlt
const CODE: [u8; 7] = [0xb0, 0x03, 0x04, 0x04, 0xe6, 0x10, 0xf4];

/// Runs one page of real-mode code that computes 7 and writes it to a port.
pub(crate) fn run() -> Result<(), String> {
    let failed = |what: &'static str| move |error| format!("{what}: {error}");
    let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(failed("create a VM"))?;
    let length = NonZeroUsize::new(PAGE).ok_or("no page")?;
    // SAFETY: an anonymous mapping at an address of the kernel's choice; nothing else is affected.
    let memory = unsafe {
        mmap_anonymous(
            None,
            length,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_SHARED,
        )
    }
    .map_err(|error| format!("map the guest's memory: {error}"))?;
    // SAFETY: the mapping is one page, longer than the code, aligned, and nothing else refers to it yet.
    unsafe { memory.cast::<[u8; CODE.len()]>().write(CODE) };
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: PAGE as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: the range is mapped until this process ends, and no Rust reference into it exists.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("give the VM memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
    let mut segments = vcpu.get_sregs().map_err(failed("read the vCPU"))?;
    segments.cs.base = 0;
    segments.cs.selector = 0;
    vcpu.set_sregs(&segments)
        .map_err(failed("set the vCPU up"))?;
    let mut registers = vcpu.get_regs().map_err(failed("read the vCPU"))?;
    registers.rip = 0;
    registers.rflags = 2;
    vcpu.set_regs(&registers)
        .map_err(failed("set the vCPU up"))?;
    match vcpu.run().map_err(failed("run the vCPU"))? {
        VcpuExit::IoOut(0x10, [7]) => Ok(()),
        other => Err(format!("the guest did something else: {other:?}")),
    }
}
