//! `bulkhead-vmm` in its jail: nothing but the descriptors that it is handed.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use vmm_config::VmConfig;
use vmm_config::control::{CONTROL_FD, Request};

use super::control::{Control, Received};
use super::{Error, Place, dev_null, kill, log_pipe};
use crate::host::jail::{self, Capabilities, Jail, Network, Pids, Root};

const NAME: &str = "the monitor (bulkhead-vmm)";
/// Its devices, vCPUs and events have a few each; the vsock device has one for
/// each connection.
const OPEN_FILES: u64 = 4096;

/// The running `bulkhead-vmm`. Dropped, it is killed and collected.
#[derive(Debug)]
pub struct Monitor {
    pid: u32,
    pidfd: OwnedFd,
    control: Control,
    /// Its log, line by line, non-blocking; ends with it. Taken by who reads
    /// it.
    pub log: Option<OwnedFd>,
}

impl Monitor {
    pub(super) fn start(place: Place<'_>, program: BorrowedFd<'_>) -> Result<Self, Error> {
        let (control, theirs) = Control::pair()?;
        let (log, log_write) = log_pipe(NAME)?;
        let null = dev_null(NAME)?;
        let jailed = jail::launch(&Jail {
            name: NAME,
            program,
            arguments: &[OsStr::new("bulkhead-vmm")],
            descriptors: &[
                (null.as_fd(), 0),
                (log_write.as_fd(), 1),
                (log_write.as_fd(), 2),
                (theirs.as_fd(), CONTROL_FD),
            ],
            root: Root::Empty,
            network: Network::None,
            pids: Pids::Own,
            uid: place.uid,
            gid: place.uid,
            capabilities: Capabilities::NONE,
            open_files: OPEN_FILES,
            cgroup: place.cgroup,
        })?;
        Ok(Self {
            pid: jailed.pid,
            pidfd: jailed.pidfd,
            control,
            log: Some(log),
        })
    }

    pub(super) fn boot(
        &self,
        config: VmConfig,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        self.control
            .send(&Request::Boot(Box::new(config)), descriptors)
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Readable when it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The control socket (non-blocking); readable when [`Monitor::try_event`]
    /// has something to say. Closing it ends the VM.
    pub fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    /// Takes the next event, without blocking.
    pub fn try_event(&self) -> Result<Received, Error> {
        self.control.receive()
    }

    /// Waits for the next event; `Pending` once `timeout` has passed.
    pub fn wait_event(&self, timeout: Duration) -> Result<Received, Error> {
        self.control.wait(timeout)
    }

    /// Asks for a change of the VM's devices; the answer is an event.
    pub fn change(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.control.send(request, descriptors)
    }

    /// Asks the monitor to end the VM at once.
    pub fn stop(&self) -> Result<(), Error> {
        self.control.send(&Request::Stop, &[])
    }

    /// Kills the monitor and collects it. Idempotent.
    pub fn kill(&self) -> Result<(), Error> {
        kill(NAME, self.pid, self.pidfd.as_fd())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::error!("{error}");
        }
    }
}
