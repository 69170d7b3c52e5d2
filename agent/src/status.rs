//! Errors as ttrpc statuses.

use std::error::Error;

use agent_container::{
    CgroupError, CreateError, ExecError, LaunchError, ResizeError, SignalError, StartError,
    UpdateError,
};
use ttrpc::{Code, get_status};

use crate::{
    containers::ContainerError, cpus::CpusError, network::NetworkError, pod::PodError,
    sysctls::SysctlsError,
};

/// Whose fault it is that the guest has not the CPUs that it is to have.
pub fn cpus_code(error: &CpusError) -> Code {
    match error {
        CpusError::Count { .. } => Code::INVALID_ARGUMENT,
        CpusError::Change { .. } | CpusError::Read { .. } => Code::INTERNAL,
    }
}

pub fn refused(error: &ContainerError) -> ttrpc::Error {
    status(code(error), chain(error))
}

/// Whose fault it is: the caller's by its argument, by an identity, by the order
/// of its calls, or the guest's.
fn code(error: &ContainerError) -> Code {
    use ContainerError as E;
    match error {
        E::Id { .. } | E::Spec(_) | E::Rootfs { .. } => Code::INVALID_ARGUMENT,
        E::NotFound { .. } | E::Ended { .. } => Code::NOT_FOUND,
        E::Exists { .. } => Code::ALREADY_EXISTS,
        E::Creating { .. } | E::Deleting { .. } | E::NotRunning { .. } | E::Paused { .. } => {
            Code::FAILED_PRECONDITION
        }
        E::Resize { source, .. } => match source {
            ResizeError::NoTerminal => Code::FAILED_PRECONDITION,
            ResizeError::Set(_) => Code::INTERNAL,
        },
        E::Update { source, .. } => match source {
            UpdateError::Unsupported(_) => Code::INVALID_ARGUMENT,
            UpdateError::Cgroup(source) => cgroup_code(source),
        },
        E::Exec { source, .. } => exec_code(source),
        E::Create { source, .. } => match source {
            CreateError::Unsupported(_) | CreateError::Id { .. } | CreateError::Stdio { .. } => {
                Code::INVALID_ARGUMENT
            }
            CreateError::Cgroup(source) => cgroup_code(source),
            CreateError::Launch(source) => launch_code(source),
        },
        E::Start { source, .. } => match source {
            // The last: a program that is not in the root file system, and alike.
            StartError::AlreadyStarted { .. } | StartError::Ended { .. } | StartError::Init(_) => {
                Code::FAILED_PRECONDITION
            }
        },
        E::Signal { source, .. } => match source {
            SignalError::Ended { .. } => Code::NOT_FOUND,
            SignalError::Send { .. } => Code::INTERNAL,
        },
        E::Cgroup { source, .. } => cgroup_code(source),
        E::WriteBack { source, .. } => pod_code(source),
        E::Stdio { .. } | E::Alive { .. } | E::PidNamespace { .. } => Code::INTERNAL,
    }
}

fn exec_code(error: &ExecError) -> Code {
    match error {
        ExecError::NotRunning | ExecError::Paused => Code::FAILED_PRECONDITION,
        ExecError::Unsupported(_) | ExecError::Stdio { .. } => Code::INVALID_ARGUMENT,
        ExecError::Cgroup(source) => cgroup_code(source),
        ExecError::Launch(source) => launch_code(source),
    }
}

fn launch_code(error: &LaunchError) -> Code {
    match error {
        LaunchError::Scheduling(_) => Code::INVALID_ARGUMENT,
        // What its configuration asks for is not there: a program, a directory.
        LaunchError::Reported(_) => Code::FAILED_PRECONDITION,
        LaunchError::Helper(_) | LaunchError::Channel(_) | LaunchError::Ended => Code::INTERNAL,
    }
}

fn cgroup_code(error: &CgroupError) -> Code {
    match error {
        CgroupError::Exists { .. } => Code::ALREADY_EXISTS,
        CgroupError::InUse { .. } => Code::FAILED_PRECONDITION,
        CgroupError::Create { .. }
        | CgroupError::Read { .. }
        | CgroupError::Write { .. }
        | CgroupError::Delegate { .. }
        | CgroupError::Devices { .. }
        | CgroupError::Busy { .. }
        | CgroupError::NotFrozen { .. }
        | CgroupError::Remove { .. } => Code::INTERNAL,
    }
}

