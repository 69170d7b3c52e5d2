//! The containers of the pod, by identity.

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use agent_container::{Container, ContainerStdio, CreateError, CreateOptions, ParseError};
use agent_protocol::{
    POD_DIR, SHARE_DIR,
    api::{ProcessId, Stdio, stream_header::Kind},
};
use oci_spec::runtime::Spec;
use thiserror::Error;
use tokio::task::spawn_blocking;

use crate::{
    guest::CONTAINERS_CGROUP,
    pod,
    reaper::{Exit, ExitWatch, Reaper},
    stdio::{StreamTable, open_pipes},
};

/// Longest identity: what containerd allows.
const MAX_ID_BYTES: usize = 76;

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
    /// A later step failed.
    #[error("cannot {what} container {id:?}")]
    Operate {
        /// Which step.
        what: &'static str,
        /// As asked for.
        id: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
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
    id: String,
    pid: i32,
    rootfs: PathBuf,
    exit: ExitWatch,
    container: Mutex<Container>,
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

    /// Creates a container whose init waits to be started; returns its pid.
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
        let rootfs = rootfs_of(&spec)?;
        let reservation = self.reserve(id)?;
        let this = Arc::clone(self);
        let stdio = stdio.clone();
        let id = id.to_owned();
        let entry = spawn_blocking(move || this.create_blocking(id, &spec, rootfs, &stdio))
            .await
            .expect("creation does not panic")?;
        let pid = entry.pid;
        reservation.fill(entry);
        Ok(pid)
    }

    fn create_blocking(
        &self,
        id: String,
        spec: &Spec,
        rootfs: PathBuf,
        stdio: &Stdio,
    ) -> Result<Arc<Entry>, ContainerError> {
        let process = init_of(&id);
        let operate = |what, source: std::io::Error| ContainerError::Operate {
            what,
            id: id.clone(),
            source: source.into(),
        };
        let (for_process, mut ours) = if stdio.terminal {
            (ContainerStdio::Terminal, Vec::new())
        } else {
            let pipes = open_pipes(stdio).map_err(|source| operate("open pipes of", source))?;
            let [stdin, stdout, stderr] = pipes.process;
            let streams = ContainerStdio::Streams {
                stdin,
                stdout,
                stderr,
            };
            (streams, pipes.agent)
        };
        let creation = self.reaper.creation();
        let mut container = agent_container::create(CreateOptions {
            id: &id,
            spec,
            stdio: for_process,
            share_dir: Path::new(SHARE_DIR),
            pod_dir: Path::new(POD_DIR),
            cgroup_root: Path::new(CONTAINERS_CGROUP),
        })
        .map_err(|source| ContainerError::Create {
            id: id.clone(),
            source,
        })?;
        let exit = creation.watch(container.pid());
        for warning in container.warnings() {
            tracing::warn!(container = %id, "{warning}");
        }
        if let Some(console) = container.take_console() {
            match console.try_clone() {
                Ok(input) => ours = vec![(Kind::STDIN, input), (Kind::STDOUT, console)],
                Err(source) => {
                    if let Err(error) = container.delete() {
                        tracing::error!(container = %id, %error, "left behind");
                    }
                    return Err(operate("open terminal of", source));
                }
            }
        }
        self.streams.insert(&process, ours);
        Ok(Arc::new(Entry {
            pid: container.pid(),
            rootfs,
            exit,
            container: Mutex::new(container),
            id,
        }))
    }

    /// Runs the user's program; returns the init's pid.
    ///
    /// # Errors
    /// When it was started before, has ended, or cannot be executed.
    pub async fn start(&self, process: &ProcessId) -> Result<i32, ContainerError> {
        let entry = self.find(process)?;
        let pid = entry.pid;
        entry.with_container("start", Container::start).await?;
        Ok(pid)
    }

    /// Sends a signal to the init, or to every process of the container.
    ///
    /// # Errors
    /// When the process has ended or the signal does not exist.
    pub async fn signal(
        &self,
        process: &ProcessId,
        signal: i32,
        all: bool,
    ) -> Result<(), ContainerError> {
        let entry = self.find(process)?;
        if !all && entry.exit.borrow().is_some() {
            return Err(ContainerError::Ended {
                id: entry.id.clone(),
            });
        }
        entry
            .with_container("signal", move |container| {
                if all {
                    container.signal_all(signal)
                } else {
                    container.signal(signal)
                }
            })
            .await
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn wait(&self, process: &ProcessId) -> Result<Exit, ContainerError> {
        let mut exit = self.find(process)?.exit.clone();
        let ended = exit
            .wait_for(Option::is_some)
            .await
            .expect("the reaper keeps the sender until the end");
        Ok(ended.expect("waited for"))
    }

    /// Closes the standard input of a process.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn close_stdin(&self, process: &ProcessId) -> Result<(), ContainerError> {
        self.find(process)?;
        self.streams
            .close(&crate::stdio::StreamKey::new(process, Kind::STDIN));
        Ok(())
    }

    /// Pids of a container, as the guest's kernel numbers them.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn pids(&self, id: &str) -> Result<Vec<i32>, ContainerError> {
        let entry = self.find(&init_of(id))?;
        entry
            .with_container("list processes of", |container| container.pids())
            .await
    }

    /// Kills what is left of a container, writes its files back and forgets
    /// it. Succeeds with `None` when there is no such process.
    ///
    /// # Errors
    /// When the container cannot be taken apart or its data cannot be written
    /// back. It can be tried again.
    pub async fn delete(&self, process: &ProcessId) -> Result<Option<Exit>, ContainerError> {
        let Ok(entry) = self.find(process) else {
            return Ok(None);
        };
        entry.with_container("delete", Container::delete).await?;
        let exit = *entry.exit.borrow();
        let (id, rootfs) = (entry.id.clone(), entry.rootfs.clone());
        spawn_blocking(move || pod::write_back(&rootfs))
            .await
            .expect("writing back does not panic")
            .map_err(|source| ContainerError::Operate {
                what: "write back the files of",
                id,
                source: source.into(),
            })?;
        self.streams.remove(process);
        self.lock().remove(&process.container_id);
        Ok(exit)
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

    fn find(&self, process: &ProcessId) -> Result<Arc<Entry>, ContainerError> {
        let not_found = || ContainerError::NotFound {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
        };
        if !process.exec_id.is_empty() {
            return Err(not_found());
        }
        self.lock()
            .get(&process.container_id)
            .and_then(Clone::clone)
            .ok_or_else(not_found)
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

impl Entry {
    /// Runs a blocking operation on the container, one at a time.
    async fn with_container<T, E>(
        self: &Arc<Self>,
        what: &'static str,
        operation: impl FnOnce(&mut Container) -> Result<T, E> + Send + 'static,
    ) -> Result<T, ContainerError>
    where
        T: Send + 'static,
        E: std::error::Error + Send + Sync + 'static,
    {
        let entry = Arc::clone(self);
        spawn_blocking(move || {
            let mut container = entry
                .container
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            operation(&mut container)
        })
        .await
        .expect("container operations do not panic")
        .map_err(|source| ContainerError::Operate {
            what,
            id: self.id.clone(),
            source: source.into(),
        })
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

fn rootfs_of(spec: &Spec) -> Result<PathBuf, ContainerError> {
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
        Ok(path)
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
    fn rootfs_of_path_below_the_share_is_taken() {
        let path = format!("{SHARE_DIR}/containers/a/rootfs");
        assert_eq!(
            rootfs_of(&spec_with_root(&path)).expect("taken"),
            PathBuf::from(path)
        );
    }

    #[test]
    fn rootfs_of_path_that_climbs_out_of_the_share_is_refused() {
        let spec = spec_with_root(&format!("{SHARE_DIR}/../../../etc"));
        assert!(matches!(
            rootfs_of(&spec),
            Err(ContainerError::Rootfs { .. })
        ));
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
