//! The containers of the pod, by identity.

mod creation;
mod entry;
mod error;
mod identity;

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use agent_container::{CgroupError, Container, Figures, SignalError};
use agent_protocol::api::{ProcessId, Stdio, stream_header::Kind};
use oci_spec::runtime::Spec;
use tokio::{task::spawn_blocking, time::timeout};

use crate::{
    pid_namespaces::{PidNamespaces, Shared},
    pod,
    reaper::{Exit, ExitWatch, Reaper},
    stdio::{StreamKey, StreamTable},
};

use entry::{Entry, Running};
pub use error::ContainerError;
use identity::{check_id, check_rootfs, init_of};

/// How long a killed process, of which the cgroup knows no more, may take to be
/// reaped: the reaper has only to be scheduled.
const REAP_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a killed exec may take to end, as [`Container::delete`] gives a container.
///
/// [`Container::delete`]: agent_container::Container::delete
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Every container of the pod.
pub struct Containers {
    reaper: Arc<Reaper>,
    streams: Arc<StreamTable>,
    pid_namespaces: Arc<PidNamespaces>,
    /// `None` while a container is being created: its identity is taken.
    table: Mutex<HashMap<String, Option<Arc<Entry>>>>,
}

impl Containers {
    /// No containers yet.
    pub fn new(reaper: Arc<Reaper>, streams: Arc<StreamTable>) -> Self {
        Self {
            reaper,
            streams,
            pid_namespaces: Arc::default(),
            table: Mutex::default(),
        }
    }

    /// Creates a container whose init waits to be started; returns its pid. To be
    /// run to its end: dropped half-way, the container exists and nobody knows it.
    ///
    /// # Errors
    /// When the identity is taken or the configuration cannot be a container.
    /// Nothing of it is then left.
    pub async fn create(
        self: &Arc<Self>,
        id: &str,
        bundle: &Path,
        spec_json: &[u8],
        stdio: &Stdio,
    ) -> Result<i32, ContainerError> {
        check_id(id)?;
        let spec = agent_container::parse(spec_json).map_err(ContainerError::Spec)?;
        check_rootfs(&spec)?;
        let reservation = self.reserve(id)?;
        let this = Arc::clone(self);
        let stdio = stdio.clone();
        let (id, bundle) = (id.to_owned(), bundle.to_owned());
        let made = blocking(move || {
            this.share_pid_namespace(&spec)?;
            creation::create(&this.reaper, &this.streams, &id, &bundle, &spec, &stdio)
        });
        let entry = made.await?;
        let pid = entry.container.init().pid();
        reservation.fill(Arc::new(entry));
        Ok(pid)
    }

    /// Provides the PID namespace of another that a configuration names. Blocks.
    fn share_pid_namespace(&self, spec: &Spec) -> Result<(), ContainerError> {
        let Some(shared) = Shared::asked(spec) else {
            return Ok(());
        };
        let held = match &shared {
            Shared::Pod => self.pid_namespaces.hold_pod(),
            Shared::Of(id) => {
                check_id(id)?;
                let pid = self.running(id)?.init().pid().unsigned_abs();
                let held = self.pid_namespaces.hold_of(id, pid);
                // The pid meant that container until here, or it must not be joined.
                self.running(id)
                    .inspect_err(|_| self.pid_namespaces.let_go_of(id))?;
                held
            }
        };
        held.map_err(|source| ContainerError::PidNamespace { shared, source })
    }

    /// Creates a process in a container, which waits to be started; returns its
    /// pid. To be run to its end, as [`Self::create`].
    ///
    /// # Errors
    /// When the container is not there or does not run, the identity is taken,
    /// or the process cannot be made. Nothing of it is then left.
    pub async fn exec(
        self: &Arc<Self>,
        process: &ProcessId,
        process_json: &[u8],
        stdio: &Stdio,
    ) -> Result<i32, ContainerError> {
        check_id(&process.exec_id)?;
        let asked = agent_container::parse_process(process_json).map_err(ContainerError::Spec)?;
        let entry = self.find_entry(process)?;
        let reservation = entry.reserve(&process.exec_id)?;
        let this = Arc::clone(self);
        let (name, stdio) = (process.clone(), stdio.clone());
        let made = blocking(move || creation::exec(&this.reaper, &entry, &name, &asked, &stdio));
        let (running, ours) = made.await?;
        let pid = running.process.pid();
        reservation.fill(running, || self.streams.insert(process, ours))?;
        Ok(pid)
    }

