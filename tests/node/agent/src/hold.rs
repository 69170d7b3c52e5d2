//! A VM that never runs, held as long as the node lives.
//!
//! KVM patches the kernel's scheduler when a host's first VM is made and when its last one goes (`preempt_notifier_key`),
//! and its own entry path whenever no vCPU's APIC is disabled any more (`apic_sw_disabled`). An emulated node once died in the
//! scheduler of an `int3` where the code held a patched jump: most likely a translation, kept by QEMU, of the breakpoint that
//! patching puts there for a moment. With this VM neither switch is thrown while tests run.

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// Pins of an I/O APIC that nobody uses; the capability wants a number.
const PINS: u64 = 24;

/// What must stay open.
#[derive(Debug)]
pub(crate) struct Held {
    _vcpu: VcpuFd,
    _vm: VmFd,
}

/// Makes the VM and its vCPU, whose APIC is software-disabled as after a reset.
pub(crate) fn hold() -> Result<Held, String> {
    let failed = |what: &'static str| move |error| format!("{what}: {error}");
    let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(failed("create a VM"))?;
    let mut split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    split.args[0] = PINS;
    vm.enable_cap(&split)
        .map_err(failed("give the VM an interrupt controller"))?;
    let vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
    Ok(Held {
        _vcpu: vcpu,
        _vm: vm,
    })
}
