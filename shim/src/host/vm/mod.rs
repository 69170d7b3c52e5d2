//! The pod's two jailed processes: the file server and the monitor.

mod control;
mod file_server;
mod monitor;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};
use thiserror::Error;
use vmm_config::control::DecodeError;
use vmm_config::{Boot, Console, FdIndex, FileSystem, Memory, Vcpus, VmConfig, Vsock};

use super::install::Opened;
use super::{children, install, jail};

pub use control::Received;
pub use file_server::FileServer;
pub use monitor::Monitor;

/// The tag under which the guest finds the share.
pub const SHARE_TAG: &str = "share";
/// Every guest's context identifier: the host side of its sockets is in user
/// space, so none meets another's.
pub const GUEST_CID: u32 = 3;
/// How long a killed process may take to go. It is bound to, unless the host
/// itself hangs.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Why the VM's processes cannot be started or asked.
#[derive(Debug, Error)]
pub enum Error {
    /// Something of the installation, or KVM, is missing.
    #[error(transparent)]
    Install(#[from] install::Error),
    /// A process cannot be started.
    #[error(transparent)]
    Jail(#[from] jail::Error),
    /// A socket or pipe to a process cannot be made.
    #[error("{operation} for {process}")]
    Prepare {
        /// As in "make a log pipe".
        operation: &'static str,
        /// As in "virtiofsd".
        process: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The control socket failed.
    #[error("{operation} the monitor's control socket")]
    Control {
        /// As in "write to".
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What came is no message.
    #[error("the monitor sent something that is no message")]
    Decode(#[from] DecodeError),
    /// A killed process does not go.
    #[error(
        "{process} (pid {pid}) is still there {waited:?} after being killed: look for state D in ps"
    )]
    Unkillable {
        /// As in "virtiofsd".
        process: &'static str,
        /// Its pid.
        pid: u32,
        /// How long it had.
        waited: Duration,
    },
}

fn prepare<E: Into<io::Error>>(
    operation: &'static str,
    process: &'static str,
) -> impl FnOnce(E) -> Error {
    move |source| Error::Prepare {
        operation,
        process,
        source: source.into(),
    }
}

/// A descriptor of the file server's cannot be kept.
pub(super) fn duplicate_failed(source: io::Error) -> Error {
    prepare("duplicate the pidfd", "virtiofsd")(source)
}

/// The tag of the share of this number, from 0, that a network or user-space file
/// system has for itself.
pub fn remote_share_tag(number: usize) -> String {
    format!("remote-{number}")
}

/// What the VM is to be.
#[derive(Debug)]
pub struct VmRequest {
    /// Virtual processors.
    pub vcpus: Vcpus,
    /// Guest memory.
    pub memory: Memory,
    /// Appended to the command line that the monitor itself needs.
    pub command_line: String,
    /// The listening Unix stream socket for the guest's sockets.
    pub vsock_listener: OwnedFd,
    /// Where the guest's serial console goes; `None`: no UART.
    pub console: Option<OwnedFd>,
}

/// The processes of a running VM. Dropped, all are killed and collected.
#[derive(Debug)]
pub struct Vm {
    /// The monitor. First, so that it goes first: the other way round it would
    /// report a file server that died.
    pub monitor: Monitor,
    /// The file server.
    pub file_server: FileServer,
    /// Those of the remote shares.
    pub remote_servers: Vec<FileServer>,
}

/// Where the VM's processes live.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    /// The pod's directory.
    pub(super) directory: &'a Path,
    /// The pod's share.
    pub(super) share: &'a Path,
    /// The remote shares.
    pub(super) remote_shares: &'a [PathBuf],
    /// The cgroup of all.
    pub(super) cgroup: BorrowedFd<'a>,
    /// The monitor's uid and gid.
    pub(super) uid: u32,
}

impl Vm {
    /// Starts the processes and sends `Boot`. On an error none is left.
    pub(super) fn start(
        place: Place<'_>,
        installed: Opened,
        kvm: OwnedFd,
        request: VmRequest,
    ) -> Result<Self, Error> {
        let (file_server, socket) = FileServer::start(place, installed.virtiofsd.as_fd())?;
        let mut remote_servers = Vec::new();
        let mut remote_sockets = Vec::new();
        for share in place.remote_shares {
            let place = Place { share, ..place };
            let (server, socket) = FileServer::start(place, installed.virtiofsd.as_fd())?;
            remote_servers.push(server);
            remote_sockets.push(socket);
        }
        let monitor = Monitor::start(place, installed.vmm.as_fd())?;
        let mut descriptors = vec![
            kvm,
            installed.kernel,
            installed.initramfs,
            request.vsock_listener,
            socket,
        ];
        let console = request.console.map(|output| {
            descriptors.push(output);
            Console { output: FdIndex(5) }
        });
        let mut file_systems = vec![FileSystem {
            tag: SHARE_TAG.to_owned(),
            socket: FdIndex(4),
        }];
        for (number, socket) in remote_sockets.into_iter().enumerate() {
            file_systems.push(FileSystem {
                tag: remote_share_tag(number),
                socket: FdIndex(descriptors.len() as u32),
            });
            descriptors.push(socket);
        }
        let config = VmConfig {
            kvm: FdIndex(0),
            vcpus: request.vcpus,
            memory: request.memory,
            boot: Boot {
                kernel: FdIndex(1),
                initramfs: Some(FdIndex(2)),
                command_line: request.command_line,
            },
            console,
            vsock: Some(Vsock {
                guest_cid: GUEST_CID,
                listener: FdIndex(3),
            }),
            file_systems,
        };
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        monitor.boot(config, &descriptors)?;
        Ok(Self {
            monitor,
            file_server,
            remote_servers,
        })
    }
}

/// Kills a process and collects it.
fn kill(process: &'static str, pid: u32, pidfd: BorrowedFd<'_>) -> Result<(), Error> {
    // ESRCH: it has ended already, and is collected all the same.
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
    let timeout = Timespec::try_from(KILL_DEADLINE).unwrap_or_default();
    if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) == Ok(0) {
        return Err(Error::Unkillable {
            process,
            pid,
            waited: KILL_DEADLINE,
        });
    }
    children::reap(pid, pidfd);
    Ok(())
}

/// A pipe for a process's log: our end non-blocking, so that it can be awaited.
fn log_pipe(process: &'static str) -> Result<(OwnedFd, OwnedFd), Error> {
    let failed = "make a log pipe";
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(prepare(failed, process))?;
    rustix::io::ioctl_fionbio(&read, true).map_err(prepare(failed, process))?;
    Ok((read, write))
}

fn dev_null(process: &'static str) -> Result<OwnedFd, Error> {
    use rustix::fs::{Mode, OFlags, open};
    open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(prepare("open /dev/null", process))
}
