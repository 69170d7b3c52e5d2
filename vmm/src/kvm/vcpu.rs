//! Virtual CPUs: their state at start, and the threads that run them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry, kvm_regs,
    kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use thiserror::Error;
use vmm_config::control::ExitReason;
use vmm_sys_util::errno::Error as Errno;

use super::kick::{self, Kickable};
use super::{Vm, cpuid};
use crate::bus::Bus;
use crate::layout::START_INFO;
use crate::lifecycle::Lifecycle;

/// A vCPU that cannot be made.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// `KVM_GET_SUPPORTED_CPUID`.
    #[error("KVM does not say which CPU features it supports")]
    SupportedCpuid(#[source] io::Error),
    /// More leaves than KVM takes.
    #[error("CPUID of {leaves} leaves is more than KVM takes")]
    CpuidTooLong {
        /// How many.
        leaves: usize,
    },
    /// Some ioctl on the vCPU.
    #[error("KVM refuses to {operation} of vCPU {id}")]
    Ioctl {
        /// Which vCPU.
        id: u8,
        /// What was asked.
        operation: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `KVM_SET_MSRS` stops at the first that it does not take.
    #[error("KVM does not take model-specific register {index:#x} of vCPU {id}")]
    Msr {
        /// Which vCPU.
        id: u8,
        /// Which register.
        index: u32,
    },
    /// The signal handler of the kick.
    #[error("cannot install the signal handler that stops vCPUs")]
    Signal(#[source] io::Error),
    /// No thread.
    #[error("cannot start the thread of vCPU {id}: check the pod cgroup's pids.max")]
    Thread {
        /// Which vCPU.
        id: u8,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Model-specific registers that firmware sets: fast string operations on
/// (`IA32_MISC_ENABLE`), and memory write-back unless said otherwise, with the
/// range registers on (`IA32_MTRR_DEF_TYPE`).
const MSRS: [(u32, u64); 2] = [(0x1a0, 1), (0x2ff, (1 << 11) | 6)];
/// Offsets of a local APIC's LINT0 and LINT1 registers (Intel SDM vol. 3A
/// table 11-1).
const APIC_LINT0: usize = 0x350;
const APIC_LINT1: usize = 0x360;
/// Delivery mode NMI of such a register, and its mask bit (figure 11-8).
const APIC_MODE_NMI: u32 = 4 << 8;
const APIC_MASKED: u32 = 1 << 16;

/// What every vCPU of one machine has in common.
pub struct VcpuModel {
    supported: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
    max: u8,
}

impl VcpuModel {
    /// The most vCPUs that the machine will ever have.
    pub fn max(&self) -> u8 {
        self.max
    }

    /// Asks KVM for what its CPUs can do. `max` is the most vCPUs that the
    /// machine will ever have.
    ///
    /// # Errors
    /// When KVM does not say.
    pub fn try_new(kvm: &Kvm, max: u8) -> Result<Self, VcpuError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|errno| VcpuError::SupportedCpuid(errno.into()))?;
        Ok(Self {
            supported: supported.as_slice().to_vec(),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            max,
        })
    }
}

/// A virtual CPU that does not run yet.
pub struct Vcpu {
    id: u8,
    fd: VcpuFd,
    /// Keeps the machine and its memory for as long as the guest can run.
    _vm: Vm,
}

impl Vcpu {
    /// Creates the vCPU with this APIC id. It waits for the guest to start it,
    /// unless [`boot_from`](Self::boot_from) follows.
    ///
    /// # Errors
    /// When KVM refuses some part of its state.
    pub fn create(vm: &Vm, model: &VcpuModel, id: u8) -> Result<Self, VcpuError> {
        let fd = vm
            .fd
            .create_vcpu(id.into())
            .map_err(refused(id, "make the CPU"))?;
        let vcpu = Self {
            id,
            fd,
            _vm: vm.clone(),
        };
        vcpu.set_cpuid(model)?;
        vcpu.set_local_apic()?;
        vcpu.set_msrs()?;
        Ok(vcpu)
    }

    fn set_cpuid(&self, model: &VcpuModel) -> Result<(), VcpuError> {
        let leaves = cpuid::for_vcpu(&model.supported, self.id, model.max, model.tsc_deadline);
        let table = cpuid::table(&leaves).ok_or(VcpuError::CpuidTooLong {
            leaves: leaves.len(),
        })?;
        self.fd
            .set_cpuid2(&table)
            .map_err(refused(self.id, "set the CPUID"))
    }

    /// `KVM_SET_LAPIC` is needed even without a change: Linux (6.12) makes its
    /// map of APICs while the new vCPU is not yet in its table, so that a vCPU
    /// added to a running VM would never get the guest's start-up interrupt.
    fn set_local_apic(&self) -> Result<(), VcpuError> {
        let mut apic = self
            .fd
            .get_lapic()
            .map_err(refused(self.id, "read the local APIC"))?;
        // No legacy interrupt controller is wired to LINT0; LINT1 is the NMI pin.
        set_apic_register(&mut apic, APIC_LINT0, APIC_MASKED);
        set_apic_register(&mut apic, APIC_LINT1, APIC_MODE_NMI);
        self.fd
            .set_lapic(&apic)
            .map_err(refused(self.id, "set the local APIC"))
    }

    fn set_msrs(&self) -> Result<(), VcpuError> {
        let entries = MSRS.map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        });
        let msrs = Msrs::from_entries(&entries).expect("a handful is below the limit");
        let set = self
            .fd
            .set_msrs(&msrs)
            .map_err(refused(self.id, "set the model-specific registers"))?;
        match MSRS.get(set) {
            None => Ok(()),
            Some(&(index, _)) => Err(VcpuError::Msr { id: self.id, index }),
        }
    }

    /// Lets this vCPU start at a PVH entry: 32-bit protected mode, paging off,
    /// flat segments, the start info in EBX (Xen's
    /// docs/misc/pvh.pandoc, "x86/HVM direct boot ABI").
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn boot_from(&self, entry: u64) -> Result<(), VcpuError> {
        let mut sregs = self
            .fd
            .get_sregs()
            .map_err(refused(self.id, "read the system registers"))?;
        let data = flat_segment(0x10, 0x3);
        sregs.cs = flat_segment(0x8, 0xb);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        // A busy 32-bit task state segment of the least size.
        sregs.tr = kvm_segment {
            limit: 0x67,
            selector: 0x18,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        // Protection enabled; the extension type bit is always one.
        sregs.cr0 = 0x11;
        sregs.cr4 = 0;
        sregs.efer = 0;
        self.fd
            .set_sregs(&sregs)
            .map_err(refused(self.id, "set the system registers"))?;
        let regs = kvm_regs {
            rip: entry,
            rbx: START_INFO,
            // Bit 1 is always one; interrupts are off.
            rflags: 2,
            ..Default::default()
        };
        self.fd
            .set_regs(&regs)
            .map_err(refused(self.id, "set the registers"))
    }
}

fn refused(id: u8, operation: &'static str) -> impl Fn(Errno) -> VcpuError {
    move |errno| VcpuError::Ioctl {
        id,
        operation,
        source: errno.into(),
    }
}

fn set_apic_register(apic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in apic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *register = byte.cast_signed();
    }
}

