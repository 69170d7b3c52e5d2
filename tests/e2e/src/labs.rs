//! The nodes that the checks of one run share, each check alone in one.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::{lab::Lab, stand_ins};
use anyhow::{Result, bail};

/// A fixed number of nodes.
pub struct Labs {
    free: Mutex<Vec<Lab>>,
    returned: Condvar,
}

impl Labs {
    /// Brings `count` nodes up.
    ///
    /// # Errors
    /// When one does not come up.
    pub fn open(count: usize) -> Result<Self> {
        let free: Result<Vec<_>> = (0..count).map(|_| Lab::open()).collect();
        Ok(Self {
            free: Mutex::new(free?),
            returned: Condvar::new(),
        })
    }

    fn free(&self) -> MutexGuard<'_, Vec<Lab>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Lab {
        let mut free = self.free();
        loop {
            if let Some(lab) = free.pop() {
                return lab;
            }
            free = self
                .returned
                .wait(free)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn give_back(&self, lab: Lab) {
        self.free().push(lab);
        self.returned.notify_one();
    }

    /// Runs a check in a node of its own. After one that fails, its node's death
    /// included, the next finds a fresh node and meets nothing that was left.
    ///
    /// # Errors
    /// The check's own, or that no node could be had.
    pub fn with(&self, check: impl Fn(&Lab) -> Result<()>) -> Result<()> {
        let mut lab = self.take();
        let result = check(&lab).map_err(|error| match lab.renew() {
            Ok(()) => error,
            Err(renewing) => error.context(renewing),
        });
        self.give_back(lab);
        result
    }

    /// Ends all nodes. `complete` tells whether every check has run.
    ///
    /// # Errors
    /// When a node's kernel complained, or no announced pid was ever looked at.
    pub fn close(self, complete: bool) -> Result<()> {
        let free = self
            .free
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let mut seen = 0;
        for lab in free {
            seen += stand_ins::seen(&lab)?;
            lab.close()?;
        }
        println!("stand-ins: {seen} announced pids looked at");
        if complete && seen == 0 {
            bail!("no announced pid was looked at: the watch over them is broken");
        }
        Ok(())
    }
}
