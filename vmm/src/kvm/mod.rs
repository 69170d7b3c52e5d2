//! The host's KVM: what this monitor asks of it, and how each refusal is told.

mod cpuid;
mod interrupts;
mod kick;
mod vcpu;
mod vm;

use std::os::fd::{IntoRawFd, OwnedFd};

use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

pub use interrupts::Routes;
pub use vcpu::{Surroundings, Vcpu, VcpuError, VcpuModel, VcpuThreads};
pub use vm::{Vm, VmError};

/// `KVM_GET_API_VERSION` of every KVM since Linux 2.6.22; no other will come
/// (KVM API documentation section 4.1).
const API_VERSION: i32 = 12;

/// Every capability that this monitor cannot do without.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// A descriptor that is not a KVM that we can use.
#[derive(Debug, Error)]
pub enum KvmError {
    /// Not `/dev/kvm`.
    #[error("the descriptor passed as KVM is not /dev/kvm")]
    NotKvm,
    /// Another interface.
    #[error(
        "KVM speaks API version {version}, not {API_VERSION}: this kernel cannot run VMs for us"
    )]
    ApiVersion {
        /// As KVM says.
        version: i32,
    },
    /// A KVM too old or cut down.
    #[error("KVM lacks {name}: the host needs Linux 5.10 or newer with KVM for x86-64 in full")]
    MissingCapability {
        /// Its name in the KVM API documentation.
        name: &'static str,
    },
}

/// Takes the open `/dev/kvm` and checks that it has all that we need.
///
/// # Errors
/// When it is something else, or lacks something.
pub fn open(device: OwnedFd) -> Result<Kvm, KvmError> {
    let kvm = adopt(device);
    match kvm.get_api_version() {
        API_VERSION => {}
        ..0 => return Err(KvmError::NotKvm),
        version => return Err(KvmError::ApiVersion { version }),
    }
    for (capability, name) in NEEDED {
        if !kvm.check_extension(capability) {
            return Err(KvmError::MissingCapability { name });
        }
    }
    Ok(kvm)
}

fn adopt(device: OwnedFd) -> Kvm {
    #![expect(
        unsafe_code,
        reason = "kvm-ioctls takes a descriptor only as a raw one"
    )]
    use std::os::fd::FromRawFd;
    // SAFETY: the descriptor is open and ours alone, since it was an OwnedFd, which gives it up
    // here. That it may be something else than /dev/kvm harms no memory: ioctls of KVM's type on it
    // fail, and `open` looks for that before any other use.
    unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_descriptor_that_is_not_kvm_says_so() {
        let null = std::fs::File::open("/dev/null").expect("every Linux has it");
        assert!(matches!(open(null.into()), Err(KvmError::NotKvm)));
    }
}
