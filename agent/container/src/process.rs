//! A process of a container, as the container's creator holds it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::control::{Channel, Command, Report};
use crate::kernel_calls::{pidfd_send_signal, set_terminal_size};

/// A process that exists. Every method may be called from several threads at
/// once, and none waits for another: a start can hang for as long as a file
/// server does, and the process must then still be killed.
///
/// Dropping it does not end the process, unless it was never started: it ends
/// with the creator's interest.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
    /// Until it is started.
    start: Mutex<Option<Channel>>,
    /// Until it is taken.
    console: Mutex<Option<OwnedFd>>,
    /// The same master again, to be resized whoever has taken the other.
    terminal: Mutex<Option<OwnedFd>>,
}

/// Why a process's program was not started. The process is gone, or about to be:
/// its exit is the reaper's to see, and the container can be deleted.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It was started before.
    #[error("process {pid} was already started")]
    AlreadyStarted {
        /// The process's pid.
        pid: i32,
    },
    /// It does not take orders any more.
    #[error("process {pid} has ended before it was started")]
    Ended {
        /// The process's pid.
        pid: i32,
        /// How that showed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The program could not be executed, in the words that clients of OCI runtimes know.
    #[error("{0}")]
    Init(String),
}

/// Why a signal was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SignalError {
    /// The process has ended.
    #[error("process {pid} has already ended")]
    Ended {
        /// The process's pid.
        pid: i32,
    },
    /// The kernel refused, as it refuses a number that is no signal.
    #[error("cannot send signal {signal} to process {pid}")]
    Send {
        /// As asked for.
        signal: i32,
        /// The process's pid.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Why a terminal was not resized.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// There is none.
    #[error("the process has no terminal")]
    NoTerminal,
    /// The kernel refused.
    #[error("cannot set the size of the terminal")]
    Set(#[source] io::Error),
}

impl Process {
    /// Fails when descriptors run out.
    pub(crate) fn try_new(
        pid: i32,
        pidfd: OwnedFd,
        channel: Channel,
        console: Option<OwnedFd>,
    ) -> io::Result<Self> {
        let terminal = console.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Self {
            pid,
            pidfd,
            start: Mutex::new(Some(channel)),
            console: Mutex::new(console),
            terminal: Mutex::new(terminal),
        })
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether it has ended, reaped or not.
    pub(crate) fn has_ended(&self) -> bool {
        let mut end = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut end, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Its pid in the PID namespace of the container's creator.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The master of its terminal, once.
    pub fn take_console(&self) -> Option<OwnedFd> {
        take(&self.console)
    }

    /// Lets it execute the user's program; returns once it has, or has failed
    /// to. Blocks for as long as the program's file takes to be read.
    ///
    /// # Errors
    /// Of which [`StartError::AlreadyStarted`] and [`StartError::Ended`] are the
    /// caller's.
    pub fn start(&self) -> Result<(), StartError> {
        let pid = self.pid;
        // Out of the lock before anything blocks.
        let channel = take(&self.start).ok_or(StartError::AlreadyStarted { pid })?;
        let ended = |error| StartError::Ended {
            pid,
            source: Box::new(error),
        };
        channel.send(&Command::Start, &[]).map_err(ended)?;
        match channel.receive::<Report>() {
            // Closed by the execution. If the process was killed instead, its exit tells.
            Ok(None) => Ok(()),
            Ok(Some((Report::Failed { message }, _))) => Err(StartError::Init(message)),
            Ok(Some((report, _))) => Err(StartError::Init(format!("unexpected {report:?}"))),
            Err(error) => Err(ended(error)),
        }
    }

    /// Sends it a signal, and no process that got its pid later. Does not block.
    ///
    /// # Errors
    /// Of which [`SignalError::Ended`] is the caller's.
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

    /// Sets the size of its terminal in characters; the processes in its
    /// foreground get a `SIGWINCH`.
    ///
    /// # Errors
    /// Of which [`ResizeError::NoTerminal`] is the caller's.
    pub fn resize_terminal(&self, rows: u16, columns: u16) -> Result<(), ResizeError> {
        let terminal = self.terminal.lock();
        let terminal = terminal.unwrap_or_else(PoisonError::into_inner);
        let master = terminal.as_ref().ok_or(ResizeError::NoTerminal)?;
        set_terminal_size(master.as_fd(), rows, columns).map_err(ResizeError::Set)
    }

    /// Gives up what is held for it: nobody will start it or use its terminal.
    /// One that was never started ends.
    pub fn let_go(&self) {
        drop(take(&self.start));
        drop(take(&self.console));
        drop(take(&self.terminal));
    }
}

/// The value is whole whatever its holder was doing when it panicked.
fn take<T>(slot: &Mutex<Option<T>>) -> Option<T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}
