//! What a container's init and its later processes do alike: their streams,
//! credentials and program, up to the moment in which they execute it.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, getcwd};
use oci_spec::runtime::{Linux, Process};

use crate::apparmor::{AppArmorError, OnExec};
use crate::control::{Channel, ChannelError, Command, Report};
use crate::credentials::{self, CapabilitySets, CredentialsError};
use crate::execution_domain::{enter_memory_policy, enter_personality};
use crate::hooks::{HookError, StartHooks};
use crate::kernel_calls::{close_on_exec_from, reset_signals};
use crate::program::{self, Program, ProgramError};
use crate::rootfs::RootfsError;
use crate::scheduling::SchedulingError;
use crate::seccomp::{Filter, SeccompError};
use crate::sysctl::SysctlError;
use crate::terminal::{Terminal, TerminalError};

/// What failed in a process before it executed the user's program.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    AppArmor(#[from] AppArmorError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error("the specification has no process")]
    NoProcess,
    #[error("cannot join the container's cgroup")]
    Cgroup(#[source] io::Error),
    #[error("cannot {step}")]
    Setup {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot change to working directory {path}")]
    WorkingDirectory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

pub fn failed<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> SetupError {
    move |error| SetupError::Setup {
        step,
        source: error.into(),
    }
}

/// Reports what failed, and ends.
pub fn give_up(channel: &Channel, error: &SetupError) -> ! {
    // Otherwise the creator is gone, or let go of a process that was never started.
    if !matches!(error, SetupError::Channel(_)) {
        let _ = channel.send(&Report::failed(error), &[]);
    }
    std::process::exit(1);
}

/// What is ready for the moment of the start.
pub struct Prepared {
    program: Program,
    capabilities: CapabilitySets,
    seccomp: Option<Filter>,
    no_new_privileges: bool,
}

/// Makes a terminal the session's; returns what becomes descriptors 0, 1 and 2.
pub fn control(terminal: Terminal) -> Result<[OwnedFd; 3], SetupError> {
    let slave = terminal.control()?;
    let copy = || slave.try_clone().map_err(failed("duplicate the terminal"));
    Ok([copy()?, copy()?, slave])
}

/// Runs the hooks, then executes the program, once the creator says so.
pub fn wait_for_start(
    channel: &Channel,
    prepared: &Prepared,
    mut hooks: StartHooks,
) -> Result<Infallible, SetupError> {
    match channel.receive::<Command>()? {
        Some((Command::Start, _)) => {
            reset_signals();
            hooks.run(|| confine(prepared).is_ok())?;
            drop(hooks);
            start(prepared)
        }
        // Never started: it is being deleted.
        None => std::process::exit(1),
    }
}

pub fn become_streams([stdin, stdout, stderr]: &[OwnedFd; 3]) -> Result<(), SetupError> {
    dup2_stdin(stdin)
        .and_then(|()| dup2_stdout(stdout))
        .and_then(|()| dup2_stderr(stderr))
        .map_err(failed("set up the standard streams"))
}

/// Everything that can fail for the user's reasons and can be done before the
/// start, so that creating the process tells it. `linux` is the container's.
pub fn prepare(
    process: &Process,
    linux: Option<&Linux>,
    apparmor: Option<OnExec>,
) -> Result<(Prepared, Vec<String>), SetupError> {
    let user = process.user();
    let seccomp = linux.and_then(|linux| linux.seccomp().as_ref());
    let seccomp = seccomp.map(Filter::compile).transpose()?;
    let (capabilities, warnings) = CapabilitySets::new(process.capabilities().as_ref());
    credentials::give_streams(user)?;
    capabilities.drop_bounding()?;
    credentials::become_user(user)?;
    change_directory(process.cwd())?;
    // Not with the privileges that are left to set the process up: the program
    // that is found must be one that the process may execute.
    let path = capabilities.with_effective(|| program::locate(process))??;
    let program = Program::try_new(path, process)?;
    if let Some(personality) = linux.and_then(|linux| linux.personality().as_ref()) {
        enter_personality(personality).map_err(failed("set linux.personality"))?;
    }
    if let Some(policy) = linux.and_then(|linux| linux.memory_policy().as_ref()) {
        enter_memory_policy(policy).map_err(failed(
            "set linux.memoryPolicy (are its nodes the guest's?)",
        ))?;
    }
    // After the last file was opened and before the last capability goes:
    // RLIMIT_NOFILE may be tiny, and raising a limit is a privilege.
    credentials::set_limits(process)?;
    // Hooks of the container's are executed under it too, as the program is.
    if let Some(apparmor) = apparmor {
        apparmor.set()?;
    }
    Ok((
        Prepared {
            program,
            capabilities,
            seccomp,
            no_new_privileges: process.no_new_privileges() == Some(true),
        },
        warnings,
    ))
}

fn change_directory(path: &Path) -> Result<(), SetupError> {
    let failed = |source| SetupError::WorkingDirectory {
        path: path.to_owned(),
        source,
    };
    chdir(path).map_err(|errno| failed(errno.into()))?;
    // A directory of the guest's, reached through /proc/self/fd, has no path in here.
    match getcwd() {
        Ok(inside) if inside.is_absolute() => Ok(()),
        _ => Err(failed(io::Error::other(
            "it is outside of the container's root file system",
        ))),
    }
}

/// The last privileges go, the filter comes, the program begins.
fn start(prepared: &Prepared) -> Result<Infallible, SetupError> {
    // The socket included: its end tells the creator that the program runs.
    close_on_exec_from(3).map_err(failed("close descriptors at the start"))?;
    confine(prepared)?;
    Ok(prepared.program.execute()?)
}

/// Leaves the caller with what the program may do.
fn confine(prepared: &Prepared) -> Result<(), SetupError> {
    if prepared.no_new_privileges {
        credentials::set_no_new_privileges()?;
        prepared.capabilities.apply()?;
        if let Some(filter) = &prepared.seccomp {
            filter.install()?;
        }
    } else {
        // Without no_new_privs the filter needs CAP_SYS_ADMIN; what follows is
        // capset and prctl, which a useful profile allows.
        if let Some(filter) = &prepared.seccomp {
            filter.install()?;
        }
        prepared.capabilities.apply()?;
    }
    Ok(())
}
