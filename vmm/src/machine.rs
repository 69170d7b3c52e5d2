//! The machine: how it is made, and how it ends.

use std::error::Error;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_config::control::{Exit, ExitReason, Timings};
use vmm_config::{ConfigError, VmConfig};
use vmm_devices::ramoops::{self, is_panic};
use vmm_devices::{
    Balloon, FileSystem, FileSystemConfig, FileSystemError, Mem, MemConfig, MemError, MemSize, Net,
    Rng, Serial, TooMuch, Vsock, VsockConfig,
};

use crate::bus::{Bus, Overlap};
use crate::control::Descriptors;
use crate::kvm::{
    self, KvmError, Routes, Surroundings, Vcpu, VcpuError, VcpuModel, VcpuThreads, Vm, VmError,
};
use crate::layout::{
    ACPI_PM_PORTS, IOAPIC, IOAPIC_SIZE, KEYBOARD_CONTROLLER_PORT, PVPANIC_PORT, RAMOOPS,
    RAMOOPS_SIZE, SERIAL_GSI, SERIAL_PORTS,
};
use crate::lifecycle::Lifecycle;
use crate::load::{Image, LoadError};
use crate::memory::{self, MemoryError};
use crate::platform::{KeyboardController, Panics, Power, RoutedIoApic};
use crate::slots::{SlotError, Slots, connect_line};

