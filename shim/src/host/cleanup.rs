//! Undoing a pod: for the shim that ends it in good order, and for the
//! `delete` command that finds what a killed shim left.
//!
//! Every step succeeds where there is nothing to do, so a run that was killed
//! is finished by the next.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::deadline::Deadline;
use super::directory::{self, PodLock, PodPaths};
use super::hooks::{self, Batch, State, Status};
use super::pod::Error;
use super::record::{Container, ExitRecord, Process, Record};
use super::{cgroup, netns, share, uid};

/// How long killed processes may take to go.
const KILL_DEADLINE: Duration = Duration::from_secs(3);
/// How long what the shim started may take to see that it has gone.
const LOGGER_GRACE: Duration = Duration::from_millis(500);
/// How long a shim that is on its way out may take to let go of its pod: its
/// disconnecting is what makes containerd call.
const SHIM_GRACE: Duration = Duration::from_millis(500);
/// How long a dead shim's newest child may take to reach its program.
const ORPHAN_GRACE: Duration = Duration::from_secs(2);
/// How long another's cleaning of the same pod may take, without a deadline.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

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
    /// Other containers of the pod that died with it: their exits are not on
    /// record, so nobody has been told. Their `TaskExit` and `TaskDelete` are to
    /// be published, with 137 and now.
    pub members: Vec<Member>,
}

/// A container that died with its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub id: String,
    /// Its stand-in's pid, 0 when there is no record of one.
    pub pid: u32,
}

/// Cleans up container or pod `id` of `namespace` below `root`
/// ([`super::directory::RUN_ROOT`]): exactly what belongs to it and nothing of
/// its siblings. While a live shim holds the pod this reports and touches
/// nothing: the shim answers for it. The VM dies only if `id` is the pod
/// itself. Idempotent, and resumable after a kill at any point; an unknown id
/// is clean already. Waits until `deadline` at most.
pub fn cleanup(
    root: &Path,
    namespace: &str,
    id: &str,
    deadline: Deadline,
) -> Result<Deleted, Error> {
    let pod = PodPaths::below(root, namespace, id)?;
    if pod.directory().exists() {
        return cleanup_pod(&pod, id, deadline);
    }
    for pod in pods(root, namespace) {
        let record = Record::read(&pod.record());
        // A sibling pod's broken record is not this container's concern.
        if let Ok(Some(record)) = record
            && record.containers.contains_key(id)
        {
            return cleanup_member(&pod, &record, id, deadline);
        }
    }
    Ok(Deleted::default())
}

/// A pod whose shim has died.
#[derive(Debug)]
pub struct Orphan {
    /// Which.
    pub pod: PodPaths,
    shim: Process,
}

/// The pods of a namespace whose shim is dead. containerd runs `delete` for
/// them, once; what that does not finish is here after it.
pub fn orphans(root: &Path, namespace: &str) -> Vec<Orphan> {
    let orphan = |pod: PodPaths| {
        let shim = Record::read(&pod.record()).ok()??.shim?;
        shim.open().is_none().then_some(Orphan { pod, shim })
    };
    pods(root, namespace)
        .into_iter()
        .filter_map(orphan)
        .collect()
}

