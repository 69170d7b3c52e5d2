//! Starting a process in a jail, from a program with many threads.
//!
//! Everything is prepared first; then `clone3` makes the process directly in
//! its namespaces and in the pod's cgroup, and the child walks through
//! `child` to its program with system calls only. A failure on the way comes
//! back as the [`Step`] at which it happened.
//!
//! Nothing here asks for a signal at the parent's death: `PR_SET_PDEATHSIG`
//! fires when the thread that made the process ends, which says nothing of the
//! shim. The monitor ends when its control socket closes, the file server when
//! the monitor does, and whatever is left with the pod's cgroup. Nor is
//! `PR_SET_DUMPABLE` set here, since execve undoes it: a program that wants it
//! asks for it itself.

mod capability;
mod child;
mod clone;
mod root;
mod step;
#[cfg(test)]
mod tests;

use std::ffi::{CString, NulError, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::io::{Errno, fcntl_dupfd_cloexec};
use thiserror::Error;

pub use capability::{Capabilities, Capability};
pub(super) use clone::clone_child;
pub(super) use root::most_open_files;
pub use step::Step;

use super::children;
use child::{FAILURE_BYTES, Plan, RootPlan};

/// Why a jailed process could not be started.
#[derive(Debug, Error)]
pub enum Error {
    /// An argument or path has a NUL in it.
    #[error("argument or path for {name} contains a NUL byte")]
    Nul {
        /// Which process.
        name: String,
        /// Where.
        #[source]
        source: NulError,
    },
    /// Something could not be prepared before the process was made.
    #[error("prepare {name}: {operation}")]
    Prepare {
        /// Which process.
        name: String,
        /// As in "make its root".
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the process.
    #[error(
        "start {name} in namespaces and cgroup of its own (needs root and Linux 5.14 or newer)"
    )]
    Clone {
        /// Which process.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The process failed before its program ran.
    #[error("start {name}: {step}")]
    Child {
        /// Which process.
        name: String,
        /// What it was doing.
        step: Step,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What the process sees as `/`.
#[derive(Debug)]
pub enum Root<'a> {
    /// An empty, read-only directory.
    Empty,
    /// A read-only directory with the file server's needs: `share`, a slave of
    /// this shared mount (its own directories read-only, what is mounted below
    /// with its own flags), and the part of `/proc` that virtiofsd opens
    /// before it goes into `share`.
    Server {
        /// The shared mount.
        share: &'a Path,
    },
    /// This mounted directory of the host.
    Directory(&'a Path),
}

/// The network that the process sees.
#[derive(Clone, Copy, Debug)]
pub enum Network<'a> {
    /// A namespace of its own, with nothing in it but a loopback that is down.
    None,
    /// This namespace.
    Namespace(BorrowedFd<'a>),
}

/// Whether the process has a PID namespace of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pids {
    /// It is pid 1 and sees only itself.
    Own,
    /// It is numbered and seen as on the host, though its root has no `/proc`
    /// of ours to see others with.
    Host,
}

/// A process to be jailed.
#[derive(Debug)]
pub struct Jail<'a> {
    /// For error messages, as in "virtiofsd".
    pub name: &'a str,
    /// The executable, open; static, since its root holds no loader.
    pub program: BorrowedFd<'a>,
    /// `argv`, from `argv[0]`. The environment is empty.
    pub arguments: &'a [&'a OsStr],
    /// Descriptors and the numbers at which the program finds them; it has no
    /// others.
    pub descriptors: &'a [(BorrowedFd<'a>, RawFd)],
    /// Its file system.
    pub root: Root<'a>,
    /// Its network.
    pub network: Network<'a>,
    /// Its PID namespace.
    pub pids: Pids,
    /// Its uid and gid; no supplementary groups.
    pub uid: u32,
    /// The group of the same number space.
    pub gid: u32,
    /// All that it may ever have: permitted, effective and bounding set.
    /// Lost when `uid` is not 0.
    pub capabilities: Capabilities,
    /// `RLIMIT_NOFILE`, soft and hard.
    pub open_files: u64,
    /// The cgroup (v2) into which it is born.
    pub cgroup: BorrowedFd<'a>,
}

/// A process that has reached its program.
#[derive(Debug)]
pub struct Jailed {
    /// Its pid in the host's PID namespace.
    pub pid: u32,
    /// Refers to it and to no later process of the same number.
    pub pidfd: OwnedFd,
}

