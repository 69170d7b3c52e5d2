//! A created container, as its creator holds it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::{LinuxResources, Spec};

use crate::Unsupported;
use crate::cgroup::{Cgroup, CgroupError, Figures, check_resources, oom_kills};
use crate::exec::{ExecDefaults, ExecError, exec};
use crate::launch::ContainerStdio;
use crate::process::Process;
use crate::rootfs::{Kind, parse_options};

/// Why limits were not changed.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// What is asked for is not supported.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The kernel refused a limit.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// A container whose init exists. Every method may be called from several
/// threads at once.
///
/// Dropping it neither ends nor removes the container, unless it was never
/// started: its init ends with the creator's interest. [`Container::delete`]
/// removes it.
#[derive(Debug)]
pub struct Container {
    cgroup: Cgroup,
    init: Arc<Process>,
    exec_defaults: ExecDefaults,
    warnings: Vec<String>,
    root: PathBuf,
    bind_sources: Vec<PathBuf>,
}

impl Container {
    /// Of a validated specification.
    pub(crate) fn new(cgroup: Cgroup, init: Process, warnings: Vec<String>, spec: &Spec) -> Self {
        let root = spec.root().as_ref().map(|root| root.path().clone());
        Self {
            cgroup,
            init: Arc::new(init),
            exec_defaults: ExecDefaults::new(spec),
            warnings,
            root: root.unwrap_or_default(),
            bind_sources: bind_sources(spec),
        }
    }

    /// Its first process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Makes one more process, as [`crate::parse_process`] returns it, up to the
    /// point where it waits to be started. It is in the container's cgroup and
    /// in the namespaces of its init, under the container's seccomp filter, and
    /// ends with the init at the latest. What the second value says is for the
    /// log. The caller's copies of the streams are closed when this returns.
    ///
    /// Blocks on the container's file system and on the helper. The helper and
    /// the process become children of the caller, which must reap them; the end
    /// of the init waits for that.
    ///
    /// # Errors
    /// Of which all are the caller's but [`ExecError::Cgroup`] and
    /// [`ExecError::Launch`]. Then no process is left, or it is about to end.
    pub fn exec(
        &self,
        process: &oci_spec::runtime::Process,
        stdio: ContainerStdio,
    ) -> Result<(Process, Vec<String>), ExecError> {
        let made = exec(
            &self.cgroup,
            &self.init,
            &self.exec_defaults,
            process,
            &stdio,
        );
        // The process alone holds its streams now: their end is its end.
        drop(stdio);
        made
    }

    /// What was accepted in the specification without having its effect, for
    /// the log, once.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Where its root file system is in the guest.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What it got by bind mounts, files and directories, where they are in the guest.
    pub fn bind_sources(&self) -> &[PathBuf] {
        &self.bind_sources
    }

    /// Sends a signal to every process of the container. `SIGKILL` misses none;
    /// others may miss one that is being forked meanwhile.
    pub fn signal_all(&self, signal: i32) -> Result<(), CgroupError> {
        self.cgroup.signal(signal)
    }

    /// Stops every process of the container; returns when the last one has, at
    /// the longest after 10 seconds, after which all go on again. `SIGKILL` ends
    /// them still. Idempotent.
    pub fn pause(&self) -> Result<(), CgroupError> {
        self.cgroup.freeze()
    }

    /// Lets the processes of a paused container go on. Idempotent.
    pub fn resume(&self) -> Result<(), CgroupError> {
        self.cgroup.thaw()
    }

    /// Whether it is paused or about to be.
    pub fn is_paused(&self) -> Result<bool, CgroupError> {
        self.cgroup.is_frozen()
    }

    /// Changes the limits that `resources`, as [`crate::parse_resources`] returns
    /// it, names: all of them, or after an error none. Device rules, if it has
    /// any, replace all that were. Blocks while the kernel reclaims what a lower
    /// memory limit leaves no room for.
    ///
    /// # Errors
    /// Of which [`UpdateError::Unsupported`] is the caller's.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), UpdateError> {
        check_resources(resources)?;
        Ok(self.cgroup.update(resources)?)
    }

    /// What it uses and is limited to. Nothing once it is deleted.
    pub fn figures(&self) -> Result<Figures, CgroupError> {
        Figures::read(self.cgroup.path())
    }

    /// How many of its processes the OOM killer has ended; 0 once it is deleted.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        oom_kills(self.cgroup.path())
    }

    /// Every process of the container, in the PID namespace of its creator.
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        self.cgroup.pids()
    }

    /// Kills what is left, waits until the last process is gone (which also
    /// unmounts everything, since the mounts are in the container's own
    /// namespace) and removes the cgroup. Blocks, at the longest 10 seconds.
    /// Idempotent; after an error it goes on where it stopped.
    pub fn delete(&self) -> Result<(), CgroupError> {
        let removed = self.cgroup.remove();
        // After the kill: an init that was never started ends at the sight of
        // this, and would end differently each time.
        self.init.let_go();
        removed
    }
}

fn bind_sources(spec: &Spec) -> Vec<PathBuf> {
    let mounts = spec.mounts().iter().flatten().enumerate();
    mounts
        .filter(|(index, mount)| {
            let options = parse_options(*index, mount);
            options.is_ok_and(|options| matches!(options.kind, Kind::Bind { .. }))
        })
        .filter_map(|(_, mount)| mount.source().clone())
        .collect()
}