impl Orphan {
    /// Removes everything of it and returns the `poststop` hooks that failed;
    /// `None` when another is at it, has done it, or has the pod's name by now.
    pub fn remove(&self, deadline: Deadline) -> Result<Option<Vec<hooks::Error>>, Error> {
        let _lock = match self.pod.lock_existing(Duration::ZERO) {
            Ok(Some(lock)) => lock,
            Ok(None) | Err(directory::Error::Held { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut record = read(&self.pod)?;
        if record.shim != Some(self.shim) {
            return Ok(None);
        }
        undo_pod(&self.pod, &mut record, deadline).map(Some)
    }
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
        pid: container.map_or(0, stand_in_pid),
        exit: container.and_then(|container| container.exit),
        ..Deleted::default()
    }
}

fn stand_in_pid(container: &Container) -> u32 {
    container.stand_ins.get("").map_or(0, |process| process.pid)
}

fn cleanup_pod(pod: &PodPaths, id: &str, deadline: Deadline) -> Result<Deleted, Error> {
    let known = read(pod)?;
    let patience = if is_dead(&known) {
        // Another `delete` may be at it, or a process that the killed shim was
        // just making, which has the shim's descriptors, the lock among them,
        // until it executes its program.
        deadline.within(LONGEST_WAIT)
    } else {
        deadline.within(SHIM_GRACE)
    };
    let Some((_lock, mut record)) = take_over(pod, patience)? else {
        return Ok(report(&known, id));
    };
    let mut deleted = report(&record, id);
    let untold =
        |(other, container): &(&String, &Container)| *other != id && container.exit.is_none();
    let others = record.containers.iter().filter(untold);
    deleted.members = others
        .map(|(other, container)| Member {
            id: other.clone(),
            pid: stand_in_pid(container),
        })
        .collect();
    deleted.hook_failures = undo_pod(pod, &mut record, deadline)?;
    Ok(deleted)
}

fn cleanup_member(
    pod: &PodPaths,
    known: &Record,
    id: &str,
    deadline: Deadline,
) -> Result<Deleted, Error> {
    let patience = if is_dead(known) {
        deadline.within(ORPHAN_GRACE)
    } else {
        Duration::ZERO
    };
    let (_lock, mut record) = match take_over(pod, patience) {
        Ok(Some(taken)) => taken,
        // Whoever cleans up the pod, cleans up its members.
        Ok(None) | Err(Error::Directory(directory::Error::Held { .. })) => {
            return Ok(report(known, id));
        }
        Err(error) => return Err(error),
    };
    let mut deleted = report(&record, id);
    deleted.hook_failures = undo_container(pod, &mut record, id, deadline)?;
    Ok(deleted)
}

fn read(pod: &PodPaths) -> Result<Record, Error> {
    Ok(Record::read(&pod.record())?.unwrap_or_else(Record::new))
}

fn is_dead(record: &Record) -> bool {
    record.shim.is_some_and(|shim| shim.open().is_none())
}

/// Takes a pod that its shim has left, with its record; `None` when it is gone,
/// or a live shim still has it after `patience`.
///
/// # Errors
/// [`directory::Error::Held`] when the shim is dead and another has it.
fn take_over(pod: &PodPaths, patience: Duration) -> Result<Option<(PodLock, Record)>, Error> {
    match pod.lock_existing(patience) {
        Ok(None) => Ok(None),
        Ok(Some(lock)) => Ok(Some((lock, read(pod)?))),
        Err(directory::Error::Held { .. }) if !is_dead(&read(pod)?) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Removes everything of a pod, its directory last. The caller holds the pod
/// and is not in its cgroup.
pub(super) fn undo_pod(
    pod: &PodPaths,
    record: &mut Record,
    deadline: Deadline,
) -> Result<Vec<hooks::Error>, Error> {
    if let Some(cgroup) = &record.cgroup {
        cgroup::kill_vm(&cgroup.path, deadline.within(KILL_DEADLINE))?;
    }
    let mut failures = Vec::new();
    for id in record.containers.keys().cloned().collect::<Vec<_>>() {
        failures.extend(undo_container(pod, record, &id, deadline)?);
    }
    share::remove(&pod.share())?;
    for number in 0..directory::MAX_REMOTE_SHARES {
        share::remove(&pod.remote_share(number))?;
    }
    if record.network_namespace {
        netns::remove(&pod.network_namespace())?;
    }
    if let Some(cgroup) = &record.cgroup {
        let grace = deadline.within(LOGGER_GRACE);
        cgroup::drain_shim(&cgroup.path, grace, deadline.within(KILL_DEADLINE))?;
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
fn undo_container(
    pod: &PodPaths,
    record: &mut Record,
    id: &str,
    deadline: Deadline,
) -> Result<Vec<hooks::Error>, Error> {
    let Some(poststop) = dismantle_container(pod, record, id, deadline)? else {
        return Ok(Vec::new());
    };
    let failures = poststop.run_all(deadline)?;
    // Only now: killed during the hooks, the next run runs them again.
    forget_container(pod, record, id)?;
    Ok(failures)
}

/// Removes everything of one container but what the record says of it. Its
/// `poststop` hooks, none if they are not due, are to run before
/// [`forget_container`]. `None` when it is not there.
pub(super) fn dismantle_container(
    pod: &PodPaths,
    record: &Record,
    id: &str,
    deadline: Deadline,
) -> Result<Option<Batch>, Error> {
    let Some(container) = record.containers.get(id) else {
        return Ok(None);
    };
    for stand_in in container.stand_ins.values() {
        // Until it has ended, its own mount namespace keeps the root file
        // system mounted, which the next container may want to mount again.
        stand_in.kill(deadline.within(KILL_DEADLINE));
    }
    share::remove_container(&pod.share(), id)?;
    Ok(Some(poststop(id, container)))
}

/// Strikes a container off the record.
pub(super) fn forget_container(pod: &PodPaths, record: &mut Record, id: &str) -> Result<(), Error> {
    record.containers.remove(id);
    Ok(record.write(&pod.record())?)
}

fn poststop(id: &str, container: &Container) -> Batch {
    let hooks = if container.poststop_due {
        container.poststop.clone()
    } else {
        Vec::new()
    };
    Batch {
        kind: "poststop",
        hooks,
        state: State {
            oci_version: container.oci_version.clone(),
            id: id.to_owned(),
            status: Status::Stopped,
            pid: None,
            bundle: container.bundle.clone(),
            annotations: container.annotations.clone(),
        },
    }
}