/// A segment that covers 4 GiB from 0, of this type (Intel SDM vol. 3A section
/// 3.4.5.1).
fn flat_segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// What a vCPU thread needs besides its vCPU.
pub struct Surroundings {
    /// Devices at ports.
    pub ports: Bus,
    /// Devices at memory addresses.
    pub mmio: Bus,
    /// Where the end of the VM is told.
    pub lifecycle: Arc<Lifecycle>,
}

/// The threads of the vCPUs, `vcpu0` and so on.
pub struct VcpuThreads {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl VcpuThreads {
    /// Starts a thread for each vCPU. Returns when the first is about to enter
    /// the guest, with that time.
    ///
    /// # Errors
    /// When a thread cannot be started; those that were are stopped.
    pub fn start(
        vcpus: Vec<Vcpu>,
        surroundings: &Arc<Surroundings>,
    ) -> Result<(Self, Instant), VcpuError> {
        kick::install().map_err(VcpuError::Signal)?;
        let (sender, entered) = mpsc::channel();
        let mut started = Self {
            threads: Vec::with_capacity(vcpus.len()),
            stop: Arc::default(),
        };
        // The first vCPU last: when it starts the others, they are there.
        for vcpu in vcpus.into_iter().rev() {
            started.spawn(vcpu, surroundings, &sender)?;
        }
        drop(sender);
        let at = entered
            .into_iter()
            .find_map(|(id, at)| (id == 0).then_some(at))
            .unwrap_or_else(Instant::now);
        Ok((started, at))
    }

