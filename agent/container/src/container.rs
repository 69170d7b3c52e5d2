//! A created container, as its creator holds it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::cgroup::{Cgroup, CgroupError};
use crate::control::{Channel, Command, Report};
use crate::kernel_calls::pidfd_send_signal;

/// A container whose init exists.
///
/// Dropping it neither ends nor removes the container, unless it was never
/// started: its init ends with the creator's interest. [`Container::delete`]
/// removes it.
#[derive(Debug)]
pub struct Container {
    pid: i32,
    pidfd: OwnedFd,
    console: Option<OwnedFd>,
    warnings: Vec<String>,
    /// Until it is started.
    channel: Option<Channel>,
    cgroup: Cgroup,
}

/// Why a container's program was not started. The init is gone, or about to be:
/// its exit is the reaper's to see, and the container can be deleted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// It was started before.
    #[error("the container was already started")]
    AlreadyStarted,
    /// The init does not take orders any more.
    #[error("the container's init has ended before it was started")]
    Ended(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The program could not be executed, in the words that clients of OCI runtimes know.
    #[error("{0}")]
    Init(String),
}

/// Why a signal was not sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignalError {
    /// The process has ended.
    #[error("process {pid} has already ended")]
    Ended {
        /// The init's pid.
        pid: i32,
    },
    /// The kernel refused, as it refuses a number that is no signal.
    #[error("cannot send signal {signal} to process {pid}")]
    Send {
        /// As asked for.
        signal: i32,
        /// The init's pid.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The container's processes cannot be found.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl Container {
    pub(crate) fn new(
        pid: i32,
        pidfd: OwnedFd,
        console: Option<OwnedFd>,
        warnings: Vec<String>,
        channel: Channel,
        cgroup: Cgroup,
    ) -> Self {
        Self {
            pid,
            pidfd,
            console,
            warnings,
            channel: Some(channel),
            cgroup,
        }
    }

    /// The init's pid in the PID namespace of the container's creator.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The master of the container's terminal, once.
    pub fn take_console(&mut self) -> Option<OwnedFd> {
        self.console.take()
    }

    /// What was accepted in the specification without having its effect, for
    /// the log, once.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Lets the init execute the user's program; returns once it has, or has
    /// failed to. Blocks for as long as the program's file takes to be read.
    pub fn start(&mut self) -> Result<(), StartError> {
        let channel = self.channel.take().ok_or(StartError::AlreadyStarted)?;
        channel
            .send(&Command::Start, &[])
            .map_err(|error| StartError::Ended(Box::new(error)))?;
        match channel.receive::<Report>() {
            // Closed by the execution. If the init was killed instead, its exit tells.
            Ok(None) => Ok(()),
            Ok(Some((Report::Failed { message }, _))) => Err(StartError::Init(message)),
            Ok(Some((report, _))) => Err(StartError::Init(format!("unexpected {report:?}"))),
            Err(error) => Err(StartError::Ended(Box::new(error))),
        }
    }

    /// Sends a signal to the init, and to no process that got its pid later.
    pub fn signal(&self, signal: i32) -> Result<(), SignalError> {
        let pid = self.pid;
        pidfd_send_signal(self.pidfd.as_fd(), signal).map_err(|source| {
            if source.raw_os_error() == Some(libc::ESRCH) {
                SignalError::Ended { pid }
            } else {
                SignalError::Send {
                    signal,
                    pid,
                    source,
                }
            }
        })
    }

    /// Sends a signal to every process of the container. `SIGKILL` misses none;
    /// others may miss one that is being forked meanwhile.
    pub fn signal_all(&self, signal: i32) -> Result<(), SignalError> {
        Ok(self.cgroup.signal(signal)?)
    }

    /// Every process of the container, in the PID namespace of its creator.
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        self.cgroup.pids()
    }

    /// Kills what is left, waits until the last process is gone (which also
    /// unmounts everything, since the mounts are in the container's own
    /// namespace) and removes the cgroup. Blocks, at the longest 10 seconds.
    /// Idempotent; after an error it goes on where it stopped.
    pub fn delete(&mut self) -> Result<(), CgroupError> {
        self.channel = None;
        self.console = None;
        self.cgroup.remove()
    }
}
