//! First stage: the helper, single-threaded, in the agent's namespaces.
//!
//! For a container it takes what only these namespaces can give (the mounts'
//! sources), joins the container's cgroup and the pod's namespaces, and clones
//! the init into the new ones. For an exec it joins the namespaces of the init
//! and clones a process into them.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sched::CloneFlags;
use nix::sys::prctl;
use nix::sys::stat::Mode;
use nix::unistd::{dup2_stdin, pipe2};
use oci_spec::runtime::Spec;
use serde::de::DeserializeOwned;

use crate::control::{Channel, ChannelError, Report, Request};
use crate::init::{self, Init};
use crate::joined::{self, Joined};
use crate::kernel_calls::{Cloned, clone_sibling, close_descriptors_from};
use crate::namespaces::{self, NamespaceError};
use crate::rootfs::{RootfsError, Sources};

/// What failed before the process existed.
#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("the creator is gone")]
    CreatorGone,
    #[error("the request came without its descriptors")]
    Descriptors,
    #[error("cannot read the specification")]
    Specification(#[source] io::Error),
    #[error("cannot give up the agent's protection from the OOM killer")]
    OomScore(#[source] io::Error),
    #[error("cannot join the container's cgroup")]
    Cgroup(#[source] io::Error),
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error("cannot join the namespaces of the container's init")]
    JoinInit(#[source] Errno),
    #[error("cannot make a pipe to the process")]
    Pipe(#[source] Errno),
    #[error("cannot clone a process into the container's namespaces")]
    Clone(#[source] io::Error),
}

/// What the agent's binary runs when executed with [`crate::HELPER_ARGUMENT`].
///
/// The process must be as the kernel made it: no thread, no descriptor of its
/// own. Returns in neither of the two processes that it becomes.
pub fn helper_main() -> ! {
    let code = match connect() {
        Ok(channel) => {
            if let Err(error) = run(&channel) {
                // Without the creator there is nobody to tell.
                let _ = channel.send(&Report::failed(&error), &[]);
                1
            } else {
                0
            }
        }
        // Executed by hand: descriptor 0 is no socket of the creator's.
        Err(error) => {
            eprintln!("{}: {error}: started by hand?", crate::HELPER_ARGUMENT);
            2
        }
    };
    std::process::exit(code);
}

/// The socket came as descriptor 0; every other descriptor but the standard
/// streams is closed, should the agent have forgotten a close-on-exec.
fn connect() -> io::Result<Channel> {
    close_descriptors_from(3)?;
    // The agent's memory is nobody's business, in whatever namespace.
    prctl::set_dumpable(false)?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    dup2_stdin(File::open("/dev/null")?)?;
    Ok(Channel::from_socket(socket))
}

fn run(channel: &Channel) -> Result<(), HelperError> {
    let (request, descriptors) = channel
        .receive::<Request>()?
        .ok_or(HelperError::CreatorGone)?;
    // The agent's own is -1000: a container that inherited it could fill the
    // guest's memory, and the OOM killer would find nothing to kill. Before the
    // first limit counts; the process sets what its specification asks for.
    fs::write("/proc/self/oom_score_adj", "0").map_err(HelperError::OomScore)?;
    match request {
        Request::Create {
            share_dir,
            pod_dir,
            terminal,
        } => {
            let ([specification, cgroup], streams) = sort(descriptors, terminal)?;
            let spec = read_document(specification)?;
            let [share_dir, pod_dir] = [share_dir.as_path(), pod_dir.as_path()];
            create(channel, spec, &cgroup, streams, share_dir, pod_dir)
        }
        Request::Exec { terminal } => {
            let ([spec, init, procs, procs_of_init], streams) = sort(descriptors, terminal)?;
            let joined = Joined {
                spec: read_document(spec)?,
                streams,
                procs,
                procs_of_init,
            };
            exec(channel, &init, joined)
        }
    }
}

type Streams = Option<[OwnedFd; 3]>;

/// The descriptors that a request names, and the standard streams after them.
fn sort<const NAMED: usize>(
    descriptors: Vec<OwnedFd>,
    terminal: bool,
) -> Result<([OwnedFd; NAMED], Streams), HelperError> {
    let mut descriptors = descriptors.into_iter();
    let named: Vec<_> = descriptors.by_ref().take(NAMED).collect();
    let named = named.try_into().map_err(|_| HelperError::Descriptors)?;
    if terminal {
        return Ok((named, None));
    }
    let streams: Vec<_> = descriptors.collect();
    let streams = streams.try_into().map_err(|_| HelperError::Descriptors)?;
    Ok((named, Some(streams)))
}

fn create(
    channel: &Channel,
    spec: Spec,
    cgroup: &OwnedFd,
    streams: Streams,
    share_dir: &Path,
    pod_dir: &Path,
) -> Result<(), HelperError> {
    // In the cgroup from here on, so that killing the cgroup is enough to clean up.
    openat(
        cgroup,
        "cgroup.procs",
        OFlag::O_WRONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(io::Error::from)
    .and_then(|procs| File::from(procs).write_all(b"0"))
    .map_err(HelperError::Cgroup)?;

    let sources = Sources::open(&spec, share_dir, pod_dir, cgroup)?;
    namespaces::join(&spec, pod_dir)?;
    if clone_announced(channel, namespaces::new_ones(&spec))? {
        let init = Init {
            spec,
            sources,
            streams,
        };
        init::main(channel, init);
    }
    Ok(())
}

fn exec(channel: &Channel, init: &OwnedFd, joined: Joined) -> Result<(), HelperError> {
    namespaces::join_those_of(init).map_err(HelperError::JoinInit)?;
    if clone_announced(channel, CloneFlags::empty())? {
        joined::main(channel, joined);
    }
    Ok(())
}

/// Clones a process that is the creator's child; `true` in it, once the creator
/// knows it.
fn clone_announced(channel: &Channel, namespaces: CloneFlags) -> Result<bool, HelperError> {
    let (announced, announce) = pipe2(OFlag::O_CLOEXEC).map_err(HelperError::Pipe)?;
    match clone_sibling(namespaces).map_err(HelperError::Clone)? {
        Cloned::Child => {
            drop(announce);
            wait_until_announced(announced);
            Ok(true)
        }
        Cloned::Parent { pid, pidfd } => {
            channel.send(&Report::Cloned { pid }, &[pidfd.as_fd()])?;
            // A reader that is gone is a process that was killed: the creator sees that.
            let _ = File::from(announce).write_all(b".");
            Ok(false)
        }
    }
}

/// The creator must know the process before the process says anything. If the helper
/// died before it told, nobody ever will.
fn wait_until_announced(announced: OwnedFd) {
    if File::from(announced).read_exact(&mut [0]).is_err() {
        std::process::exit(1);
    }
}

fn read_document<T: DeserializeOwned>(memfd: OwnedFd) -> Result<T, HelperError> {
    let mut json = Vec::new();
    File::from(memfd)
        .read_to_end(&mut json)
        .map_err(HelperError::Specification)?;
    serde_json::from_slice(&json).map_err(|error| HelperError::Specification(error.into()))
}
