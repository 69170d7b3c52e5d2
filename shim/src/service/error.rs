//! From what went wrong to what containerd is told.

use thiserror::Error;
use ttrpc::Code;

use crate::host::directory;
use crate::pod::process::{CallError, ExecRefusal};
use crate::pod::{self, chain};
use crate::stdio::PlanError;
use crate::task::WrongState;

/// Why a call of containerd's failed.
#[derive(Debug, Error)]
pub enum Error {
    /// A task that is not there.
    #[error("task {id} is not known")]
    NoTask {
        /// As asked for.
        id: String,
    },
    /// A process of a task that is not there.
    #[error("task {id} has no process {exec_id}")]
    NoProcess {
        /// The task.
        id: String,
        /// As asked for.
        exec_id: String,
    },
    /// A sandbox that is not there, or another's.
    #[error("sandbox {id} is not known: this is the shim of pod {pod}")]
    NoSandbox {
        /// As asked for.
        id: String,
        /// Ours.
        pod: String,
    },
    /// The bundle of a sandbox.
    #[error("write what the pod's containers share into {path}")]
    Bundle {
        /// Which.
        path: std::path::PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A task that is there already.
    #[error("task {id} exists already")]
    Exists {
        /// As asked for.
        id: String,
    },
    /// A task that was deleted, or whose shim was shut down, before it was
    /// there.
    #[error("task {id} was abandoned while it was being created")]
    Abandoned {
        /// As asked for.
        id: String,
    },
    /// The wrong time for a call.
    #[error(transparent)]
    State(WrongState),
    /// A container before its pod's sandbox.
    #[error("pod {id} has no sandbox yet: create that first")]
    NoPod {
        /// The pod.
        id: String,
    },
    /// A pod that is over.
    #[error("pod {id} has ended ({reason}): create it again")]
    PodOver {
        /// The pod.
        id: String,
        /// Why it has.
        reason: String,
    },
    /// A process that cannot be.
    #[error(transparent)]
    Exec(ExecRefusal),
    /// A container of another pod than this shim's.
    #[error("container {id} belongs to pod {wanted}, and this is the shim of pod {pod}")]
    OtherPod {
        /// The container.
        id: String,
        /// Its pod.
        wanted: String,
        /// Ours.
        pod: String,
    },
    /// An id that is none.
    #[error(transparent)]
    Id(directory::Error),
    /// Streams that cannot be.
    #[error(transparent)]
    Streams(#[from] PlanError),
    /// A part of the request that is not supported.
    #[error("{what}: {reason}")]
    Argument {
        /// Which, as in "checkpoint".
        what: String,
        /// Why not.
        reason: String,
    },
    /// A call that this release does not have.
    #[error("{call} is not supported yet")]
    Unsupported {
        /// Its name.
        call: &'static str,
    },
    /// The pod, or the container in it.
    #[error(transparent)]
    Pod(#[from] pod::Error),
    /// The work was lost to a panic.
    #[error("internal error: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

impl From<CallError> for Error {
    fn from(error: CallError) -> Self {
        match error {
            CallError::State(state) => Self::State(state),
            CallError::Pod(error) => Self::Pod(error),
            CallError::Exec(refusal) => Self::Exec(refusal),
        }
    }
}

impl Error {
    /// The code for containerd.
    pub fn code(&self) -> Code {
        match self {
            Self::NoTask { .. }
            | Self::NoProcess { .. }
            | Self::NoSandbox { .. }
            | Self::State(WrongState::Finished) => Code::NOT_FOUND,
            Self::Exists { .. } | Self::Exec(ExecRefusal::Exists { .. }) => Code::ALREADY_EXISTS,
            Self::State(
                WrongState::StartedBefore
                | WrongState::Ended
                | WrongState::NotRunning
                | WrongState::Paused
                | WrongState::NotPaused
                | WrongState::Running
                | WrongState::Deleting,
            )
            | Self::Exec(ExecRefusal::Sandbox { .. })
            | Self::Abandoned { .. }
            | Self::NoPod { .. }
            | Self::PodOver { .. } => Code::FAILED_PRECONDITION,
            Self::OtherPod { .. } | Self::Id(_) | Self::Streams(_) | Self::Argument { .. } => {
                Code::INVALID_ARGUMENT
            }
            Self::Unsupported { .. } => Code::UNIMPLEMENTED,
            Self::Pod(error) => pod_code(error),
            Self::Bundle { .. } | Self::Panicked(_) => Code::INTERNAL,
        }
    }
}

fn pod_code(error: &pod::Error) -> Code {
    match error {
        pod::Error::Host(error) | pod::Error::Start(pod::host_side::StartError::Host(error)) => {
            host_code(error)
        }
        pod::Error::Spec(_) | pod::Error::Volume(crate::spec::IntoJsonError::Spec(_)) => {
            Code::INVALID_ARGUMENT
        }
        pod::Error::Volume(crate::spec::IntoJsonError::Volume { source, .. }) => host_code(source),
        pod::Error::AppArmor(error) if error.blames_caller() => Code::FAILED_PRECONDITION,
        pod::Error::Size(_) => Code::FAILED_PRECONDITION,
        // The streams are the client's to make.
        pod::Error::Stdio(_) => Code::INVALID_ARGUMENT,
        pod::Error::Agent(error) => agent_code(error),
        pod::Error::Start(
            pod::host_side::StartError::Install(_) | pod::host_side::StartError::Watch(_),
        )
        | pod::Error::AppArmor(_)
        | pod::Error::Vsock(_)
        | pod::Error::Ended { .. }
        | pod::Error::BootTimeout
        | pod::Error::Shm { .. }
        | pod::Error::Network { .. }
        | pod::Error::WatchNetwork { .. }
        | pod::Error::WatchMounts(_)
        | pod::Error::Forward(_)
        | pod::Error::Panicked(_) => Code::INTERNAL,
    }
}

fn host_code(error: &crate::host::pod::Error) -> Code {
    if error.blames_caller() {
        Code::INVALID_ARGUMENT
    } else {
        Code::INTERNAL
    }
}

fn agent_code(error: &pod::agent::Error) -> Code {
    match error.code() {
        Some(
            code @ (Code::INVALID_ARGUMENT
            | Code::FAILED_PRECONDITION
            | Code::NOT_FOUND
            | Code::ALREADY_EXISTS),
        ) => code,
        // Never passed on: containerd would take it for a shim of an older
        // protocol and ask again.
        Some(Code::UNIMPLEMENTED) => Code::FAILED_PRECONDITION,
        _ => Code::INTERNAL,
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let status = ttrpc::get_status(error.code(), chain(&error));
        ttrpc::Error::RpcStatus(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_of_signal_to_a_finished_process_is_not_found() {
        assert_eq!(Error::State(WrongState::Finished).code(), Code::NOT_FOUND);
    }

    #[test]
    fn code_of_an_agent_without_a_call_is_never_unimplemented() {
        let status = ttrpc::get_status(Code::UNIMPLEMENTED, "no such call");
        let error = Error::Pod(pod::Error::Agent(pod::agent::Error::Call {
            operation: "create the container in the guest",
            answer: Box::new(ttrpc::Error::RpcStatus(status)),
        }));
        assert_eq!(error.code(), Code::FAILED_PRECONDITION);
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else {
            panic!("is a status");
        };
        assert_eq!(
            status.message,
            "create the container in the guest: no such call"
        );
    }
}
