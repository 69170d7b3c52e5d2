//! A created container, as its creator holds it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::Spec;

use crate::cgroup::{Cgroup, CgroupError};
use crate::process::Process;
use crate::rootfs::{Kind, parse_options};

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
            warnings,
            root: root.unwrap_or_default(),
            bind_sources: bind_sources(spec),
        }
    }

    /// Its first process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
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