/// Starts a process in its jail and returns once its program executes. When
/// anything fails, no process is left.
///
/// The child is entered in [`children`]: who holds the [`Jailed`] reaps it,
/// with [`children::reap`] or [`children::kill_and_reap`].
pub fn launch(jail: &Jail<'_>) -> Result<Jailed, Error> {
    let name = || jail.name.to_owned();
    let prepare = |operation| {
        move |source: Errno| Error::Prepare {
            name: jail.name.to_owned(),
            operation,
            source: source.into(),
        }
    };
    let text = |bytes: &OsStr| {
        CString::new(bytes.as_bytes()).map_err(|source| Error::Nul {
            name: jail.name.to_owned(),
            source,
        })
    };

    let arguments: Vec<CString> = jail
        .arguments
        .iter()
        .map(|argument| text(argument))
        .collect::<Result<_, _>>()?;
    let mut argument_pointers: Vec<_> = arguments.iter().map(|a| a.as_ptr()).collect();
    argument_pointers.push(std::ptr::null());

    let (root, path) = match jail.root {
        Root::Empty => (Some(root::empty()), None),
        Root::Server { share } => (Some(root::server()), Some(share)),
        Root::Directory(directory) => (None, Some(directory)),
    };
    let root = root.transpose().map_err(prepare("make its root"))?;
    let path = text(path.unwrap_or(Path::new("/")).as_os_str())?;
    let root = match (&jail.root, &root) {
        (Root::Empty, Some(root)) => RootPlan::Detached(root.as_raw_fd()),
        (Root::Server { .. }, Some(root)) => RootPlan::Server {
            root: root.as_raw_fd(),
            share: &path,
        },
        _ => RootPlan::Directory(&path),
    };

    // Above every target, so that placing one never closes another.
    let lowest = jail.descriptors.iter().map(|(_, target)| target + 1).max();
    let raised: Vec<(OwnedFd, RawFd)> = jail
        .descriptors
        .iter()
        .map(|(source, target)| Ok((fcntl_dupfd_cloexec(source, lowest.unwrap_or(0))?, *target)))
        .collect::<Result<_, Errno>>()
        .map_err(prepare("copy its descriptors"))?;
    let descriptors: Vec<_> = raised
        .iter()
        .map(|(fd, target)| (fd.as_raw_fd(), *target))
        .collect();
    let raise = |fd: BorrowedFd<'_>| {
        fcntl_dupfd_cloexec(fd, lowest.unwrap_or(0)).map_err(prepare("copy its descriptors"))
    };
    let program = raise(jail.program)?;
    let (told, tell) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(prepare("make its error pipe"))?;
    let tell_raised = raise(tell.as_fd())?;
    drop(tell);

    let plan = Plan {
        error_pipe: tell_raised.as_raw_fd(),
        network: match jail.network {
            Network::None => None,
            Network::Namespace(fd) => Some(fd.as_raw_fd()),
        },
        root,
        descriptors: &descriptors,
        open_files: jail.open_files,
        uid: jail.uid,
        gid: jail.gid,
        capabilities: jail.capabilities.bits(),
        program: program.as_raw_fd(),
        arguments: argument_pointers.as_ptr(),
    };
    let own = clone::Namespaces {
        network: matches!(jail.network, Network::None),
        pids: jail.pids == Pids::Own,
    };
    let jailed =
        children::spawn(|| clone::clone_into(&plan, own, jail.cgroup)).map_err(|source| {
            Error::Clone {
                name: name(),
                source,
            }
        })?;
    drop(tell_raised);
    await_program(jail.name, told, jailed)
}

/// Waits until the error pipe closes without a word, which execve does. (So
/// does a kill; who holds the pidfd learns of that at once.)
fn await_program(name: &str, told: OwnedFd, jailed: Jailed) -> Result<Jailed, Error> {
    let mut message = [0_u8; FAILURE_BYTES];
    match File::from(told).read_exact(&mut message) {
        Err(source) if source.kind() == io::ErrorKind::UnexpectedEof => return Ok(jailed),
        _ => drop(children::kill_and_reap(jailed.pid, jailed.pidfd.as_fd())),
    }
    let errno = i32::from_ne_bytes([message[1], message[2], message[3], message[4]]);
    Err(Error::Child {
        name: name.to_owned(),
        step: Step::from_number(message[0]).unwrap_or(Step::Execute),
        source: io::Error::from_raw_os_error(errno),
    })
}
