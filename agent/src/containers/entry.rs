//! One container of the pod and its processes.

use std::{
    collections::{HashMap, hash_map},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use agent_container::{Container, Process};

use super::error::{ContainerError, ProcessName};
use crate::reaper::ExitWatch;

/// A process of a container.
#[derive(Clone)]
pub struct Running {
    pub process: Arc<Process>,
    pub exit: ExitWatch,
}

/// A container.
pub struct Entry {
    id: String,
    pub container: Arc<Container>,
    init: Running,
    execs: Mutex<Execs>,
    /// As last seen: the cgroup that counts them goes with the deletion.
    oom_kills: AtomicU64,
    /// Held by the one deletion that is under way. Nothing else waits: a
    /// start that hangs in a file server must not keep the container from being
    /// signalled and killed.
    pub deletion: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Execs {
    /// The container is being deleted: none comes any more.
    closed: bool,
    /// By exec id; `None` while it is being created: its identity is taken.
    table: HashMap<String, Option<Running>>,
}

impl Entry {
    pub fn new(id: &str, container: Container, init: Running) -> Self {
        Self {
            id: id.to_owned(),
            container: Arc::new(container),
            init,
            execs: Mutex::default(),
            oom_kills: AtomicU64::default(),
            deletion: tokio::sync::Mutex::default(),
        }
    }

    /// How many of its processes the OOM killer has ended. Reads a file of the
    /// kernel's, which does not block.
    pub fn oom_kills(&self) -> u64 {
        match self.container.oom_kills() {
            Ok(kills) => self
                .oom_kills
                .fetch_max(kills, Ordering::Relaxed)
                .max(kills),
            Err(error) => {
                tracing::error!(container = %self.id, %error, "OOM kills are not known");
                self.oom_kills.load(Ordering::Relaxed)
            }
        }
    }

    /// A process by its exec id; the init's is empty.
    pub fn find(&self, exec_id: &str) -> Result<Running, ContainerError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let process = self.name(exec_id);
        match self.lock().table.get(exec_id) {
            Some(Some(running)) => Ok(running.clone()),
            Some(None) => Err(ContainerError::Creating { process }),
            None => Err(ContainerError::NotFound { process }),
        }
    }

    /// Takes an exec id for a process that is about to be created.
    pub fn reserve(self: &Arc<Self>, exec_id: &str) -> Result<ExecReservation, ContainerError> {
        let process = self.name(exec_id);
        let mut execs = self.lock();
        if execs.closed {
            return Err(ContainerError::Deleting { process });
        }
        match execs.table.entry(exec_id.to_owned()) {
            hash_map::Entry::Occupied(_) => Err(ContainerError::Exists { process }),
            hash_map::Entry::Vacant(vacant) => {
                vacant.insert(None);
                drop(execs);
                Ok(ExecReservation {
                    entry: Arc::clone(self),
                    exec_id: exec_id.to_owned(),
                    filled: false,
                })
            }
        }
    }

    /// Forgets an exec; `false` when the identity means another by now.
    pub fn remove(&self, exec_id: &str, running: &Running) -> bool {
        let mut execs = self.lock();
        let held = execs.table.get(exec_id).and_then(Option::as_ref);
        let same = held.is_some_and(|held| Arc::ptr_eq(&held.process, &running.process));
        if same {
            execs.table.remove(exec_id);
        }
        same
    }

    /// Lets no exec be added any more; returns those that there are.
    pub fn close(&self) -> Vec<(String, Running)> {
        let mut execs = self.lock();
        execs.closed = true;
        let table = execs.table.iter();
        table
            .filter_map(|(id, running)| Some((id.clone(), running.clone()?)))
            .collect()
    }

    fn name(&self, exec_id: &str) -> ProcessName {
        ProcessName {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Execs> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Holds an exec id while its process is being created.
pub struct ExecReservation {
    entry: Arc<Entry>,
    exec_id: String,
    filled: bool,
}

impl ExecReservation {
    /// Adds the process, after `offer` has offered its streams. When the
    /// container is being deleted meanwhile, ends it instead.
    pub fn fill(mut self, running: Running, offer: impl FnOnce()) -> Result<(), ContainerError> {
        let mut execs = self.entry.lock();
        if execs.closed {
            // It is dead already, or dies with the container.
            running.process.let_go();
            let process = self.entry.name(&self.exec_id);
            return Err(ContainerError::Deleting { process });
        }
        offer();
        execs.table.insert(self.exec_id.clone(), Some(running));
        drop(execs);
        self.filled = true;
        Ok(())
    }
}

impl Drop for ExecReservation {
    fn drop(&mut self) {
        if !self.filled {
            self.entry.lock().table.remove(&self.exec_id);
        }
    }
}