/// Why a VM cannot be made.
#[derive(Debug, Error)]
pub enum BootError {
    /// The configuration.
    #[error("the VM's configuration is not valid")]
    Config(#[from] ConfigError),
    /// The host's KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initramfs, and what they are told.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Two devices at one address.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// A device's slot, or its interrupt line.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The socket device.
    #[error("cannot use the vsock listener: it must be a listening Unix stream socket")]
    Vsock(#[source] io::Error),
    /// A file system.
    #[error(transparent)]
    FileSystem(#[from] FileSystemError),
    /// The memory that can be plugged.
    #[error(transparent)]
    Plug(#[from] MemError),
}

/// Memory that the VM cannot have.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// Less than it has started with.
    #[error("the VM has started with {booted_mib} MiB of memory, which it keeps")]
    TooLittle {
        /// What it has started with.
        booted_mib: u32,
    },
    /// More than it can.
    #[error(transparent)]
    TooMuch(#[from] TooMuch),
    /// It has none to plug.
    #[error("the VM has a fixed size")]
    Fixed,
    /// More vCPUs than it was described with, or none.
    #[error("{count} vCPUs: the VM can have 1 to {max}")]
    Vcpus {
        /// As asked.
        count: u8,
        /// What it was described with.
        max: u8,
    },
    /// A vCPU that cannot be made.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// A VM that runs.
pub struct Machine {
    vcpus: VcpuThreads,
    devices: Arc<Surroundings>,
    slots: Slots,
    vm: Vm,
    model: VcpuModel,
    memory: GuestMemoryMmap,
    booted_mib: u32,
    /// Of the memory that can be plugged.
    plug: Option<MemSize>,
}

impl Machine {
    /// Makes the VM and starts it. `began` is when the process did.
    ///
    /// # Errors
    /// The first thing that does not work; nothing is left of the VM then.
    pub fn boot(
        config: &VmConfig,
        mut descriptors: Descriptors,
        lifecycle: &Arc<Lifecycle>,
        began: Instant,
    ) -> Result<(Self, Timings), BootError> {
        config.validate(descriptors.count())?;
        let mut take = |index| descriptors.take(index);

        // Loading needs guest memory only, so it goes on while KVM makes the machine around it.
        let memory = memory::map(config.memory)?;
        let kernel = take(config.boot.kernel).into();
        let initramfs = config.boot.initramfs.map(&mut take).map(File::from);
        let loading = Image::try_new(config, kernel, initramfs)?.begin_loading(memory.clone())?;

        let kvm = kvm::open(take(config.kvm))?;
        let create_vm = began.elapsed();
        let vm = Vm::create(&kvm, &memory)?;
        vm.split_irqchip()?;
        vm.disable_pmu()?;

        let mut ports = Bus::default();
        ports.attach(
            "keyboard controller",
            KEYBOARD_CONTROLLER_PORT..=KEYBOARD_CONTROLLER_PORT,
            KeyboardController(Arc::clone(lifecycle)),
        )?;
        ports.attach("power", ACPI_PM_PORTS, Power(Arc::clone(lifecycle)))?;
        ports.attach(
            "panic device",
            PVPANIC_PORT..=PVPANIC_PORT,
            Panics(Arc::clone(lifecycle)),
        )?;
        if let Some(console) = config.console {
            let interrupt = connect_line(&vm, "serial console", SERIAL_GSI)?;
            let serial = Serial::new(interrupt, take(console.output).into());
            ports.attach("serial console", SERIAL_PORTS, serial)?;
        }

        let mut mmio = Bus::default();
        mmio.attach(
            "I/O APIC",
            IOAPIC..=IOAPIC + IOAPIC_SIZE - 1,
            RoutedIoApic::new(Routes::new(vm.clone())),
        )?;
        let mut slots = Slots::new(vm.clone(), memory.clone(), Arc::clone(lifecycle));
        slots.add(&mut mmio, "entropy device", Box::new(Rng::new()))?;
        if let Some(vsock) = config.vsock {
            let name = "socket device";
            let lifecycle = Arc::clone(lifecycle);
            let device = Vsock::try_new(VsockConfig {
                guest_cid: vsock.guest_cid,
                listener: take(vsock.listener).into(),
                failed: report_failure(name.to_owned(), &lifecycle),
                ready: Arc::new(move || lifecycle.report_guest_ready()),
            })
            .map_err(BootError::Vsock)?;
            slots.add(&mut mmio, name, Box::new(device))?;
        }
        for share in &config.file_systems {
            let name = format!("file system {}", share.tag);
            let device = FileSystem::try_new(FileSystemConfig {
                tag: share.tag.clone(),
                socket: take(share.socket).into(),
                failed: report_failure(name.clone(), lifecycle),
            })?;
            slots.add(&mut mmio, &name, Box::new(device))?;
        }
        slots.add(&mut mmio, "balloon device", Box::new(Balloon::new()))?;
        let plug = add_plug(&mut slots, &mut mmio, config, &memory, lifecycle)?;
        slots.leave_rest_empty(&mut mmio)?;

        // All vCPUs with which it boots exist before the first runs: it may start the others at once.
        let model = VcpuModel::try_new(&kvm, config.vcpus.max)?;
        let vcpus = (0..config.vcpus.boot)
            .map(|id| Vcpu::create(&vm, &model, id))
            .collect::<Result<Vec<_>, _>>()?;
        let entry = loading.finish()?;
        vcpus[0].boot_from(entry)?;

        let devices = Arc::new(Surroundings {
            ports,
            mmio,
            lifecycle: Arc::clone(lifecycle),
        });
        let (vcpus, first_run) = VcpuThreads::start(vcpus, &devices)?;
        let timings = Timings {
            create_vm_us: create_vm.as_micros() as u64,
            first_run_us: first_run.duration_since(began).as_micros() as u64,
        };
        let machine = Self {
            vcpus,
            devices,
            slots,
            vm,
            model,
            memory,
            booted_mib: config.memory.size_mib,
            plug,
        };
        Ok((machine, timings))
    }

    /// Puts a network into a free virtio slot, and returns the slot's number.
    ///
    /// # Errors
    /// When no slot is free, or the host lacks descriptors.
    pub fn add_network(&mut self, name: &str, device: Net) -> Result<u32, SlotError> {
        self.slots.plug(&self.devices.mmio, name, Box::new(device))
    }

    /// Takes a network out of its slot. Its tap is closed when it returns.
    ///
    /// # Errors
    /// When the slot does not hold one.
    pub fn remove_network(&mut self, slot: u32) -> Result<(), SlotError> {
        self.slots.unplug(&self.devices.mmio, slot)
    }

    /// Asks the guest to have this much memory in all, and returns how much that is when
    /// it is rounded up.
    ///
    /// # Errors
    /// When it is less than the VM has started with, or more than it can have.
    pub fn resize_memory(&self, size_mib: u32) -> Result<u32, ResizeError> {
        let plug = self.plug.as_ref().ok_or(ResizeError::Fixed)?;
        let booted_mib = self.booted_mib;
        let more = size_mib.checked_sub(booted_mib);
        let more = more.ok_or(ResizeError::TooLittle { booted_mib })?;
        let requested = plug.request(u64::from(more) << 20)?;
        Ok(self.with_plugged(requested))
    }

    /// Makes vCPUs until there are so many, and returns how many there are: those that
    /// are there stay, also when one fails.
    ///
    /// # Errors
    /// When the guest was not told of so many, or the host lacks what they need.
    pub fn resize_vcpus(&mut self, count: u8) -> Result<u8, ResizeError> {
        let max = self.model.max();
        if count == 0 || count > max {
            return Err(ResizeError::Vcpus { count, max });
        }
        // No more than `max`.
        let made = self.vcpus.count() as u8;
        for id in made..count {
            let vcpu = Vcpu::create(&self.vm, &self.model, id)?;
            self.vcpus.add(vcpu, &self.devices)?;
        }
        Ok(count.max(made))
    }

    /// How much memory the guest has in all, in MiB, with so much of what can be plugged.
    pub fn with_plugged(&self, bytes: u64) -> u32 {
        self.booted_mib + u32::try_from(bytes >> 20).unwrap_or(u32::MAX - self.booted_mib)
    }

    /// Ends the VM: stops the vCPUs, calls `tell` with the reason and what the
    /// guest left behind, and only then closes the devices. The launcher would
    /// otherwise learn from its connections to the guest that they are gone,
    /// before it learns why.
    pub fn end(self, reason: ExitReason, tell: impl FnOnce(Exit)) {
        let Self {
            vcpus,
            devices,
            slots: _slots,
            vm: _vm,
            memory,
            ..
        } = self;
        end(vcpus, devices, || tell(describe_exit(reason, &memory)));
    }
}

/// The device of the memory that can be plugged, if there is any.
fn add_plug(
    slots: &mut Slots,
    mmio: &mut Bus,
    config: &VmConfig,
    memory: &GuestMemoryMmap,
    lifecycle: &Arc<Lifecycle>,
) -> Result<Option<MemSize>, BootError> {
    let span = memory::plug_span(config.memory);
    let mapped = |span: &memory::Span| memory.find_region(GuestAddress(span.start)).is_some();
    let Some(span) = span.filter(mapped) else {
        return Ok(None);
    };
    let lifecycle = Arc::clone(lifecycle);
    let device = Mem::try_new(MemConfig {
        start: span.start,
        bytes: span.size,
        changed: Arc::new(move |bytes| lifecycle.report_plugged(bytes)),
    })?;
    let size = device.size();
    slots.add(mmio, "memory device", Box::new(device))?;
    Ok(Some(size))
}

fn end(vcpus: VcpuThreads, devices: Arc<Surroundings>, tell: impl FnOnce()) {
    drop(vcpus);
    tell();
    drop(devices);
}

/// A reset after a panic is the panic, also when it came before the guest's
/// driver of the panic port.
fn describe_exit(reason: ExitReason, memory: &GuestMemoryMmap) -> Exit {
    let guest_log = match reason {
        ExitReason::PowerOff | ExitReason::Stopped => Vec::new(),
        _ => ramoops::last_lines(memory, GuestAddress(RAMOOPS), RAMOOPS_SIZE as usize),
    };
    let panicked = guest_log.first().is_some_and(|line| is_panic(line));
    let reason = match reason {
        ExitReason::Reset if panicked => ExitReason::GuestPanic,
        reason => reason,
    };
    Exit { reason, guest_log }
}

/// The VM cannot go on without a device that it was given.
fn report_failure<E: Error>(
    device: String,
    lifecycle: &Arc<Lifecycle>,
) -> Arc<dyn Fn(E) + Send + Sync> {
    let lifecycle = Arc::clone(lifecycle);
    Arc::new(move |error| lifecycle.report_device_failure(&device, &error))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Sender};

    use vm_memory::Bytes;

    use super::*;
    use crate::bus::Registers;

    /// A device that tells when it is closed.
    struct Closing(Sender<String>);

    impl Registers for Closing {
        fn read(&mut self, _offset: u64, _data: &mut [u8]) {}
        fn write(&mut self, _offset: u64, _data: &[u8]) {}
    }

    impl Drop for Closing {
        fn drop(&mut self) {
            let _ = self.0.send("closed".to_owned());
        }
    }

    fn memory_with_log(log: &str) -> GuestMemoryMmap {
        let size = (RAMOOPS + RAMOOPS_SIZE) as usize;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).expect("memory");
        // Its signature, where the next byte goes, bytes in use.
        let length = log.len() as u32;
        let header = [0x4347_4244, length, length].map(u32::to_le_bytes);
        let zone = [header.as_flattened(), log.as_bytes()].concat();
        memory
            .write_slice(&zone, GuestAddress(RAMOOPS))
            .expect("in memory");
        memory
    }

    #[test]
    fn end_tells_the_reason_before_it_closes_the_devices() {
        let (tell, told) = mpsc::channel();
        let mut ports = Bus::default();
        ports
            .attach("device", 1..=1, Closing(tell.clone()))
            .expect("free");
        let devices = Arc::new(Surroundings {
            ports,
            mmio: Bus::default(),
            lifecycle: Arc::new(Lifecycle::try_new().expect("event")),
        });
        let (vcpus, _) = VcpuThreads::start(Vec::new(), &devices).expect("none to start");
        end(vcpus, devices, || drop(tell.send("told".to_owned())));
        drop(tell);
        let told: Vec<_> = told.iter().collect();
        assert_eq!(told, ["told", "closed"]);
    }

    #[test]
    fn describe_exit_of_a_reset_after_a_panic_in_the_log_is_the_panic() {
        let log = "booting\n[ 0.3] Kernel panic - not syncing: VFS\n";
        let reason = |reason, log| describe_exit(reason, &memory_with_log(log)).reason;
        assert_eq!(reason(ExitReason::Reset, log), ExitReason::GuestPanic);
        assert_eq!(reason(ExitReason::Reset, "booting\n"), ExitReason::Reset);
        // Others are what they are.
        let fault = ExitReason::TripleFault;
        assert_eq!(reason(fault.clone(), log), fault);
    }

    #[test]
    fn describe_exit_otherwise_gives_the_last_lines() {
        let exit = describe_exit(ExitReason::TripleFault, &memory_with_log("last words\n"));
        assert_eq!(exit.guest_log, ["last words"]);
    }

    #[test]
    fn describe_exit_in_an_orderly_way_gives_no_log() {
        let exit = describe_exit(ExitReason::PowerOff, &memory_with_log("bye\n"));
        assert!(exit.guest_log.is_empty());
    }
}
