//! Kernel parameters of the pod's namespaces.

use std::{collections::HashMap, fs::File, io, os::fd::OwnedFd, thread};

use agent_container::{SysctlError, Unsupported, check_sysctl, set_sysctl};

use crate::namespaces;

/// Why a parameter is not set.
#[derive(Debug, thiserror::Error)]
pub enum SysctlsError {
    /// It is the whole guest's.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The kernel did not take it.
    #[error(transparent)]
    Kernel(#[from] SysctlError),
    /// A namespace of the pod's, or a thread in it.
    #[error("cannot enter the pod's namespaces")]
    Namespace(#[from] io::Error),
}

/// Sets each parameter, as `linux.sysctl` of the OCI runtime configuration names
/// them, in the namespaces that the pod's containers share. Blocks.
///
/// # Errors
/// Before anything is set, when one belongs to no such namespace; else the first
/// that the kernel does not take, with some of the others set.
pub fn set(values: &HashMap<String, String>) -> Result<(), SysctlsError> {
    for key in values.keys() {
        check_sysctl(key)?;
    }
    // The thread's end leaves the namespaces.
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            namespaces::join_shared()?;
            let procfs = OwnedFd::from(File::open("/proc")?);
            for (key, value) in values {
                set_sysctl(&procfs, key, value)?;
            }
            Ok(())
        });
        let panicked = || Err(io::Error::other("the thread panicked").into());
        inside.join().unwrap_or_else(|_| panicked())
    })
}
