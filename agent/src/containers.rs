//! The containers of the pod, by identity.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use agent_container::{
    CgroupError, Container, ContainerStdio, CreateError, CreateOptions, ParseError, Process,
    SignalError, StartError,
};
use agent_protocol::{
    POD_DIR, SHARE_DIR,
    api::{ProcessId, Stdio, stream_header::Kind},
};
use oci_spec::runtime::Spec;
use thiserror::Error;
use tokio::{task::spawn_blocking, time::timeout};

use crate::{
    guest::CONTAINERS_CGROUP,
    pod::{self, PodError},
    reaper::{Exit, ExitWatch, Reaper},
    stdio::{Pipes, StreamKey, StreamTable, open_pipes},
};

/// Longest identity: what containerd allows.
const MAX_ID_BYTES: usize = 76;
/// How long a killed process, of which the cgroup knows no more, may take to be
/// reaped: the reaper has only to be scheduled.
const REAP_TIMEOUT: Duration = Duration::from_secs(1);

/// What a caller can be told about a container.
#[derive(Debug, Error)]
pub enum ContainerError {
    /// Not an identity.
    #[error(
        "container id {id:?}: need 1 to {MAX_ID_BYTES} letters, digits, '.', '_' or '-', and no leading '.'"
    )]
    Id {
        /// As asked for.
        id: String,
    },
    /// The OCI configuration cannot be read.
    #[error("the container's OCI configuration cannot be read")]
    Spec(#[source] ParseError),
    /// The root file system is not where the host puts it.
    #[error("root file system {path:?} is not below {SHARE_DIR}")]
    Rootfs {
        /// As asked for.
        path: PathBuf,
    },
    /// No such process.
    #[error("no process {exec_id:?} in container {container_id:?}")]
    NotFound {
        /// As asked for.
        container_id: String,
        /// As asked for.
        exec_id: String,
    },
    /// The identity is taken.
    #[error("container {id:?} exists already")]
    Exists {
        /// As asked for.
        id: String,
    },
    /// The process has ended.
    #[error("process of container {id:?} has already ended")]
    Ended {
        /// As asked for.
        id: String,
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
    #[error("container {id:?} is still being created")]
    Creating {
        /// As asked for.
        id: String,
    },
    /// A pipe or a descriptor of its terminal could not be had.
    #[error("cannot open the standard streams of container {id:?}")]
    Stdio {
        /// As asked for.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program does not run.
    #[error("cannot start container {id:?}")]
    Start {
        /// As asked for.
        id: String,
        /// Why.
        #[source]
        source: StartError,
    },
    /// The signal was not sent.
    #[error("cannot signal container {id:?}")]
    Signal {
        /// As asked for.
        id: String,
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

/// Every container of the pod.
pub struct Containers {
    reaper: Arc<Reaper>,
    streams: Arc<StreamTable>,
    /// `None` while a container is being created: its identity is taken.
    table: Mutex<HashMap<String, Option<Arc<Entry>>>>,
}

/// One container.
struct Entry {
    container: Arc<Container>,
    /// By exec id; the init's is empty.
    processes: HashMap<String, Running>,
    /// Held by the one deletion that is under way. Nothing else waits: a
    /// start that hangs in a file server must not keep the container from being
    /// signalled and killed.
    deletion: tokio::sync::Mutex<()>,
}

/// One process of a container.
#[derive(Clone)]
struct Running {
    process: Arc<Process>,
    exit: ExitWatch,
}

impl Containers {
    /// No containers yet.
    pub fn new(reaper: Arc<Reaper>, streams: Arc<StreamTable>) -> Self {
        Self {
            reaper,
            streams,
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
        spec_json: &[u8],
        stdio: &Stdio,
    ) -> Result<i32, ContainerError> {
        check_id(id)?;
        let spec = agent_container::parse(spec_json).map_err(ContainerError::Spec)?;
        check_rootfs(&spec)?;
        let reservation = self.reserve(id)?;
        let this = Arc::clone(self);
        let stdio = stdio.clone();
        let id = id.to_owned();
        let entry = blocking(move || this.create_blocking(&id, &spec, &stdio)).await?;
        let pid = entry.container.init().pid();
        reservation.fill(entry);
        Ok(pid)
    }

    fn create_blocking(
        &self,
        id: &str,
        spec: &Spec,
        stdio: &Stdio,
    ) -> Result<Arc<Entry>, ContainerError> {
        let no_stdio = |source| ContainerError::Stdio {
            id: id.to_owned(),
            source,
        };
        let (for_process, mut ours) = open_stdio(stdio).map_err(no_stdio)?;
        let creation = self.reaper.creation();
        let container = agent_container::create(CreateOptions {
            id,
            spec,
            stdio: for_process,
            share_dir: Path::new(SHARE_DIR),
            pod_dir: Path::new(POD_DIR),
            cgroup_root: Path::new(CONTAINERS_CGROUP),
        })
        .map_err(|source| ContainerError::Create {
            id: id.to_owned(),
            source,
        })?;
        let init = Running {
            process: Arc::clone(container.init()),
            exit: creation.watch(container.init().pid()),
        };
        for warning in container.warnings() {
            tracing::warn!(container = %id, "{warning}");
        }
        if let Some(console) = container.init().take_console() {
            match console.try_clone() {
                Ok(input) => ours = vec![(Kind::STDIN, input), (Kind::STDOUT, console)],
                Err(source) => {
                    if let Err(error) = container.delete() {
                        tracing::error!(container = %id, %error, "left behind");
                    }
                    return Err(no_stdio(source));
                }
            }
        }
        self.streams.insert(&init_of(id), ours);
        Ok(Arc::new(Entry {
            container: Arc::new(container),
            processes: HashMap::from([(String::new(), init)]),
            deletion: tokio::sync::Mutex::default(),
        }))
    }

    /// Runs the user's program; returns the process's pid.
    ///
    /// # Errors
    /// When it was started before, has ended, or cannot be executed.
    pub async fn start(&self, process: &ProcessId) -> Result<i32, ContainerError> {
        let running = self.find(process)?;
        let pid = running.process.pid();
        blocking(move || running.process.start())
            .await
            .map_err(|source| ContainerError::Start {
                id: process.container_id.clone(),
                source,
            })?;
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
                .map_err(|source| ContainerError::Cgroup {
                    what: "signal every process of",
                    id,
                    source,
                });
        }
        if running.exit.borrow().is_some() {
            return Err(ContainerError::Ended { id });
        }
        let sent = running.process.signal(signal);
        sent.map_err(|source| ContainerError::Signal { id, source })
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn wait(&self, process: &ProcessId) -> Result<Exit, ContainerError> {
        Ok(end_of(&mut self.find(process)?.exit).await)
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

    /// Pids of a container, as the guest's kernel numbers them.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn pids(&self, id: &str) -> Result<Vec<i32>, ContainerError> {
        let container = Arc::clone(&self.find_entry(&init_of(id))?.container);
        blocking(move || container.pids())
            .await
            .map_err(|source| ContainerError::Cgroup {
                what: "list the processes of",
                id: id.to_owned(),
                source,
            })
    }

    /// Kills what is left of a container, writes its files back and forgets
    /// it. Succeeds with `None` when there is no such process. To be run to its
    /// end, as [`Self::create`].
    ///
    /// # Errors
    /// When the container is being created, cannot be taken apart, or its data
    /// cannot be written back. It can be tried again.
    pub async fn delete(&self, process: &ProcessId) -> Result<Option<Exit>, ContainerError> {
        let mut running = match self.find(process) {
            Err(ContainerError::NotFound { .. }) => return Ok(None),
            found => found?,
        };
        let entry = self.find_entry(process)?;
        let _one_at_a_time = entry.deletion.lock().await;
        let id = &process.container_id;
        if self.holds(id, &entry) {
            self.take_apart(id, &entry, &mut running.exit).await?;
            self.streams.remove(process);
            self.lock().remove(id);
        }
        let exit = *running.exit.borrow();
        Ok(exit)
    }

    /// After it nothing of the container is left in the guest but its entry.
    async fn take_apart(
        &self,
        id: &str,
        entry: &Entry,
        exit: &mut ExitWatch,
    ) -> Result<(), ContainerError> {
        let container = Arc::clone(&entry.container);
        blocking(move || container.delete())
            .await
            .map_err(|source| ContainerError::Cgroup {
                what: "delete",
                id: id.to_owned(),
                source,
            })?;
        // The caller is told how the init ended, and it has: it is about to be reaped.
        if timeout(REAP_TIMEOUT, end_of(exit)).await.is_err() {
            tracing::error!(container = %id, "the init is gone but not reaped");
        }
        let container = Arc::clone(&entry.container);
        blocking(move || pod::write_back(container.root(), container.bind_sources()))
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

    /// Deletes every container, as far as each can be.
    pub async fn delete_all(&self) {
        for id in self.ids() {
            if let Err(error) = self.delete(&init_of(&id)).await {
                tracing::error!(container = %id, %error, "left behind");
            }
        }
    }

    fn find(&self, process: &ProcessId) -> Result<Running, ContainerError> {
        let entry = self.find_entry(process)?;
        let running = entry.processes.get(&process.exec_id);
        running.cloned().ok_or_else(|| not_found(process))
    }

    fn find_entry(&self, process: &ProcessId) -> Result<Arc<Entry>, ContainerError> {
        match self.lock().get(&process.container_id) {
            Some(Some(entry)) => Ok(Arc::clone(entry)),
            Some(None) => Err(ContainerError::Creating {
                id: process.container_id.clone(),
            }),
            None => Err(not_found(process)),
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
            return Err(ContainerError::Exists { id: id.to_owned() });
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

fn init_of(container_id: &str) -> ProcessId {
    ProcessId {
        container_id: container_id.to_owned(),
        ..ProcessId::default()
    }
}

fn not_found(process: &ProcessId) -> ContainerError {
    ContainerError::NotFound {
        container_id: process.container_id.clone(),
        exec_id: process.exec_id.clone(),
    }
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

/// What the init gets, and our ends of it; those of a terminal come later.
fn open_stdio(wanted: &Stdio) -> io::Result<(ContainerStdio, Vec<(Kind, OwnedFd)>)> {
    if wanted.terminal {
        return Ok((ContainerStdio::Terminal, Vec::new()));
    }
    let Pipes { process, agent } = open_pipes(wanted)?;
    let [stdin, stdout, stderr] = process;
    let streams = ContainerStdio::Streams {
        stdin,
        stdout,
        stderr,
    };
    Ok((streams, agent))
}

/// An identity becomes a directory and a cgroup: it must be one plain name.
fn check_id(id: &str) -> Result<(), ContainerError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let fits = (1..=MAX_ID_BYTES).contains(&id.len());
    if fits && !id.starts_with('.') && id.bytes().all(plain) {
        Ok(())
    } else {
        Err(ContainerError::Id { id: id.to_owned() })
    }
}

fn check_rootfs(spec: &Spec) -> Result<(), ContainerError> {
    let path = spec
        .root()
        .as_ref()
        .map(|root| root.path().clone())
        .unwrap_or_default();
    let inside = path.strip_prefix(SHARE_DIR).is_ok_and(|rest| {
        rest.components()
            .all(|part| matches!(part, Component::Normal(_)))
    });
    if inside {
        Ok(())
    } else {
        Err(ContainerError::Rootfs { path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{RootBuilder, SpecBuilder};
    use proptest::prelude::*;

    fn spec_with_root(path: &str) -> Spec {
        let root = RootBuilder::default().path(path).build().expect("root");
        SpecBuilder::default().root(root).build().expect("spec")
    }

    #[test]
    fn check_rootfs_path_below_the_share_is_taken() {
        let path = format!("{SHARE_DIR}/containers/a/rootfs");
        assert!(check_rootfs(&spec_with_root(&path)).is_ok());
    }

    #[test]
    fn check_rootfs_path_that_climbs_out_of_the_share_is_refused() {
        let spec = spec_with_root(&format!("{SHARE_DIR}/../../../etc"));
        assert!(matches!(
            check_rootfs(&spec),
            Err(ContainerError::Rootfs { .. })
        ));
    }

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

    proptest! {
        #[test]
        fn check_id_what_passes_is_one_path_component(id in "\\PC{0,90}") {
            if check_id(&id).is_ok() {
                let parts: Vec<_> = Path::new(&id).components().collect();
                prop_assert_eq!(parts.len(), 1);
                prop_assert!(matches!(parts[0], Component::Normal(_)));
            }
        }
    }
}