    /// Runs the user's program; returns the process's pid.
    ///
    /// # Errors
    /// When it was started before, has ended, or cannot be executed; or the
    /// container is paused, where it could not act on it.
    pub async fn start(&self, process: &ProcessId) -> Result<i32, ContainerError> {
        let entry = self.find_entry(process)?;
        let running = entry.find(&process.exec_id)?;
        let pid = running.process.pid();
        let name = process.into();
        blocking(move || match entry.container.is_paused() {
            Ok(true) => Err(ContainerError::Paused { process: name }),
            // A container that is gone tells by its process.
            Ok(false) | Err(_) => running.process.start().map_err(|source| {
                let process = name;
                ContainerError::Start { process, source }
            }),
        })
        .await?;
        Ok(pid)
    }

    /// Sends a signal to a process, or to every process of the container.
    ///
    /// # Errors
    /// When the process has ended or the signal does not exist.
    pub async fn signal(
        &self,
        process: &ProcessId,
        signal: i32,
        all: bool,
    ) -> Result<(), ContainerError> {
        let id = process.container_id.clone();
        let running = self.find(process)?;
        if all {
            let container = Arc::clone(&self.find_entry(process)?.container);
            return blocking(move || container.signal_all(signal))
                .await
                .map_err(|source| cgroup_failed("signal every process of", &id, source));
        }
        if running.exit.borrow().is_some() {
            let process = process.into();
            return Err(ContainerError::Ended { process });
        }
        let sent = running.process.signal(signal);
        sent.map_err(|source| ContainerError::Signal {
            process: process.into(),
            source,
        })
    }

