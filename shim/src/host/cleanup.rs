//! Undoing a pod: for the shim that ends it in good order, and for the
//! `delete` command that finds what a killed shim left.
//!
//! Every step succeeds where there is nothing to do, so a run that was killed
//! is finished by the next.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::directory::{self, PodLock, PodPaths};
use super::hooks::{self, State, Status};
use super::pod::Error;
use super::record::{Container, ExitRecord, Record};
use super::{cgroup, netns, share, uid};

/// How long killed processes may take to go, within the 5 seconds that
/// containerd gives `delete`.
const KILL_DEADLINE: Duration = Duration::from_secs(3);
/// How long what the shim started may take to see that it has gone.
const LOGGER_GRACE: Duration = Duration::from_millis(500);
/// How long a shim that is on its way out may take to let go of its pod: its
/// disconnecting is what makes containerd call.
const SHIM_GRACE: Duration = Duration::from_millis(500);
/// How long a dead shim's newest child may take to reach its program.
const ORPHAN_GRACE: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests;

/// What `delete` reports of a container.
#[derive(Debug, Default)]
pub struct Deleted {
    /// The stand-in's pid, 0 when there is no record of one.
    pub pid: u32,
    /// The recorded exit of its init; `None` when it died with its pod: report
    /// 137 and now.
    pub exit: Option<ExitRecord>,
    /// `poststop` hooks that failed; for the log.
    pub hook_failures: Vec<hooks::Error>,
    /// Other containers of the pod that died with it, and their recorded exits
    /// (`None`: 137 and now). Their `TaskExit` and `TaskDelete` are to be
    /// published.
    pub members: Vec<(String, Option<ExitRecord>)>,
}

/// Cleans up container or pod `id` of `namespace` below `root`
/// ([`super::directory::RUN_ROOT`]): exactly what belongs to it and nothing of
/// its siblings. While a live shim holds the pod this reports and touches
/// nothing: the shim answers for it. The VM dies only if `id` is the pod
/// itself. Idempotent, and resumable after a kill at any point; an unknown id
/// is clean already.
pub fn cleanup(root: &Path, namespace: &str, id: &str) -> Result<Deleted, Error> {
    let pod = PodPaths::below(root, namespace, id)?;
    if pod.directory().exists() {
        return cleanup_pod(&pod, id);
    }
    for pod in pods(root, namespace) {
        let record = Record::read(&pod.record());
        // A sibling pod's broken record is not this container's concern.
        if let Ok(Some(record)) = record
            && record.containers.contains_key(id)
        {
            return cleanup_member(&pod, id);
        }
    }
    Ok(Deleted::default())
}

/// The pods of a namespace.
fn pods(root: &Path, namespace: &str) -> Vec<PodPaths> {
    fs::read_dir(root.join(namespace))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter_map(|id| PodPaths::below(root, namespace, &id).ok())
        .collect()
}

fn report(record: &Record, id: &str) -> Deleted {
    let container = record.containers.get(id);
    Deleted {
        pid: container
            .and_then(|container| container.stand_ins.get(""))
            .map_or(0, |process| process.pid),
        exit: container.and_then(|container| container.exit),
        ..Deleted::default()
    }
}

fn cleanup_pod(pod: &PodPaths, id: &str) -> Result<Deleted, Error> {
    let Some((_lock, mut record)) = take_over(pod, SHIM_GRACE)? else {
        return Ok(report(&read(pod)?, id));
    };
    let mut deleted = report(&record, id);
    let others = record.containers.iter().filter(|(other, _)| *other != id);
    deleted.members = others
        .map(|(other, container)| (other.clone(), container.exit))
        .collect();
    deleted.hook_failures = undo_pod(pod, &mut record)?;
    Ok(deleted)
}

fn cleanup_member(pod: &PodPaths, id: &str) -> Result<Deleted, Error> {
    let Some((_lock, mut record)) = take_over(pod, Duration::ZERO)? else {
        return Ok(report(&read(pod)?, id));
    };
    let mut deleted = report(&record, id);
    deleted.hook_failures = undo_container(pod, &mut record, id)?;
    Ok(deleted)
}

fn read(pod: &PodPaths) -> Result<Record, Error> {
    Ok(Record::read(&pod.record())?.unwrap_or_else(Record::new))
}

/// Takes a pod that its shim has left, with its record; `None` when a live
/// shim still has it after `grace`, or when it is gone.
fn take_over(pod: &PodPaths, grace: Duration) -> Result<Option<(PodLock, Record)>, Error> {
    let dead = read(pod)?.shim.is_some_and(|shim| shim.open().is_none());
    // A process that a killed shim was just making still has the shim's
    // descriptors, the lock among them, until it executes its program.
    let patience = if dead { ORPHAN_GRACE } else { grace };
    match pod.lock_existing(patience) {
        Ok(None) => Ok(None),
        Ok(Some(lock)) => Ok(Some((lock, read(pod)?))),
        Err(directory::Error::Held { .. }) if !dead => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Removes everything of a pod, its directory last. The caller holds the pod
/// and is not in its cgroup.
pub(super) fn undo_pod(pod: &PodPaths, record: &mut Record) -> Result<Vec<hooks::Error>, Error> {
    if let Some(cgroup) = &record.cgroup {
        cgroup::kill_vm(&cgroup.path, KILL_DEADLINE)?;
    }
    let mut failures = Vec::new();
    for id in record.containers.keys().cloned().collect::<Vec<_>>() {
        failures.extend(undo_container(pod, record, &id)?);
    }
    share::remove(&pod.share())?;
    if record.network_namespace {
        netns::remove(&pod.network_namespace())?;
    }
    if let Some(cgroup) = &record.cgroup {
        cgroup::drain_shim(&cgroup.path, LOGGER_GRACE, KILL_DEADLINE)?;
        cgroup::remove(&cgroup.path, &cgroup.made)?;
    }
    uid::release(pod.root(), &owner(pod))?;
    pod.remove()?;
    Ok(failures)
}

/// Under which name a pod claims its uid.
pub(super) fn owner(pod: &PodPaths) -> String {
    format!("{}/{}", pod.namespace(), pod.id())
}

/// Removes everything of one container and strikes it off the record.
pub(super) fn undo_container(
    pod: &PodPaths,
    record: &mut Record,
    id: &str,
) -> Result<Vec<hooks::Error>, Error> {
    let Some(container) = record.containers.get_mut(id) else {
        return Ok(Vec::new());
    };
    for stand_in in container.stand_ins.values() {
        // Until it has ended, its own mount namespace keeps the root file
        // system mounted, which the next container may want to mount again.
        stand_in.kill(KILL_DEADLINE);
    }
    share::remove_container(&pod.share(), id)?;
    let failures = if container.poststop_due {
        run_poststop(id, container)
    } else {
        Vec::new()
    };
    // Only now: killed during the hooks, the next run runs them again.
    record.containers.remove(id);
    record.write(&pod.record())?;
    Ok(failures)
}

/// Runs every `poststop` hook, failing ones too (OCI runtime-spec, runtime.md,
/// "Lifecycle": log a warning and go on).
fn run_poststop(id: &str, container: &Container) -> Vec<hooks::Error> {
    let state = State {
        oci_version: &container.oci_version,
        id,
        status: Status::Stopped,
        pid: None,
        bundle: &container.bundle,
        annotations: &container.annotations,
    };
    let hooks = container.poststop.iter();
    hooks
        .filter_map(|hook| hooks::run("poststop", hook, &state).err())
        .collect()
}