pub fn pod_code(error: &PodError) -> Code {
    match error {
        PodError::Hostname { .. } => Code::INVALID_ARGUMENT,
        PodError::Mount { .. } | PodError::Namespace { .. } | PodError::WriteBack { .. } => {
            Code::INTERNAL
        }
    }
}

pub fn network_code(error: &NetworkError) -> Code {
    match error {
        NetworkError::Interface { .. } | NetworkError::Message(_) => Code::INVALID_ARGUMENT,
        NetworkError::Device { .. }
        | NetworkError::Namespace { .. }
        | NetworkError::Kernel { .. }
        | NetworkError::Setting { .. } => Code::INTERNAL,
    }
}

pub fn sysctls_code(error: &SysctlsError) -> Code {
    match error {
        SysctlsError::Unsupported(_) | SysctlsError::Kernel(_) => Code::INVALID_ARGUMENT,
        SysctlsError::Namespace(_) => Code::INTERNAL,
    }
}

pub fn internal(error: &dyn Error) -> ttrpc::Error {
    status(Code::INTERNAL, chain(error))
}

pub fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message.into()))
}

/// The whole chain of causes on one line, outermost first.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_protocol::api::ProcessId;

    #[test]
    fn code_tells_the_callers_mistakes_from_the_guests() {
        let id = || "a".to_owned();
        let asked = ProcessId {
            container_id: id(),
            exec_id: "e".to_owned(),
            ..ProcessId::default()
        };
        let process = || (&asked).into();
        let create = |source| ContainerError::Create { id: id(), source };
        let start = |source| ContainerError::Start {
            process: process(),
            source,
        };
        let exec = |source| ContainerError::Exec {
            process: process(),
            source,
        };
        let exists = CgroupError::Exists { path: "/a".into() };
        let signal = ContainerError::Signal {
            process: process(),
            source: SignalError::Ended { pid: 7 },
        };
        for (error, expected) in [
            (create(CreateError::Id { id: id() }), Code::INVALID_ARGUMENT),
            (
                create(CreateError::Stdio { terminal: true }),
                Code::INVALID_ARGUMENT,
            ),
            (create(CreateError::Cgroup(exists)), Code::ALREADY_EXISTS),
            (
                create(CreateError::Launch(LaunchError::Ended)),
                Code::INTERNAL,
            ),
            (
                create(CreateError::Launch(LaunchError::Reported(String::new()))),
                Code::FAILED_PRECONDITION,
            ),
            (
                start(StartError::AlreadyStarted { pid: 7 }),
                Code::FAILED_PRECONDITION,
            ),
            (
                start(StartError::Init(String::new())),
                Code::FAILED_PRECONDITION,
            ),
            (signal, Code::NOT_FOUND),
            (
                ContainerError::Creating { process: process() },
                Code::FAILED_PRECONDITION,
            ),
            (
                ContainerError::Deleting { process: process() },
                Code::FAILED_PRECONDITION,
            ),
            (
                ContainerError::Exists { process: process() },
                Code::ALREADY_EXISTS,
            ),
            (
                ContainerError::NotFound { process: process() },
                Code::NOT_FOUND,
            ),
            (
                ContainerError::NotRunning { process: process() },
                Code::FAILED_PRECONDITION,
            ),
            (
                ContainerError::Resize {
                    process: process(),
                    source: ResizeError::NoTerminal,
                },
                Code::FAILED_PRECONDITION,
            ),
            (exec(ExecError::NotRunning), Code::FAILED_PRECONDITION),
            (exec(ExecError::Paused), Code::FAILED_PRECONDITION),
            (
                exec(ExecError::Stdio { terminal: true }),
                Code::INVALID_ARGUMENT,
            ),
            (exec(ExecError::Launch(LaunchError::Ended)), Code::INTERNAL),
        ] {
            assert_eq!(code(&error), expected, "{error}");
        }
    }
}