    /// Waits for the end of a process. Tells also how many processes of its
    /// container the OOM killer had ended by then.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn wait(&self, process: &ProcessId) -> Result<(Exit, u64), ContainerError> {
        let entry = self.find_entry(process)?;
        let exit = end_of(&mut entry.find(&process.exec_id)?.exit).await;
        Ok((exit, entry.oom_kills()))
    }

    /// Closes the standard input of a process.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn close_stdin(&self, process: &ProcessId) -> Result<(), ContainerError> {
        self.find(process)?;
        self.streams.close(&StreamKey::new(process, Kind::STDIN));
        Ok(())
    }

    /// Sets the size of a process's terminal in characters.
    ///
    /// # Errors
    /// When there is no such process, or it has no terminal.
    pub fn resize(
        &self,
        process: &ProcessId,
        rows: u16,
        columns: u16,
    ) -> Result<(), ContainerError> {
        let resized = self.find(process)?.process.resize_terminal(rows, columns);
        resized.map_err(|source| ContainerError::Resize {
            process: process.into(),
            source,
        })
    }

    /// Stops every process of a container and writes its files back to the host,
    /// which then has all that it wrote. To be run to its end.
    ///
    /// # Errors
    /// When it does not run, cannot be stopped, or its data cannot be written
    /// back. It then goes on.
    pub async fn pause(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.running(id)?;
        let id = id.to_owned();
        blocking(move || {
            container
                .pause()
                .map_err(|source| cgroup_failed("pause", &id, source))?;
            let synced = pod::sync_container(container.root(), container.bind_sources());
            synced.map_err(|source| {
                if let Err(error) = container.resume() {
                    tracing::error!(container = %id, %error, "left paused");
                }
                ContainerError::WriteBack { id, source }
            })
        })
        .await
    }

    /// Lets a paused container go on. Succeeds when it is not paused.
    ///
    /// # Errors
    /// When it does not run or cannot be woken.
    pub async fn resume(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.running(id)?;
        blocking(move || container.resume())
            .await
            .map_err(|source| cgroup_failed("resume", id, source))
    }

    /// Changes limits of a container, all that are named or none. To be run to
    /// its end.
    ///
    /// # Errors
    /// When it does not run, or a limit is not supported or not taken.
    pub async fn update(&self, id: &str, resources_json: &[u8]) -> Result<(), ContainerError> {
        let resources = agent_container::parse_resources(resources_json);
        let resources = resources.map_err(ContainerError::Spec)?;
        let container = self.running(id)?;
        blocking(move || container.update(&resources))
            .await
            .map_err(|source| ContainerError::Update {
                id: id.to_owned(),
                source,
            })
    }

    /// What a container uses and is limited to.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn figures(&self, id: &str) -> Result<Figures, ContainerError> {
        let container = Arc::clone(&self.find_entry(&init_of(id))?.container);
        blocking(move || container.figures())
            .await
            .map_err(|source| cgroup_failed("read the figures of", id, source))
    }

    /// Pids of a container, as the guest's kernel numbers them.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn pids(&self, id: &str) -> Result<Vec<i32>, ContainerError> {
        let container = Arc::clone(&self.find_entry(&init_of(id))?.container);
        blocking(move || container.pids())
            .await
            .map_err(|source| cgroup_failed("list the processes of", id, source))
    }

    /// Kills a process and forgets it; with an init all that is left of its
    /// container, whose files are written back. Succeeds with `None` when there
    /// is no such process. To be run to its end, as [`Self::create`].
    ///
    /// # Errors
    /// When it is being created, cannot be killed or taken apart, or its data
    /// cannot be written back. It can be tried again.
    pub async fn delete(&self, process: &ProcessId) -> Result<Option<Exit>, ContainerError> {
        let found = self.find_entry(process);
        let found = found.and_then(|entry| Ok((entry.find(&process.exec_id)?, entry)));
        let (running, entry) = match found {
            Err(ContainerError::NotFound { .. }) => return Ok(None),
            found => found?,
        };
        if process.exec_id.is_empty() {
            self.delete_container(process, &entry, running).await
        } else {
            self.delete_exec(process, &entry, running).await.map(Some)
        }
    }

    async fn delete_container(
        &self,
        name: &ProcessId,
        entry: &Arc<Entry>,
        mut init: Running,
    ) -> Result<Option<Exit>, ContainerError> {
        let _one_at_a_time = entry.deletion.lock().await;
        let id = &name.container_id;
        if self.holds(id, entry) {
            let execs = entry.close();
            // For whoever still waits: the count goes with the cgroup.
            entry.oom_kills();
            self.take_apart(id, entry, &mut init.exit, &execs).await?;
            self.streams.remove(name);
            for (exec_id, _) in execs {
                self.streams.remove(&ProcessId {
                    exec_id,
                    ..name.clone()
                });
            }
            self.lock().remove(id);
        }
        let exit = *init.exit.borrow();
        Ok(exit)
    }

    async fn delete_exec(
        &self,
        name: &ProcessId,
        entry: &Entry,
        mut running: Running,
    ) -> Result<Exit, ContainerError> {
        match running.process.signal(libc::SIGKILL) {
            Ok(()) | Err(SignalError::Ended { .. }) => {}
            Err(source) => {
                return Err(ContainerError::Signal {
                    process: name.into(),
                    source,
                });
            }
        }
        let ended = timeout(KILL_TIMEOUT, end_of(&mut running.exit)).await;
        let exit = ended.map_err(|_| ContainerError::Alive {
            process: name.into(),
            seconds: KILL_TIMEOUT.as_secs(),
        })?;
        running.process.let_go();
        if entry.remove(&name.exec_id, &running) {
            self.streams.remove(name);
        }
        Ok(exit)
    }

    /// After it nothing of the container is left in the guest but its entry.
    async fn take_apart(
        &self,
        id: &str,
        entry: &Entry,
        init: &mut ExitWatch,
        execs: &[(String, Running)],
    ) -> Result<(), ContainerError> {
        let container = Arc::clone(&entry.container);
        blocking(move || container.delete())
            .await
            .map_err(|source| cgroup_failed("delete", id, source))?;
        // The caller is told how each ended, and it has: it is about to be reaped.
        let all_reaped = async {
            for (_, exec) in execs {
                exec.process.let_go();
                end_of(&mut exec.exit.clone()).await;
            }
            end_of(init).await;
        };
        if timeout(REAP_TIMEOUT, all_reaped).await.is_err() {
            tracing::error!(container = %id, "its processes are gone but not reaped");
        }
        let container = Arc::clone(&entry.container);
        let (namespaces, own_id) = (Arc::clone(&self.pid_namespaces), id.to_owned());
        let last = move || {
            namespaces.let_go_of(&own_id);
            pod::write_back(container.root(), container.bind_sources())
        };
        blocking(last)
            .await
            .map_err(|source| ContainerError::WriteBack {
                id: id.to_owned(),
                source,
            })
    }

    /// Identities of every container.
    pub fn ids(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// Identities of those that are paused.
    pub async fn paused_ids(&self) -> Vec<String> {
        let entries: Vec<_> = {
            let table = self.lock();
            let entries = table.iter();
            let entries = entries.filter_map(|(id, entry)| Some((id.clone(), entry.clone()?)));
            entries.collect()
        };
        blocking(move || {
            let paused = entries.into_iter();
            let paused = paused.filter(|(_, entry)| entry.container.is_paused().unwrap_or(false));
            paused.map(|(id, _)| id).collect()
        })
        .await
    }

    /// Deletes every container, as far as each can be.
    pub async fn delete_all(&self) {
        for id in self.ids() {
            if let Err(error) = self.delete(&init_of(&id)).await {
                tracing::error!(container = %id, %error, "left behind");
            }
        }
    }

    fn find(&self, process: &ProcessId) -> Result<Running, ContainerError> {
        self.find_entry(process)?.find(&process.exec_id)
    }

    /// A container whose init has not ended.
    fn running(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        let name = init_of(id);
        let entry = self.find_entry(&name)?;
        if entry.find("")?.exit.borrow().is_some() {
            let process = (&name).into();
            return Err(ContainerError::NotRunning { process });
        }
        Ok(Arc::clone(&entry.container))
    }

    fn find_entry(&self, process: &ProcessId) -> Result<Arc<Entry>, ContainerError> {
        match self.lock().get(&process.container_id) {
            Some(Some(entry)) => Ok(Arc::clone(entry)),
            Some(None) => Err(ContainerError::Creating {
                process: (&init_of(&process.container_id)).into(),
            }),
            None => Err(ContainerError::NotFound {
                process: process.into(),
            }),
        }
    }

    /// Whether the identity still means this container.
    fn holds(&self, id: &str, entry: &Arc<Entry>) -> bool {
        let table = self.lock();
        let held = table.get(id).and_then(Option::as_ref);
        held.is_some_and(|held| Arc::ptr_eq(held, entry))
    }

    fn reserve(self: &Arc<Self>, id: &str) -> Result<Reservation, ContainerError> {
        let mut table = self.lock();
        if table.contains_key(id) {
            let process = (&init_of(id)).into();
            return Err(ContainerError::Exists { process });
        }
        table.insert(id.to_owned(), None);
        Ok(Reservation {
            containers: Arc::clone(self),
            id: Some(id.to_owned()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Entry>>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Holds an identity while its container is being created.
struct Reservation {
    containers: Arc<Containers>,
    id: Option<String>,
}

impl Reservation {
    fn fill(mut self, entry: Arc<Entry>) {
        if let Some(id) = self.id.take() {
            self.containers.lock().insert(id, Some(entry));
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            self.containers.lock().remove(id);
        }
    }
}

fn cgroup_failed(what: &'static str, id: &str, source: CgroupError) -> ContainerError {
    let id = id.to_owned();
    ContainerError::Cgroup { what, id, source }
}

/// Runs what may block where that is allowed.
async fn blocking<T: Send + 'static>(operation: impl FnOnce() -> T + Send + 'static) -> T {
    spawn_blocking(operation)
        .await
        .expect("operations do not panic, and nobody cancels them")
}

async fn end_of(exit: &mut ExitWatch) -> Exit {
    let ended = exit
        .wait_for(Option::is_some)
        .await
        .expect("the reaper keeps the sender until the end");
    ended.expect("waited for")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containers() -> Arc<Containers> {
        let (reaper, streams) = (Arc::default(), Arc::default());
        Arc::new(Containers::new(reaper, streams))
    }

    #[tokio::test]
    async fn delete_while_it_is_being_created_is_told_from_success() {
        let containers = containers();
        let reservation = containers.reserve("a").expect("free");
        let refused = containers.delete(&init_of("a")).await;
        assert!(matches!(refused, Err(ContainerError::Creating { .. })));
        drop(reservation);
        let gone = containers.delete(&init_of("a")).await;
        assert_eq!(gone.expect("idempotent"), None);
    }
}
