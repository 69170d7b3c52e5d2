//! Second stage: the container's init, until it executes the user's program.
//!
//! It is the first process of the container's PID namespace and a child of the
//! agent. It runs code of the agent's, with all privileges, in namespaces that
//! contain nothing of the user's until the program is executed.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{sethostname, setsid};
use oci_spec::runtime::{Process, Spec};

use crate::apparmor::OnExec;
use crate::control::{Channel, Report};
use crate::hooks::StartHooks;
use crate::kernel_calls::{bring_loopback_up, set_domain_name};
use crate::namespaces;
use crate::rootfs::{self, Root, Sources, new_procfs};
use crate::setup::{self, SetupError, become_streams, failed, prepare};
use crate::sysctl;
use crate::terminal::Terminal;
use crate::user_namespace;

/// What the helper hands over.
#[derive(Debug)]
pub struct Init {
    pub spec: Spec,
    pub sources: Sources,
    /// Become descriptors 0, 1 and 2; without them there is a terminal.
    pub streams: Option<[OwnedFd; 3]>,
    /// Run at the start.
    pub hooks: StartHooks,
    /// The guest's.
    pub procfs: OwnedFd,
}

/// Becomes the user's program, or reports why not and ends.
pub fn main(channel: &Channel, init: Init) -> ! {
    let Err(error) = run(channel, init);
    setup::give_up(channel, &error)
}

fn run(channel: &Channel, init: Init) -> Result<Infallible, SetupError> {
    let spec = init.spec;
    let process = spec.process().as_ref().ok_or(SetupError::NoProcess)?;
    let apparmor = OnExec::open(&init.procfs, process)?;
    drop(init.procfs);
    setsid().map_err(failed("start a session"))?;
    let own_user_namespace = user_namespace::of_spec(&spec).is_some();
    if own_user_namespace {
        user_namespace::become_root().map_err(failed("become root of the user namespace"))?;
    }

    let mut root = Root::attach(init.sources)?;
    if !own_user_namespace {
        let procfs = new_procfs().map_err(failed("mount a procfs"))?;
        set_up_namespaces(&spec, &procfs)?;
    }
    root.fill(&spec)?;
    let streams = match init.streams {
        Some(streams) => streams,
        None => open_terminal(&root, process, channel)?,
    };
    root.protect(&spec)?;
    let linux = spec.linux().as_ref();
    // Validated before anything was made.
    let propagation = linux
        .and_then(|linux| linux.rootfs_propagation().as_deref())
        .filter(|word| !word.is_empty())
        .and_then(|word| rootfs::rootfs_propagation(word).ok());
    // The descriptor closes here, before anything of the container's is opened.
    rootfs::enter(&root.into_directory(), propagation, own_user_namespace)?;

    become_streams(&streams)?;
    drop(streams);
    make_working_directory(process.cwd())?;
    let (prepared, warnings) = prepare(process, linux, apparmor)?;

    channel.send(&Report::Ready { warnings }, &[])?;
    setup::wait_for_start(channel, &prepared, init.hooks)
}

/// Names the host, starts the network and sets `linux.sysctl`, in the caller's
/// namespaces and with its privileges over them.
pub fn set_up_namespaces(spec: &Spec, procfs: &OwnedFd) -> Result<(), SetupError> {
    name_host(spec)?;
    if namespaces::new_ones(spec).contains(CloneFlags::CLONE_NEWNET) {
        start_loopback()?;
    }
    let linux = spec.linux().as_ref();
    let settings = linux.and_then(|linux| linux.sysctl().as_ref());
    for (key, value) in settings.into_iter().flatten() {
        sysctl::set(procfs, key, value)?;
    }
    Ok(())
}

fn name_host(spec: &Spec) -> Result<(), SetupError> {
    if let Some(name) = spec.hostname().as_ref().filter(|name| !name.is_empty()) {
        sethostname(name).map_err(failed("set the hostname"))?;
    }
    if let Some(name) = spec.domainname().as_ref().filter(|name| !name.is_empty()) {
        set_domain_name(name).map_err(failed("set the domain name"))?;
    }
    Ok(())
}

fn start_loopback() -> Result<(), SetupError> {
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
) -> Result<[OwnedFd; 3], SetupError> {
    let terminal = Terminal::open(root.tree(), process)?;
    terminal.put_at_console(root.tree())?;
    channel.send(&Report::Console, &[terminal.master.as_fd()])?;
    setup::control(terminal)
}

/// As other OCI runtimes do, with the mode of `mkdir -p`. A read-only root file
/// system that lacks it shows when the directory is entered.
fn make_working_directory(path: &Path) -> Result<(), SetupError> {
    match fs::create_dir_all(path) {
        Err(source) if source.raw_os_error() != Some(libc::EROFS) => {
            Err(SetupError::WorkingDirectory {
                path: path.to_owned(),
                source,
            })
        }
        _ => Ok(()),
    }
}
