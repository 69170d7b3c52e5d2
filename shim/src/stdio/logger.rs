//! A logging program: it reads standard output and error of a container from
//! its descriptors 3 and 4 and says by descriptor 5 that it listens.
#![expect(
    unsafe_code,
    reason = "descriptors are put in their places between fork and exec"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tracing::warn;

use super::{LoggerCommand, Ready};
use crate::host::children;
use crate::readiness::readable;

/// The descriptors of containerd's protocol.
const STDOUT_FD: RawFd = 3;
const STDERR_FD: RawFd = 4;
const READY_FD: RawFd = 5;
/// Where our copies are put first, out of the way of those three.
const FIRST_FREE_FD: RawFd = 10;
/// How long it may take to listen. containerd itself sets no limit; a Create
/// that never returns would help nobody.
const READY_TIMEOUT: Duration = Duration::from_mins(1);
/// How long it may take to write the last lines after their end, then after
/// SIGTERM: half of what containerd's own shim gives, twice.
const FINISH_TIMEOUT: Duration = Duration::from_secs(6);

/// Why there is no logging program.
#[derive(Debug, Error)]
pub enum Error {
    /// A pipe, or the process itself.
    #[error("{operation}")]
    Io {
        /// As in "execute it".
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It ended, or closed descriptor 5, without the byte of `binary-v2`.
    #[error("it ended before it was ready")]
    NotReady,
    /// It did not answer.
    #[error("it was not ready after {READY_TIMEOUT:?}")]
    Timeout,
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Io {
        operation,
        source: source.into(),
    }
}

/// A running logging program. Dropped before it has finished, it is killed and
/// collected: its container never was.
#[derive(Debug)]
pub struct Logger {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Logger {
    /// Starts the program and waits until it listens. Returns it with the ends
    /// to write standard output and error to.
    pub async fn start(
        command: &LoggerCommand,
        container_id: &str,
        namespace: &str,
    ) -> Result<(Self, pipe::Sender, pipe::Sender), Error> {
        let (stdout, stdout_reader) = pipe_to_child()?;
        let (stderr, stderr_reader) = pipe_to_child()?;
        let (ready, ready_writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(failed("make a pipe"))?;
        let fds = [
            (out_of_the_way(&stdout_reader)?, STDOUT_FD),
            (out_of_the_way(&stderr_reader)?, STDERR_FD),
            (out_of_the_way(&ready_writer)?, READY_FD),
        ];
        drop((stdout_reader, stderr_reader, ready_writer));
        let logger = Self::spawn(command, container_id, namespace, &fds)?;
        // Our copies, or descriptor 5 would never end.
        drop(fds);
        let ready = pipe::Receiver::from_owned_fd(ready).map_err(failed("read from it"))?;
        match tokio::time::timeout(READY_TIMEOUT, wait_ready(ready, command.ready)).await {
            Ok(Ok(())) => Ok((logger, stdout, stderr)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::Timeout),
        }
    }

    fn spawn(
        command: &LoggerCommand,
        container_id: &str,
        namespace: &str,
        fds: &[(OwnedFd, RawFd); 3],
    ) -> Result<Self, Error> {
        let places = fds.each_ref().map(|(from, to)| (from.as_raw_fd(), *to));
        let mut process = Command::new(&command.path);
        process
            .args(&command.arguments)
            .env("CONTAINER_ID", container_id)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: the closure runs in the child between fork and exec, where
        // only async-signal-safe functions may be called: dup2(2) is one
        // (signal-safety(7)), and reading errno allocates nothing. `places` is
        // an array of integers that the closure owns. The descriptors in it are
        // open in the child, because `fds` outlives the spawn below, and lie at
        // FIRST_FREE_FD or above, so that no dup2 overwrites a later source.
        unsafe {
            process.pre_exec(move || {
                for (from, to) in places {
                    if libc::dup2(from, to) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = children::spawn_command(&mut process).map_err(failed("execute it"))?;
        let pid = child.id();
        let pidfd = Pid::from_raw(pid.cast_signed())
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
            .map_err(failed("open its pidfd"))?;
        let pidfd = readable(pidfd).map_err(failed("watch it"))?;
        Ok(Self { pid, pidfd })
    }

    /// Lets it write its last lines, both pipes being closed, and sees it end.
    pub async fn finish(self) {
        if self.ends_within(FINISH_TIMEOUT).await {
            return;
        }
        // It may have ended meanwhile: then there is nothing to signal.
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
        if !self.ends_within(FINISH_TIMEOUT).await {
            warn!(
                pid = self.pid,
                "the logging program does not end; killing it"
            );
        }
    }

    async fn ends_within(&self, bound: Duration) -> bool {
        let ended = tokio::time::timeout(bound, self.pidfd.readable())
            .await
            .is_ok();
        if ended {
            children::reap(self.pid, self.pidfd.get_ref().as_fd());
        }
        ended
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        // One that has finished is collected, and left alone.
        children::kill_and_reap(self.pid, self.pidfd.get_ref().as_fd());
    }
}

fn pipe_to_child() -> Result<(pipe::Sender, OwnedFd), Error> {
    let (sender, receiver) = pipe::pipe().map_err(failed("make a pipe"))?;
    let receiver = receiver.into_blocking_fd().map_err(failed("make a pipe"))?;
    Ok((sender, receiver))
}

fn out_of_the_way(descriptor: &OwnedFd) -> Result<OwnedFd, Error> {
    rustix::io::fcntl_dupfd_cloexec(descriptor, FIRST_FREE_FD).map_err(failed("copy a descriptor"))
}

async fn wait_ready(mut from: pipe::Receiver, ready: Ready) -> Result<(), Error> {
    let length = from.read(&mut [0]).await.map_err(failed("read from it"))?;
    match (ready, length) {
        (Ready::Byte, 0) => Err(Error::NotReady),
        (Ready::Byte | Ready::Close, _) => Ok(()),
    }
}