    /// Starts the thread of one more vCPU, which the guest may start once this returns.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn add(&mut self, vcpu: Vcpu, surroundings: &Arc<Surroundings>) -> Result<(), VcpuError> {
        let (sender, entered) = mpsc::channel();
        self.spawn(vcpu, surroundings, &sender)?;
        drop(sender);
        // Gone without a word only when it panicked, which ends the VM.
        let _ = entered.recv();
        Ok(())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Starts a thread, which tells when it is about to enter the guest.
    fn spawn(
        &mut self,
        mut vcpu: Vcpu,
        surroundings: &Arc<Surroundings>,
        entered: &mpsc::Sender<(u8, Instant)>,
    ) -> Result<(), VcpuError> {
        let id = vcpu.id;
        let stop = Arc::clone(&self.stop);
        let surroundings = Arc::clone(surroundings);
        let entered = entered.clone();
        let thread = Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                let mut kickable = Kickable::new(&mut vcpu.fd);
                // The receiver may be gone: it waits for the first vCPU only.
                let _ = entered.send((id, Instant::now()));
                run(&mut kickable, id, &surroundings, &stop);
            })
            .map_err(|source| VcpuError::Thread { id, source })?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for VcpuThreads {
    /// Gets every vCPU out of the guest and joins its thread.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in &self.threads {
            kick::kick(thread);
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so on stderr.
            let _ = thread.join();
        }
    }
}

/// Runs a vCPU until it is stopped or the guest ends.
fn run(kickable: &mut Kickable<'_>, id: u8, surroundings: &Surroundings, stop: &AtomicBool) {
    let lifecycle = &surroundings.lifecycle;
    let _guard = PanicGuard { id, lifecycle };
    while !stop.load(Ordering::Acquire) {
        let next = handle(kickable.vcpu().run(), surroundings);
        let vcpu = kickable.vcpu();
        let failure = match next {
            Next::Enter => continue,
            Next::EnterUnlessStopped => {
                vcpu.set_kvm_immediate_exit(0);
                continue;
            }
            Next::End => return,
            Next::Fail(failure) => failure,
            Next::FailInternally => internal_error(vcpu),
        };
        let error = match vcpu.get_regs() {
            Ok(regs) => format!("vCPU {id} at rip {:#x}: {failure}", regs.rip),
            Err(_) => format!("vCPU {id}: {failure}"),
        };
        lifecycle.report_end(ExitReason::VcpuFailed { error });
        return;
    }
}

/// What a vCPU thread does after an exit.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// The guest goes on.
    Enter,
    /// It goes on if the interruption was not a kick.
    EnterUnlessStopped,
    /// The VM has ended.
    End,
    /// KVM cannot go on, and this is why.
    Fail(String),
    /// The same, and the vCPU's `kvm_run` page tells why.
    FailInternally,
}

/// Does what the guest asks for.
fn handle(exit: Result<VcpuExit<'_>, Errno>, surroundings: &Surroundings) -> Next {
    let Surroundings {
        ports,
        mmio,
        lifecycle,
    } = surroundings;
    match exit {
        Ok(VcpuExit::IoIn(port, data)) => {
            ports.read(port.into(), data);
            Next::Enter
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            ports.write(port.into(), data);
            // A guest that has powered itself off must not run on: it would say that it could not,
            // and try other ways.
            if lifecycle.is_ended() {
                Next::End
            } else {
                Next::Enter
            }
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            mmio.read(address, data);
            Next::Enter
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            mmio.write(address, data);
            Next::Enter
        }
        // An interrupt that the guest made level-triggered has ended; lines here are edges, and
        // nothing waits for it.
        Ok(VcpuExit::IoapicEoi(_) | VcpuExit::Intr) => Next::Enter,
        Ok(VcpuExit::Shutdown) => {
            lifecycle.report_end(ExitReason::TripleFault);
            Next::End
        }
        Ok(VcpuExit::InternalError) => Next::FailInternally,
        Ok(VcpuExit::FailEntry(reason, cpu)) => Next::Fail(format!(
            "the host's CPU {cpu} refuses to enter the guest, hardware reason {reason:#x}"
        )),
        Ok(exit) => Next::Fail(format!("unexpected exit {exit:?}")),
        // Interrupted by a signal; or, once for each vCPU that the guest starts, the state of
        // which has just changed.
        Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => {
            Next::EnterUnlessStopped
        }
        Err(errno) => Next::Fail(format!("KVM_RUN: {errno}")),
    }
}

