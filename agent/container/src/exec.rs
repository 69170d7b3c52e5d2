//! The creator's side of an exec: one more process in a container that exists.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{Linux, Process as ProcessSpec, Spec};

use crate::apparmor;
use crate::cgroup::{Cgroup, CgroupError};
use crate::control::{ExecSpec, Request};
use crate::launch::{ContainerStdio, LaunchError, document, launch};
use crate::process::Process;
use crate::spec_support::{self, Unsupported};
use crate::user_namespace;

/// Why a process was not made in a container. None is left of it.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The container's init has ended, and every other process with it.
    #[error("the container is not running")]
    NotRunning,
    /// The new process would be frozen like the others.
    #[error("the container is paused")]
    Paused,
    /// The process asks for what is not supported.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// `process.terminal` says one thing, the streams another.
    #[error("process.terminal is {terminal}, which the standard streams are not")]
    Stdio {
        /// What the specification says.
        terminal: bool,
    },
    /// The container's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The process was not made.
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

/// What of a container's specification its later processes get.
#[derive(Debug)]
pub struct ExecDefaults {
    process: ProcessSpec,
    linux: Option<Linux>,
}

impl ExecDefaults {
    pub fn new(spec: &Spec) -> Self {
        Self {
            process: spec.process().clone().unwrap_or_default(),
            linux: spec.linux().clone(),
        }
    }

    /// As runc does it: what an exec does not name of capabilities, limits, the
    /// OOM score, the AppArmor profile and scheduling is the container's.
    fn complete(&self, asked: &ProcessSpec) -> ExecSpec {
        let mut process = asked.clone();
        if process.capabilities().is_none() {
            process.set_capabilities(self.process.capabilities().clone());
        }
        if process.rlimits().iter().flatten().next().is_none() {
            process.set_rlimits(self.process.rlimits().clone());
        }
        if process.oom_score_adj().is_none() {
            process.set_oom_score_adj(self.process.oom_score_adj());
        }
        if apparmor::profile_of(&process).is_none() {
            process.set_apparmor_profile(self.process.apparmor_profile().clone());
        }
        if process.scheduler().is_none() {
            process.set_scheduler(self.process.scheduler().clone());
        }
        if process.io_priority().is_none() {
            process.set_io_priority(*self.process.io_priority());
        }
        if process.exec_cpu_affinity().is_none() {
            process.set_exec_cpu_affinity(self.process.exec_cpu_affinity().clone());
        }
        ExecSpec {
            process,
            linux: self.linux.clone(),
        }
    }
}

/// Makes a process in the container of `init`, up to the point where it waits
/// to be started. Returns what the log should say as well.
pub fn exec(
    cgroup: &Cgroup,
    init: &Process,
    defaults: &ExecDefaults,
    asked: &ProcessSpec,
    stdio: &ContainerStdio,
) -> Result<(Process, Vec<String>), ExecError> {
    spec_support::validate_process(asked)?;
    let terminal = asked.terminal() == Some(true);
    if terminal != stdio.is_terminal() {
        return Err(ExecError::Stdio { terminal });
    }
    if init.has_ended() {
        return Err(ExecError::NotRunning);
    }
    if cgroup.is_frozen()? {
        return Err(ExecError::Paused);
    }
    if let Some(maps) = user_namespace::of(defaults.linux.as_ref()) {
        maps.check_user(asked)?;
    }
    let complete = defaults.complete(asked);
    let spec = document(&complete)?;
    let [procs, procs_of_init] = open_procs(cgroup, init.pid())?;
    let descriptors = [
        spec.as_fd(),
        init.pidfd(),
        procs.as_fd(),
        procs_of_init.as_fd(),
    ];
    let request = Request::Exec { terminal };
    let launched = launch(&request, &descriptors, stdio, &complete.process);
    let (process, reported) = launched.map_err(|error| {
        // Whatever failed then, failed for that.
        if init.has_ended() {
            ExecError::NotRunning
        } else {
            error.into()
        }
    })?;
    let mut warnings = spec_support::process_warnings(asked);
    warnings.extend(reported);
    Ok((process, warnings))
}

/// `cgroup.procs` of the container and of the cgroup that the init is in, which
/// is another when the container made one for itself.
fn open_procs(cgroup: &Cgroup, init: i32) -> Result<[OwnedFd; 2], CgroupError> {
    let of_init = cgroup.find_process(init)?;
    let of_init = of_init.as_deref().unwrap_or(cgroup.path());
    let open = |directory: &Path| Cgroup::open_procs(directory);
    Ok([open(cgroup.path())?, open(of_init)?])
}
