//! First stage: the helper, single-threaded, in the agent's namespaces.
//!
//! It takes what only these namespaces can give (the mounts' sources), joins
//! the container's cgroup and the pod's namespaces, and clones the init into
//! the new ones.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::prctl;
use nix::sys::stat::Mode;
use nix::unistd::{dup2_stdin, pipe2};
use oci_spec::runtime::Spec;

use crate::control::{Channel, ChannelError, Report, Request};
use crate::init::{self, Init};
use crate::kernel_calls::{Cloned, clone_sibling, close_descriptors_from};
use crate::namespaces::{self, NamespaceError};
use crate::rootfs::{RootfsError, Sources};

/// What failed before the init existed.
#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("the creator of the container is gone")]
    CreatorGone,
    #[error("the request to create a container came without its descriptors")]
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
    #[error("cannot make a pipe to the init")]
    Pipe(#[source] Errno),
    #[error("cannot clone the container's init into its namespaces")]
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
    let mut descriptors = descriptors.into_iter();
    let (Some(specification), Some(cgroup)) = (descriptors.next(), descriptors.next()) else {
        return Err(HelperError::Descriptors);
    };
    let streams = match (request.terminal, descriptors.collect::<Vec<_>>()) {
        (true, _) => None,
        (false, streams) => {
            Some(<[OwnedFd; 3]>::try_from(streams).map_err(|_| HelperError::Descriptors)?)
        }
    };
    let spec = read_specification(specification)?;
    // The agent's own is -1000: a container that inherited it could fill the
    // guest's memory, and the OOM killer would find nothing to kill. Before the
    // first limit counts; the init sets what the specification asks for.
    fs::write("/proc/self/oom_score_adj", "0").map_err(HelperError::OomScore)?;
    // In the cgroup from here on, so that killing the cgroup is enough to clean up.
    openat(
        &cgroup,
        "cgroup.procs",
        OFlag::O_WRONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(io::Error::from)
    .and_then(|procs| File::from(procs).write_all(b"0"))
    .map_err(HelperError::Cgroup)?;

    let sources = Sources::open(&spec, &request.share_dir, &request.pod_dir, &cgroup)?;
    drop(cgroup);
    namespaces::join(&spec, &request.pod_dir)?;

    let (announced, announce) = pipe2(OFlag::O_CLOEXEC).map_err(HelperError::Pipe)?;
    match clone_sibling(namespaces::new_ones(&spec)).map_err(HelperError::Clone)? {
        Cloned::Child => {
            drop(announce);
            wait_until_announced(announced);
            init::main(
                channel,
                Init {
                    spec,
                    sources,
                    streams,
                },
            )
        }
        Cloned::Parent { pid, pidfd } => {
            channel.send(&Report::Cloned { pid }, &[pidfd.as_fd()])?;
            // A reader that is gone is an init that was killed: the creator sees that.
            let _ = File::from(announce).write_all(b".");
            Ok(())
        }
    }
}

/// The creator must know the init before the init says anything. If the helper
/// died before it told, nobody ever will.
fn wait_until_announced(announced: OwnedFd) {
    if File::from(announced).read_exact(&mut [0]).is_err() {
        std::process::exit(1);
    }
}

fn read_specification(memfd: OwnedFd) -> Result<Spec, HelperError> {
    let mut json = Vec::new();
    File::from(memfd)
        .read_to_end(&mut json)
        .map_err(HelperError::Specification)?;
    serde_json::from_slice(&json).map_err(|error| HelperError::Specification(error.into()))
}
