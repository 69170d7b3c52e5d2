//! The creator's side of what container and exec have in common: the helper is
//! executed, and what it makes reports until it waits to be started.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Serialize;

use crate::control::{Channel, ChannelError, Report, Request};
use crate::kernel_calls::pidfd_send_signal;
use crate::process::Process;
use crate::scheduling::{self, SchedulingError};

/// Why there is no process that waits to be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The helper cannot be executed.
    #[error("cannot execute the container helper")]
    Helper(#[source] io::Error),
    /// Talking to the helper failed.
    #[error("cannot talk to the container helper")]
    Channel(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The helper or the process was killed, for instance by the memory limit.
    #[error("the process ended before it was ready: is the container's memory limit too small?")]
    Ended,
    /// What the helper or the process reports, its causes included.
    #[error("{0}")]
    Reported(String),
    /// The kernel does not schedule it as asked for.
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
}

impl From<ChannelError> for LaunchError {
    fn from(error: ChannelError) -> Self {
        Self::Channel(Box::new(error))
    }
}

/// The standard streams of a process.
#[derive(Debug)]
pub enum ContainerStdio {
    /// Descriptors that become 0, 1 and 2.
    Streams {
        /// Becomes descriptor 0.
        stdin: OwnedFd,
        /// Becomes descriptor 1.
        stdout: OwnedFd,
        /// Becomes descriptor 2.
        stderr: OwnedFd,
    },
    /// A pseudo terminal in the container's own devpts; its master is
    /// [`Process::take_console`].
    Terminal,
}

impl ContainerStdio {
    pub(crate) fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal)
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Streams {
                stdin,
                stdout,
                stderr,
            } => vec![stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
            Self::Terminal => Vec::new(),
        }
    }
}

/// What the helper and the process have told.
#[derive(Default)]
struct Reported {
    process: Option<(i32, OwnedFd)>,
    console: Option<OwnedFd>,
    warnings: Vec<String>,
}

/// Has a process made as `request` says, with the descriptors that it names.
/// Returns the process, which waits to be started scheduled as `process` says,
/// and what the log should say. On an error it has ended or is about to.
pub fn launch(
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
    stdio: &ContainerStdio,
    process: &oci_spec::runtime::Process,
) -> Result<(Process, Vec<String>), LaunchError> {
    let channel = spawn_helper()?;
    channel.send(request, &[descriptors, &stdio.descriptors()].concat())?;
    let mut reported = Reported::default();
    let ready = wait_until_ready(&channel, &mut reported);
    let Some((pid, pidfd)) = reported.process.take() else {
        return Err(ready.err().unwrap_or(LaunchError::Ended));
    };
    let ready = ready.and_then(|()| Ok(scheduling::apply(pid, process)?));
    if let Err(error) = ready {
        // It may have ended: the first error is the one to tell.
        let _ = pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL);
        return Err(error);
    }
    let process = Process::try_new(pid, pidfd, channel, reported.console);
    let process = process.map_err(|error| LaunchError::Channel(Box::new(error)))?;
    Ok((process, reported.warnings))
}

/// A value as JSON in a memfd, at its beginning.
pub fn document(value: &impl Serialize) -> Result<File, LaunchError> {
    let json = serde_json::to_vec(value).map_err(|error| LaunchError::Channel(Box::new(error)))?;
    let mut file = memfd_create("specification", MFdFlags::MFD_CLOEXEC)
        .map(File::from)
        .map_err(|errno| LaunchError::Channel(Box::new(errno)))?;
    file.write_all(&json)
        .and_then(|()| file.rewind())
        .map_err(|error| LaunchError::Channel(Box::new(error)))?;
    Ok(file)
}

/// Executes the caller's own binary again; its descriptor 0 is our socket, and
/// no other descriptor of ours is inherited.
fn spawn_helper() -> Result<Channel, LaunchError> {
    let (channel, theirs) = Channel::pair()?;
    // Dropping the handle neither waits nor kills: the caller reaps it. Nothing
    // may be set here that keeps the standard library from using posix_spawn:
    // its other way waits for the child if the execution fails.
    Command::new("/proc/self/exe")
        .arg(crate::HELPER_ARGUMENT)
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .map_err(LaunchError::Helper)?;
    Ok(channel)
}

fn wait_until_ready(channel: &Channel, reported: &mut Reported) -> Result<(), LaunchError> {
    loop {
        let (report, descriptors) = channel.receive::<Report>()?.ok_or(LaunchError::Ended)?;
        let descriptor = descriptors.into_iter().next();
        match report {
            Report::Cloned { pid } => reported.process = descriptor.map(|pidfd| (pid, pidfd)),
            Report::Console => reported.console = descriptor,
            Report::Ready { warnings } => {
                reported.warnings = warnings;
                return Ok(());
            }
            Report::Failed { message } => return Err(LaunchError::Reported(message)),
        }
    }
}
