//! What a container in a user namespace of its own gets from outside of it.
//!
//! Its init has every privilege over its own namespaces and none over what is the
//! pod's or the guest's. So a process with the guest's privileges goes into the
//! container's namespaces, all but the user's and the mounts', names the host,
//! sets what `linux.sysctl` says, and makes the file systems that belong to a
//! namespace. From a mount namespace that the container cannot see, the kernel
//! lets it make a procfs and a sysfs whatever is mounted there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use crate::control::{Channel, ChannelError, Report};
use crate::init::set_up_namespaces;
use crate::kernel_calls::{Cloned, clone_child};
use crate::rootfs::{RootfsError, made_outside, new_procfs};
use crate::setup::SetupError;
use crate::user_namespace::wait_for;

/// To the init, before it does anything: mounts that were made for it, then the word to go on.
#[derive(Debug, Serialize, Deserialize)]
pub enum Announcement {
    /// `mounts[]` of that index comes with the message, attached nowhere.
    Mount(usize),
    /// The last one.
    Go,
}

/// What failed outside.
#[derive(Debug, thiserror::Error)]
pub enum OutsideError {
    #[error("cannot join the new namespaces of the container")]
    Join(#[source] Errno),
    #[error("cannot clone a process into them")]
    Clone(#[source] io::Error),
    #[error("cannot mount a procfs")]
    Procfs(#[source] io::Error),
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("cannot wait for the process that sets them up")]
    Wait(#[source] io::Error),
    #[error("the process that sets them up ended with {0}")]
    Ended(i32),
    /// The creator has been told already.
    #[error("told")]
    Told,
}

/// Exit code of a process that has told the creator what failed.
const TOLD: i32 = 3;

/// Sets up what `spec` says of the namespaces of `init`, and sends it its mounts.
pub fn set_up(
    creator: &Channel,
    to_init: &Channel,
    init: BorrowedFd<'_>,
    spec: &Spec,
) -> Result<(), OutsideError> {
    // For the child; the caller stays where it is.
    setns(init, CloneFlags::CLONE_NEWPID).map_err(OutsideError::Join)?;
    match clone_child(CloneFlags::empty()).map_err(OutsideError::Clone)? {
        Cloned::Child => {
            let code = match work(to_init, init, spec) {
                Ok(()) => 0,
                Err(error) => {
                    // Without the creator there is nobody to tell.
                    let _ = creator.send(&Report::failed(&error), &[]);
                    TOLD
                }
            };
            std::process::exit(code);
        }
        Cloned::Parent { pid, .. } => match wait_for(pid).map_err(OutsideError::Wait)? {
            0 => Ok(()),
            TOLD => Err(OutsideError::Told),
            code => Err(OutsideError::Ended(code)),
        },
    }
}

fn work(to_init: &Channel, init: BorrowedFd<'_>, spec: &Spec) -> Result<(), OutsideError> {
    setns(
        init,
        CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .map_err(OutsideError::Join)?;
    let procfs = new_procfs().map_err(OutsideError::Procfs)?;
    set_up_namespaces(spec, &procfs)?;
    made_outside(spec, |index, mount: &OwnedFd| {
        to_init
            .send(&Announcement::Mount(index), &[mount.as_fd()])
            .map_err(OutsideError::Channel)
    })
}
