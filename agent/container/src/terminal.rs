//! `process.terminal`: a pseudo terminal in the container's own devpts.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::statfs::{FsType, fstatfs};
use nix::unistd::Uid;
use oci_spec::runtime::Process;

use crate::kernel_calls::{
    attach_mount, clone_mount, open_terminal_peer, set_controlling_terminal, set_terminal_size,
    unlock_terminal,
};
use crate::rootfs::Tree;

/// `DEVPTS_SUPER_MAGIC` of linux/magic.h.
const DEVPTS: FsType = FsType(0x1cd1);

/// What failed with the terminal.
#[derive(Debug, thiserror::Error)]
pub enum TerminalError {
    #[error("cannot open /dev/pts/ptmx of the container (a terminal needs a devpts mount)")]
    Open(#[source] Errno),
    #[error("/dev/pts of the container is not a devpts")]
    NotDevpts,
    #[error("cannot {step} the container's terminal")]
    Setup {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Both ends of a pseudo terminal.
#[derive(Debug)]
pub struct Terminal {
    pub master: OwnedFd,
    slave: OwnedFd,
}

fn failed(step: &'static str) -> impl Fn(io::Error) -> TerminalError {
    move |source| TerminalError::Setup { step, source }
}

impl Terminal {
    /// Allocates a terminal of the size and for the user that `process` names.
    pub fn open(tree: &Tree, process: &Process) -> Result<Self, TerminalError> {
        let master = tree
            .open_device(Path::new("/dev/pts/ptmx"))
            .map_err(TerminalError::Open)?;
        // Otherwise it is whatever device the image's author put there.
        if fstatfs(&master).is_ok_and(|fs| fs.filesystem_type() != DEVPTS) {
            return Err(TerminalError::NotDevpts);
        }
        unlock_terminal(master.as_fd()).map_err(failed("unlock"))?;
        let slave = open_terminal_peer(master.as_fd()).map_err(failed("open"))?;
        if let Some(size) = process.console_size() {
            let cells = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
            set_terminal_size(slave.as_fd(), cells(size.height()), cells(size.width()))
                .map_err(failed("size"))?;
        }
        nix::unistd::fchown(&slave, Some(Uid::from_raw(process.user().uid())), None)
            .map_err(|errno| failed("chown")(errno.into()))?;
        Ok(Self { master, slave })
    }

    /// Mounts it at `/dev/console`, as the terminal of an init.
    pub fn put_at_console(&self, tree: &Tree) -> Result<(), TerminalError> {
        let console = tree
            .make_file(Path::new("/dev/console"))
            .map_err(|errno| failed("make /dev/console for")(errno.into()))?;
        clone_mount(self.slave.as_fd(), false)
            .and_then(|mount| attach_mount(mount.as_fd(), console.as_fd()))
            .map_err(failed("mount at /dev/console"))
    }

    /// Makes it the controlling terminal of the caller's new session; returns
    /// what becomes descriptors 0, 1 and 2.
    pub fn control(self) -> Result<OwnedFd, TerminalError> {
        set_controlling_terminal(self.slave.as_fd()).map_err(failed("control"))?;
        Ok(self.slave)
    }
}
