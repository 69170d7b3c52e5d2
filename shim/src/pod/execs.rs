//! The processes of a container besides its init.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::process::Process;

/// A container's execs by their ids, from Exec to Delete.
#[derive(Debug, Default)]
pub struct Execs(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// `None` while it is being created.
    execs: BTreeMap<String, Option<Arc<Process>>>,
    /// The container has ended: none is added any more.
    closed: bool,
}

impl Execs {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an id, unless somebody has it.
    pub fn reserve(&self, exec_id: &str) -> Option<Reservation<'_>> {
        match self.known().execs.entry(exec_id.to_owned()) {
            Entry::Occupied(_) => None,
            Entry::Vacant(entry) => {
                entry.insert(None);
                Some(Reservation {
                    execs: self,
                    exec_id: exec_id.to_owned(),
                })
            }
        }
    }

    /// One that has been created.
    pub fn find(&self, exec_id: &str) -> Option<Arc<Process>> {
        self.known().execs.get(exec_id).cloned().flatten()
    }

    /// Those that have been created.
    pub fn all(&self) -> Vec<Arc<Process>> {
        self.known().execs.values().flatten().cloned().collect()
    }

    /// Those that have been created; no other follows.
    pub fn close(&self) -> Vec<Arc<Process>> {
        let mut known = self.known();
        known.closed = true;
        known.execs.values().flatten().cloned().collect()
    }

    /// Forgets one that was deleted.
    pub fn remove(&self, exec_id: &str) {
        self.known().execs.remove(exec_id);
    }
}

/// An id that nobody else can take while it is held.
pub struct Reservation<'a> {
    execs: &'a Execs,
    exec_id: String,
}

impl Reservation<'_> {
    /// Puts the exec into its place, after `added`; false if the container has
    /// ended meanwhile.
    pub fn fulfil(&self, exec: &Arc<Process>, added: impl FnOnce()) -> bool {
        let mut known = self.execs.known();
        if known.closed {
            return false;
        }
        // Before anybody can see it end.
        added();
        known
            .execs
            .insert(self.exec_id.clone(), Some(Arc::clone(exec)));
        true
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut known = self.execs.known();
        if matches!(known.execs.get(&self.exec_id), Some(None)) {
            known.execs.remove(&self.exec_id);
        }
    }
}
