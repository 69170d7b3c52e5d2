//! Second stage: the container's init, until it executes the user's program.
//!
//! It is the first process of the container's PID namespace and a child of the
//! agent. It runs code of the agent's, with all privileges, in namespaces that
//! contain nothing of the user's until the program is executed.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, getcwd, sethostname, setsid};
use oci_spec::runtime::{Process, Spec};

use crate::control::{Channel, ChannelError, Command, Report};
use crate::credentials::{self, CapabilitySets, CredentialsError};
use crate::kernel_calls::{bring_loopback_up, close_on_exec_from, reset_signals, set_domain_name};
use crate::namespaces;
use crate::program::{self, Program, ProgramError};
use crate::rootfs::{self, Root, RootfsError, Sources, new_procfs};
use crate::seccomp::{Filter, SeccompError};
use crate::sysctl::{self, SysctlError};
use crate::terminal::{Terminal, TerminalError};

/// What failed in the init.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
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
    #[error("the specification has no process")]
    NoProcess,
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

fn failed<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> InitError {
    move |error| InitError::Setup {
        step,
        source: error.into(),
    }
}

/// What the helper hands over.
#[derive(Debug)]
pub struct Init {
    pub spec: Spec,
    pub sources: Sources,
    /// Become descriptors 0, 1 and 2; without them there is a terminal.
    pub streams: Option<[OwnedFd; 3]>,
}

/// Becomes the user's program, or reports why not and ends.
pub fn main(channel: &Channel, init: Init) -> ! {
    let Err(error) = run(channel, init);
    if let InitError::Channel(_) = error {
        // The creator is gone, or let go of a container that was never started.
        std::process::exit(1);
    }
    let _ = channel.send(&Report::failed(&error), &[]);
    std::process::exit(1);
}

/// What is ready for the moment of the start.
struct Prepared {
    program: Program,
    capabilities: CapabilitySets,
    seccomp: Option<Filter>,
    no_new_privileges: bool,
}

fn run(channel: &Channel, init: Init) -> Result<Infallible, InitError> {
    let spec = init.spec;
    let process = spec.process().as_ref().ok_or(InitError::NoProcess)?;
    setsid().map_err(failed("start a session"))?;
    name_host(&spec)?;

    let root = Root::attach(init.sources)?;
    let procfs = new_procfs().map_err(failed("mount a procfs"))?;
    root.fill(&spec)?;
    let streams = match init.streams {
        Some(streams) => streams,
        None => open_terminal(&root, process, channel)?,
    };
    if namespaces::new_ones(&spec).contains(CloneFlags::CLONE_NEWNET) {
        start_loopback()?;
    }
    let linux = spec.linux().as_ref();
    for (key, value) in linux
        .and_then(|linux| linux.sysctl().as_ref())
        .into_iter()
        .flatten()
    {
        sysctl::set(&procfs, key, value)?;
    }
    root.protect(&spec)?;
    // Validated before anything was made.
    let propagation = linux
        .and_then(|linux| linux.rootfs_propagation().as_deref())
        .filter(|word| !word.is_empty())
        .and_then(|word| rootfs::rootfs_propagation(word).ok());
    // The descriptor closes here, before anything of the container's is opened.
    rootfs::enter(&root.into_directory(), propagation)?;

    if let Some(score) = process.oom_score_adj() {
        credentials::set_oom_score(&procfs, score)?;
    }
    drop(procfs);
    become_streams(&streams)?;
    drop(streams);
    let (prepared, warnings) = prepare(&spec, process)?;

    channel.send(&Report::Ready { warnings }, &[])?;
    match channel.receive::<Command>()? {
        Some((Command::Start, _)) => start(&prepared),
        // Never started: the container is being deleted.
        None => std::process::exit(1),
    }
}

fn name_host(spec: &Spec) -> Result<(), InitError> {
    if let Some(name) = spec.hostname().as_ref().filter(|name| !name.is_empty()) {
        sethostname(name).map_err(failed("set the hostname"))?;
    }
    if let Some(name) = spec.domainname().as_ref().filter(|name| !name.is_empty()) {
        set_domain_name(name).map_err(failed("set the domain name"))?;
    }
    Ok(())
}

fn start_loopback() -> Result<(), InitError> {
    socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(io::Error::from)
    .and_then(|socket| bring_loopback_up(socket.as_fd()))
    .map_err(failed("bring the loopback interface up"))
}

/// Allocates the terminal, hands its master to the creator and makes it the session's.
fn open_terminal(
    root: &Root,
    process: &Process,
    channel: &Channel,
) -> Result<[OwnedFd; 3], InitError> {
    let terminal = Terminal::open(root.tree(), process)?;
    channel.send(&Report::Console, &[terminal.master.as_fd()])?;
    let slave = terminal.control()?;
    let copy = || slave.try_clone().map_err(failed("duplicate the terminal"));
    Ok([copy()?, copy()?, slave])
}

fn become_streams([stdin, stdout, stderr]: &[OwnedFd; 3]) -> Result<(), InitError> {
    dup2_stdin(stdin)
        .and_then(|()| dup2_stdout(stdout))
        .and_then(|()| dup2_stderr(stderr))
        .map_err(failed("set up the standard streams"))
}

/// Everything that can fail for the user's reasons and can be done before the
/// start, so that creating the container tells it.
fn prepare(spec: &Spec, process: &Process) -> Result<(Prepared, Vec<String>), InitError> {
    let user = process.user();
    let seccomp = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().as_ref())
        .map(Filter::compile)
        .transpose()?;
    let (capabilities, warnings) = CapabilitySets::new(process.capabilities().as_ref());
    credentials::give_streams(user)?;
    make_working_directory(process.cwd())?;
    capabilities.drop_bounding()?;
    credentials::become_user(user)?;
    change_directory(process.cwd())?;
    // Not with the privileges that are left to set the process up: the program
    // that is found must be one that the process may execute.
    let path = capabilities.with_effective(|| program::locate(process))??;
    let program = Program::try_new(path, process)?;
    // After the last file was opened and before the last capability goes:
    // RLIMIT_NOFILE may be tiny, and raising a limit is a privilege.
    credentials::set_limits(process)?;
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

/// As other OCI runtimes do, with the mode of `mkdir -p`. A read-only root file
/// system that lacks it shows when the directory is entered.
fn make_working_directory(path: &Path) -> Result<(), InitError> {
    match fs::create_dir_all(path) {
        Err(source) if source.raw_os_error() != Some(libc::EROFS) => {
            Err(InitError::WorkingDirectory {
                path: path.to_owned(),
                source,
            })
        }
        _ => Ok(()),
    }
}

fn change_directory(path: &Path) -> Result<(), InitError> {
    let failed = |source| InitError::WorkingDirectory {
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
fn start(prepared: &Prepared) -> Result<Infallible, InitError> {
    reset_signals();
    // The socket included: its end tells the creator that the program runs.
    close_on_exec_from(3).map_err(failed("close descriptors at the start"))?;
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
    Ok(prepared.program.execute()?)
}
