//! `process.apparmorProfile`: the profile under which the program is executed.
//!
//! The guest's kernel enforces it. Its policy is the host's, which the agent was
//! given beforehand: here a profile is only a name.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use oci_spec::runtime::Process;

/// Within the directory of a procfs (Linux, Documentation/userspace-api/lsm.rst:
/// each security module has a directory of its own).
const ATTRIBUTE: &str = "thread-self/attr/apparmor/exec";

/// The profile that a process asks for; none when it is empty.
pub fn profile_of(process: &Process) -> Option<&str> {
    let profile = process.apparmor_profile().as_deref();
    profile.filter(|profile| !profile.is_empty())
}

/// Why no program can be executed under the profile.
#[derive(Debug, thiserror::Error)]
#[error("cannot execute under the AppArmor profile {profile}")]
pub struct AppArmorError {
    profile: String,
    #[source]
    source: io::Error,
}

/// A profile that the calling process can set for its next execution.
///
/// Opened while the guest's own procfs is within reach: the container's may be
/// none.
#[derive(Debug)]
pub struct OnExec {
    profile: String,
    attribute: File,
}

impl OnExec {
    /// `None` when the process asks for no profile. `procfs` is a procfs of the
    /// caller's PID namespace or one above.
    pub fn open(procfs: &OwnedFd, process: &Process) -> Result<Option<Self>, AppArmorError> {
        let Some(profile) = profile_of(process) else {
            return Ok(None);
        };
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        match openat(procfs, ATTRIBUTE, flags, Mode::empty()) {
            Ok(attribute) => Ok(Some(Self {
                profile: profile.to_owned(),
                attribute: attribute.into(),
            })),
            Err(errno) => Err(AppArmorError {
                profile: profile.to_owned(),
                source: errno.into(),
            }),
        }
    }

    /// From the next execution on the profile confines the calling process, which
    /// must be the one that opened this. `ENOENT` means that the kernel has no
    /// such profile.
    pub fn set(mut self) -> Result<(), AppArmorError> {
        // One write: each is a command of its own.
        let command = format!("exec {}", self.profile);
        let written = self.attribute.write(command.as_bytes());
        let failed = match written {
            Ok(length) if length == command.len() => return Ok(()),
            Ok(_) => io::ErrorKind::WriteZero.into(),
            Err(error) => error,
        };
        Err(AppArmorError {
            profile: self.profile,
            source: failed,
        })
    }
}
