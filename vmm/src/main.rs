//! The KVM virtual machine monitor, one jailed process per pod.
//!
//! Started by the shim with one end of a control socket at descriptor 3 and
//! nothing else: it opens no file by name, reads no environment and takes no
//! argument. `vmm_config::control` has the messages.
//!
//! The process exits with 0 when it has told how the VM ended, and with 1 when
//! there was no VM to tell of.

mod acpi;
mod bus;
mod control;
mod kvm;
mod layout;
mod lifecycle;
mod load;
mod log;
mod machine;
mod memory;
mod platform;
mod requests;
mod slots;

use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;
use vmm_config::control::{Event, ExitReason, Request};

use control::{Control, ControlError, Received};
use lifecycle::Lifecycle;
use log::{describe, log};
use machine::{BootError, Machine};

/// How long a guest that says that it has panicked may take to reset: it writes
/// the rest of its log meanwhile. A guest that is set up to halt instead would
/// never end.
const PANIC_GRACE: Duration = Duration::from_secs(5);

/// Why there is no VM to tell of.
#[derive(Debug, Error)]
enum RunError {
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The launcher went away first.
    #[error("the launcher closed the control socket before it sent a configuration")]
    NoConfig,
    /// Another request came first.
    #[error("the first request was not to boot")]
    NotBoot,
    /// No descriptor for an event.
    #[error("cannot make an event: check the limit on open files")]
    Event(#[source] io::Error),
    /// The VM could not be made.
    #[error("cannot boot the VM")]
    Boot(#[from] BootError),
    /// Waiting for events.
    #[error("cannot wait for events")]
    Wait(#[source] io::Error),
}

fn main() -> ExitCode {
    let began = Instant::now();
    let control = match Control::inherit() {
        Ok(control) => control,
        Err(error) => {
            log(&describe(&error));
            return ExitCode::FAILURE;
        }
    };
    match run(&control, began) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error = describe(&error);
            log(&error);
            control.send(&Event::Failed { error });
            ExitCode::FAILURE
        }
    }
}

/// Boots the VM that the launcher asks for, stays with it until its end, and
/// tells of that.
fn run(control: &Control, began: Instant) -> Result<(), RunError> {
    let (config, descriptors) = match control.receive()? {
        Received::Request(Request::Boot(config), descriptors) => (config, descriptors),
        Received::Request(_, _) => return Err(RunError::NotBoot),
        Received::HangUp => return Err(RunError::NoConfig),
    };
    let lifecycle = Arc::new(Lifecycle::try_new().map_err(RunError::Event)?);
    let (mut machine, timings) = Machine::boot(&config, descriptors, &lifecycle, began)?;
    control.send(&Event::Started(timings));
    let reason = wait_for_end(control, &lifecycle, &mut machine)?;
    machine.end(reason, |exit| control.send(&Event::Exited(exit)));
    Ok(())
}

/// Serves the control socket until the VM ends or is to be ended.
fn wait_for_end(
    control: &Control,
    lifecycle: &Lifecycle,
    machine: &mut Machine,
) -> Result<ExitReason, RunError> {
    let mut told_ready = false;
    let mut told_plugged = 0;
    let mut panic_deadline = None;
    loop {
        let (control_ready, lifecycle_ready) = wait(control, lifecycle, panic_deadline)?;
        if lifecycle_ready {
            let state = lifecycle.state();
            if state.guest_ready && !told_ready {
                told_ready = true;
                control.send(&Event::GuestReady);
            }
            if state.plugged_bytes != told_plugged {
                told_plugged = state.plugged_bytes;
                let size_mib = machine.with_plugged(told_plugged);
                control.send(&Event::MemoryResized { size_mib });
            }
            if let Some(reason) = state.ended {
                return Ok(reason);
            }
            if state.panicked && panic_deadline.is_none() {
                panic_deadline = Some(Instant::now() + PANIC_GRACE);
            }
        }
        if panic_deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Ok(ExitReason::GuestPanic);
        }
        if control_ready {
            match control.receive() {
                Ok(Received::HangUp | Received::Request(Request::Stop, _)) => {
                    return Ok(ExitReason::Stopped);
                }
                Ok(Received::Request(request, descriptors)) => {
                    if let Some(event) = requests::answer(machine, &request, descriptors) {
                        control.send(&event);
                    }
                }
                // The pod's VM is worth more than a message that is not understood.
                Err(error @ (ControlError::Decode(_) | ControlError::Truncated)) => {
                    log(&describe(&error));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Waits for either; tells which are ready. Neither is when the deadline has
/// come.
fn wait(
    control: &Control,
    lifecycle: &Lifecycle,
    deadline: Option<Instant>,
) -> Result<(bool, bool), RunError> {
    let mut sources = [
        PollFd::new(control.as_fd(), PollFlags::POLLIN),
        PollFd::new(lifecycle.as_fd(), PollFlags::POLLIN),
    ];
    let timeout = match deadline {
        None => PollTimeout::NONE,
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that it does not wake before its time.
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        }
    };
    match poll(&mut sources, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(RunError::Wait(errno.into())),
    }
    let ready = |source: &PollFd| source.revents().is_some_and(|events| !events.is_empty());
    Ok((ready(&sources[0]), ready(&sources[1])))
}
