//! Boots a kernel and an initramfs in a VM, without a jail, and prints what
//! becomes of it: what a launcher has to do, in one file.
//!
//! ```text
//! cargo run --example boot -- --monitor target/debug/bulkhead-vmm \
//!     --kernel vmlinux --initramfs initramfs.cpio --console
//! ```
//!
//! Each event is printed with the milliseconds since the monitor was started.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair,
};
use nix::sys::wait::{WaitStatus, waitpid};
use vmm_config::control::{CONTROL_FD, Event, MAX_MESSAGE_BYTES, Request, decode, encode};
use vmm_config::{Boot, Console, FdIndex, FileSystem, Memory, Vcpus, VmConfig, Vsock};

/// Boots a kernel and an initramfs in a VM.
#[derive(Parser)]
struct Options {
    /// The monitor's executable.
    #[arg(long)]
    monitor: PathBuf,
    /// Uncompressed ELF kernel with a PVH entry note.
    #[arg(long)]
    kernel: PathBuf,
    /// Initial RAM file system.
    #[arg(long)]
    initramfs: Option<PathBuf>,
    /// Words for the kernel's command line.
    #[arg(long, default_value = "")]
    append: String,
    /// vCPUs that run.
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// Memory in MiB.
    #[arg(long, default_value_t = 512)]
    memory: u32,
    /// Serial console on standard output.
    #[arg(long)]
    console: bool,
    /// Socket to make, on which the guest's vsock ports are reached.
    #[arg(long)]
    vsock: Option<PathBuf>,
    /// File system: a tag and the socket of its vhost-user server.
    #[arg(long, value_name = "TAG=SOCKET")]
    share: Vec<String>,
    /// Stop the VM when standard input ends.
    #[arg(long)]
    stop_at_end_of_input: bool,
}

/// The descriptors that go with the configuration.
#[derive(Default)]
struct Descriptors(Vec<OwnedFd>);

impl Descriptors {
    fn add(&mut self, descriptor: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(descriptor.into());
        FdIndex(self.0.len() as u32 - 1)
    }

    fn open(&mut self, path: &Path) -> Result<FdIndex> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(self.add(file))
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let mut descriptors = Descriptors::default();
    let config = configure(&options, &mut descriptors)?;

    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let began = Instant::now();
    let monitor = spawn(&options.monitor, &theirs)?;
    drop(theirs);
    send(&ours, &Request::Boot(Box::new(config)), &descriptors)?;
    drop(descriptors);
    if options.stop_at_end_of_input {
        let control = ours.try_clone()?;
        std::thread::spawn(move || {
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            let _ = send(&control, &Request::Stop, &Descriptors::default());
        });
    }

    let mut packet = vec![0; MAX_MESSAGE_BYTES];
    loop {
        let bytes = recv(ours.as_raw_fd(), &mut packet, MsgFlags::empty())?;
        let at = began.elapsed().as_secs_f64() * 1e3;
        if bytes == 0 {
            println!("{at:9.2} ms  the monitor closed the socket");
            break;
        }
        let event: Event = decode(&packet[..bytes])?;
        println!("{at:9.2} ms  {event:?}");
    }
    match waitpid(monitor, None)? {
        WaitStatus::Exited(_, 0) => {}
        status => bail!("the monitor ended with {status:?}"),
    }
    println!(
        "{:9.2} ms  the monitor is gone",
        began.elapsed().as_secs_f64() * 1e3
    );
    Ok(())
}

fn configure(options: &Options, descriptors: &mut Descriptors) -> Result<VmConfig> {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("cannot open /dev/kvm")?;
    Ok(VmConfig {
        kvm: descriptors.add(kvm),
        vcpus: Vcpus {
            boot: options.vcpus,
            max: options.vcpus,
        },
        memory: Memory {
            size_mib: options.memory,
            max_mib: options.memory,
        },
        boot: Boot {
            kernel: descriptors.open(&options.kernel)?,
            initramfs: match &options.initramfs {
                Some(path) => Some(descriptors.open(path)?),
                None => None,
            },
            command_line: options.append.clone(),
        },
        console: if options.console {
            let output = io::stdout().as_fd().try_clone_to_owned()?;
            Some(Console {
                output: descriptors.add(output),
            })
        } else {
            None
        },
        vsock: match &options.vsock {
            Some(path) => Some(Vsock {
                guest_cid: 3,
                listener: descriptors.add(UnixListener::bind(path)?),
            }),
            None => None,
        },
        file_systems: options
            .share
            .iter()
            .map(|share| connect_share(share, descriptors))
            .collect::<Result<_>>()?,
    })
}

fn connect_share(share: &str, descriptors: &mut Descriptors) -> Result<FileSystem> {
    let (tag, path) = share
        .split_once('=')
        .with_context(|| format!("--share {share}: need TAG=SOCKET"))?;
    let socket = UnixStream::connect(path)
        .with_context(|| format!("cannot connect to the file server at {path}"))?;
    Ok(FileSystem {
        tag: tag.to_owned(),
        socket: descriptors.add(socket),
    })
}

/// Starts the monitor with its end of the socket where it looks for it, and
/// without an environment.
fn spawn(monitor: &Path, socket: &OwnedFd) -> Result<nix::unistd::Pid> {
    let path = CString::new(monitor.as_os_str().as_bytes())?;
    let mut actions = PosixSpawnFileActions::init()?;
    actions.add_dup2(socket.as_raw_fd(), CONTROL_FD)?;
    let name = c"bulkhead-vmm".to_owned();
    posix_spawn(
        path.as_c_str(),
        &actions,
        &PosixSpawnAttr::init()?,
        &[name],
        &[] as &[CString],
    )
    .with_context(|| format!("cannot start {}", monitor.display()))
}

fn send(socket: &OwnedFd, request: &Request, descriptors: &Descriptors) -> Result<()> {
    let numbers: Vec<RawFd> = descriptors.0.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&encode(request))],
        if numbers.is_empty() { &[] } else { &rights },
        MsgFlags::empty(),
        None,
    )?;
    Ok(())
}
