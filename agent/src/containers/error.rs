//! What can go wrong with a container.

use std::{fmt, io, path::PathBuf};

use agent_container::{
    CgroupError, CreateError, ExecError, ParseError, ResizeError, SignalError, StartError,
    UpdateError,
};
use agent_protocol::{SHARE_DIR, api::ProcessId};
use thiserror::Error;

use crate::{pid_namespaces::Shared, pod::PodError};

/// Longest identity: what containerd allows.
pub const MAX_ID_BYTES: usize = 76;

/// A process as a message names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessName {
    /// As asked for.
    pub container_id: String,
    /// As asked for; empty for the init, which stands for the container.
    pub exec_id: String,
}

impl From<&ProcessId> for ProcessName {
    fn from(process: &ProcessId) -> Self {
        Self {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
        }
    }
}

impl fmt::Display for ProcessName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.exec_id.is_empty() {
            write!(formatter, "exec {:?} of ", self.exec_id)?;
        }
        write!(formatter, "container {:?}", self.container_id)
    }
}

/// What a caller can be told about a container.
#[derive(Debug, Error)]
pub enum ContainerError {
    /// Not an identity.
    #[error(
        "identity {id:?}: need 1 to {MAX_ID_BYTES} letters, digits, '.', '_' or '-', and no leading '.'"
    )]
    Id {
        /// As asked for.
        id: String,
    },
    /// The OCI configuration cannot be read.
    #[error("the OCI configuration cannot be read")]
    Spec(#[source] ParseError),
    /// The root file system is not where the host puts it.
    #[error("root file system {path:?} is not below {SHARE_DIR}")]
    Rootfs {
        /// As asked for.
        path: PathBuf,
    },
    /// There is none to share.
    #[error("cannot share the PID namespace of {shared}")]
    PidNamespace {
        /// As asked for.
        shared: Shared,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No such process.
    #[error("no {process}")]
    NotFound {
        /// As asked for.
        process: ProcessName,
    },
    /// The identity is taken.
    #[error("{process} exists already")]
    Exists {
        /// As asked for.
        process: ProcessName,
    },
    /// The process has ended.
    #[error("{process} has already ended")]
    Ended {
        /// As asked for.
        process: ProcessName,
    },
    /// It cannot be created.
    #[error("cannot create container {id:?}")]
    Create {
        /// As asked for.
        id: String,
        /// Why.
        #[source]
        source: CreateError,
    },
    /// It is not there yet.
    #[error("{process} is still being created")]
    Creating {
        /// As asked for.
        process: ProcessName,
    },
    /// It is about to be gone.
    #[error("{process}: the container is being deleted")]
    Deleting {
        /// As asked for.
        process: ProcessName,
    },
    /// It has ended.
    #[error("{process} is not running")]
    NotRunning {
        /// As asked for.
        process: ProcessName,
    },
    /// It is stopped and takes no orders.
    #[error("{process}: the container is paused")]
    Paused {
        /// As asked for.
        process: ProcessName,
    },
    /// The terminal's size stays.
    #[error("cannot resize the terminal of {process}")]
    Resize {
        /// As asked for.
        process: ProcessName,
        /// Why.
        #[source]
        source: ResizeError,
    },
    /// The limits are as they were.
    #[error("cannot update container {id:?}")]
    Update {
        /// As asked for.
        id: String,
        /// Why.
        #[source]
        source: UpdateError,
    },
    /// The process is not a container's init.
    #[error("cannot create {process}")]
    Exec {
        /// As asked for.
        process: ProcessName,
        /// Why.
        #[source]
        source: ExecError,
    },
    /// It was killed and is still there.
    #[error("{process} is still alive {seconds} s after it was killed")]
    Alive {
        /// As asked for.
        process: ProcessName,
        /// How long was waited.
        seconds: u64,
    },
    /// A pipe or a descriptor of its terminal could not be had.
    #[error("cannot open the standard streams of {process}")]
    Stdio {
        /// As asked for.
        process: ProcessName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program does not run.
    #[error("cannot start {process}")]
    Start {
        /// As asked for.
        process: ProcessName,
        /// Why.
        #[source]
        source: StartError,
    },
    /// The signal was not sent.
    #[error("cannot signal {process}")]
    Signal {
        /// As asked for.
        process: ProcessName,
        /// Why.
        #[source]
        source: SignalError,
    },
    /// The container's processes could not be found, or not be killed.
    #[error("cannot {what} container {id:?}")]
    Cgroup {
        /// Which step.
        what: &'static str,
        /// As asked for.
        id: String,
        /// Why.
        #[source]
        source: CgroupError,
    },
    /// Its data did not reach the host.
    #[error("cannot write back the files of container {id:?}")]
    WriteBack {
        /// As asked for.
        id: String,
        /// Why.
        #[source]
        source: PodError,
    },
}