/// Ends the VM when a vCPU's thread panics: it would otherwise go on without
/// that vCPU, and hang. Only in a build in which a panic does not abort.
struct PanicGuard<'a> {
    id: u8,
    lifecycle: &'a Lifecycle,
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let error = format!(
                "the thread of vCPU {} panicked; see the monitor's log",
                self.id
            );
            self.lifecycle.report_end(ExitReason::VcpuFailed { error });
        }
    }
}

/// What KVM says about an internal error of its own.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    #![expect(unsafe_code, reason = "the exit's details are in a C union")]
    // SAFETY: called only right after an exit with KVM_EXIT_INTERNAL_ERROR, for which the kernel
    // fills this field of the union; integers, for which every bit pattern is a value.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let what = match internal.suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
        _ => "KVM internal error",
    };
    let data: Vec<_> = internal
        .data
        .iter()
        .take(internal.ndata as usize)
        .map(|word| format!("{word:#x}"))
        .collect();
    format!("{what} ({}; {})", internal.suberror, data.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Registers;
    use crate::layout::ACPI_PM_PORTS;
    use crate::platform::Power;

    struct Panicking;

    impl Registers for Panicking {
        fn read(&mut self, _offset: u64, _data: &mut [u8]) {
            panic!("as asked");
        }
        fn write(&mut self, _offset: u64, _data: &[u8]) {}
    }

    fn surroundings() -> Surroundings {
        let lifecycle = Arc::new(Lifecycle::try_new().expect("event"));
        let mut ports = Bus::default();
        ports.attach("panicking", 1..=1, Panicking).expect("free");
        let power = Power(Arc::clone(&lifecycle));
        ports.attach("power", ACPI_PM_PORTS, power).expect("free");
        Surroundings {
            ports,
            mmio: Bus::default(),
            lifecycle,
        }
    }

    #[test]
    fn handle_power_off_does_not_enter_the_guest_again() {
        let surroundings = surroundings();
        let other = VcpuExit::IoOut(0x80, &[0]);
        assert_eq!(handle(Ok(other), &surroundings), Next::Enter);
        let port = *ACPI_PM_PORTS.start() as u16;
        let power_off = VcpuExit::IoOut(port, &[(5 << 2) | (1 << 5)]);
        assert_eq!(handle(Ok(power_off), &surroundings), Next::End);
        let ended = surroundings.lifecycle.state().ended;
        assert_eq!(ended, Some(ExitReason::PowerOff));
    }

    #[test]
    fn handle_interruption_enters_again_and_any_other_error_fails() {
        let surroundings = surroundings();
        let interrupted = Err(Errno::new(libc::EINTR));
        assert_eq!(handle(interrupted, &surroundings), Next::EnterUnlessStopped);
        let failed = handle(Err(Errno::new(libc::EFAULT)), &surroundings);
        assert!(matches!(failed, Next::Fail(_)), "{failed:?}");
    }

    #[test]
    fn panic_of_a_device_model_ends_the_vm_and_names_the_vcpu() {
        let surroundings = surroundings();
        std::thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                let lifecycle = &surroundings.lifecycle;
                let _guard = PanicGuard { id: 3, lifecycle };
                handle(Ok(VcpuExit::IoIn(1, &mut [0])), &surroundings)
            });
            vcpu.join().expect_err("panics");
        });
        let ended = surroundings.lifecycle.state().ended;
        let Some(ExitReason::VcpuFailed { error }) = ended else {
            panic!("{ended:?}");
        };
        assert!(
            error.starts_with("the thread of vCPU 3 panicked"),
            "{error}"
        );
    }
}
