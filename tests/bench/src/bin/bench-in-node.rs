//! What of the benchmarks runs inside the node: it measures and prints JSON.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use bulkhead_bench::{Comparison, bare_kvm, monitor, running::Running, timed};
use clap::Parser;

/// Measures inside the node and prints the samples as JSON.
#[derive(Parser)]
struct Arguments {
    /// Runs of each way.
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Installation of Bulkhead.
    #[arg(long)]
    prefix: PathBuf,
    /// initramfs whose init resets the machine at once.
    #[arg(long)]
    initramfs: PathBuf,
    /// Image for the container benchmark.
    #[arg(long, default_value = "docker.io/library/busybox:latest")]
    image: String,
    /// What times are multiplied by in this node.
    #[arg(long, default_value_t = 1)]
    time_factor: u32,
}

const RUNC: &str = "io.containerd.runc.v2";
const BULKHEAD: &str = "io.containerd.bulkhead.v2";

/// A run that takes longer on hardware hangs.
const LIMIT: Duration = Duration::from_secs(5);

impl Arguments {
    fn limit(&self) -> Duration {
        LIMIT * self.time_factor
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let comparisons = [
        first_instruction(&arguments)?,
        exec_to_init(&arguments)?,
        run_true(&arguments)?,
        exec_true(&arguments)?,
    ];
    println!("{}", serde_json::to_string(&comparisons)?);
    Ok(())
}

/// One container from request to end.
fn run_true(arguments: &Arguments) -> Result<Comparison> {
    let run = |runtime: &'static str| {
        move |number: usize| {
            let id = format!("bench-{}-{number}", runtime.replace('.', "-"));
            let mut command = Command::new("ctr");
            command.args(["run", "--rm", "--runtime", runtime]);
            command.args([arguments.image.as_str(), id.as_str(), "true"]);
            timed::run(command, arguments.limit())
        }
    };
    Comparison::new("ctr run --rm IMAGE true", "runc", "bulkhead").measure(
        arguments.runs,
        run(RUNC),
        |number| run(BULKHEAD)(number)?.context("the container did not end in time"),
    )
}

/// One more process in a container that runs, from request to end.
fn exec_true(arguments: &Arguments) -> Result<Comparison> {
    let runc = Running::start(RUNC, &arguments.image, "bench-exec-runc")?;
    let ours = Running::start(BULKHEAD, &arguments.image, "bench-exec-bulkhead")?;
    let limit = arguments.limit();
    Comparison::new("ctr task exec CONTAINER true", "runc", "bulkhead").measure(
        arguments.runs,
        |number| timed::run(runc.exec(number, &["true"]), limit),
        |number| {
            timed::run(ours.exec(number, &["true"]), limit)?
                .context("the process did not end in time")
        },
    )
}

/// Monitor executed until it has ended, with an init that resets at once.
fn exec_to_init(arguments: &Arguments) -> Result<Comparison> {
    let kernel = arguments.prefix.join("share/bulkhead/vmlinux");
    let vmm = arguments.prefix.join("libexec/bulkhead/bulkhead-vmm");
    let name = "monitor executed to guest init and gone (init resets at once)";
    Comparison::new(name, "QEMU microvm", "bulkhead-vmm").measure(
        arguments.runs,
        |_| timed::run(qemu(&kernel, &arguments.initramfs), arguments.limit()),
        |_| {
            let started = Instant::now();
            monitor::boot(&vmm, &kernel, &arguments.initramfs, arguments.limit())?;
            Ok(started.elapsed())
        },
    )
}

/// From `KVM_CREATE_VM` until the first `KVM_RUN`.
fn first_instruction(arguments: &Arguments) -> Result<Comparison> {
    let kernel = arguments.prefix.join("share/bulkhead/vmlinux");
    let vmm = arguments.prefix.join("libexec/bulkhead/bulkhead-vmm");
    let name = "KVM_CREATE_VM to first guest instruction";
    Comparison::new(name, "bare ioctls", "bulkhead-vmm").measure(
        arguments.runs,
        |_| bare_kvm::create_to_first_run().map(Some),
        |_| {
            let timings = monitor::boot(&vmm, &kernel, &arguments.initramfs, arguments.limit())?;
            Ok(Duration::from_micros(
                timings.first_run_us - timings.create_vm_us,
            ))
        },
    )
}

fn qemu(kernel: &Path, initramfs: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "microvm,acpi=on,x-option-roms=off,pit=off,pic=off,rtc=off",
        ])
        // Its usual firmware waits for the PIT, which is not there.
        .args(["-bios", "qboot.rom"])
        .args(["-enable-kvm", "-cpu", "host", "-smp", "1", "-m", "512"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args([
            "-append",
            "quiet panic=-1 8250.nr_uarts=0 cryptomgr.notests",
        ]);
    command
}
