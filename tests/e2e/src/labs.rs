//! The nodes that the checks of one run share, each check alone in one.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};
use bulkhead_node::Mode;

use crate::{lab::Lab, stand_ins};

/// An emulated node may die of its emulation (see [`Labs::with`]) so often in
/// one run; more is no accident.
const EMULATOR_DEATHS: usize = 2;

/// A fixed number of nodes.
pub struct Labs {
    state: Mutex<State>,
    returned: Condvar,
}

struct State {
    free: Vec<Lab>,
    deaths: usize,
}

impl Labs {
    /// Brings `count` nodes up.
    ///
    /// # Errors
    /// When one does not come up.
    pub fn open(count: usize) -> Result<Self> {
        let free: Result<Vec<_>> = (0..count).map(|_| Lab::open()).collect();
        Ok(Self {
            state: Mutex::new(State {
                free: free?,
                deaths: 0,
            }),
            returned: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Lab {
        let mut state = self.state();
        loop {
            if let Some(lab) = state.free.pop() {
                return lab;
            }
            state = self
                .returned
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn give_back(&self, lab: Lab) {
        self.state().free.push(lab);
        self.returned.notify_one();
    }

    /// Runs a check in a node of its own. After one that fails the next finds a
    /// fresh node, so that it meets nothing that was left.
    ///
    /// When the kernel of an *emulated* node dies, the check is run once more,
    /// and that is printed: QEMU's emulation of SVM is known to crash it. A
    /// kernel on hardware has no such excuse.
    ///
    /// # Errors
    /// The check's own, or that no node could be had.
    pub fn with(&self, name: &str, check: impl Fn(&Lab) -> Result<()>) -> Result<()> {
        let mut lab = self.take();
        let result = self.attempt(name, &mut lab, check);
        self.give_back(lab);
        result
    }

    fn attempt(&self, name: &str, lab: &mut Lab, check: impl Fn(&Lab) -> Result<()>) -> Result<()> {
        let Err(error) = check(lab) else {
            return Ok(());
        };
        let died = lab.node().mode() == Mode::Emulated && lab.node().check().is_err();
        if let Err(renewing) = lab.renew() {
            return Err(error.context(renewing));
        }
        if !died || !self.excuses_death() {
            return Err(error);
        }
        println!("NODE DIED in {name}, which is run again: {error:#}");
        check(lab)
    }

    fn excuses_death(&self) -> bool {
        let mut state = self.state();
        state.deaths += 1;
        state.deaths <= EMULATOR_DEATHS
    }

    /// Ends all nodes. `complete` tells whether every check has run.
    ///
    /// # Errors
    /// When a node's kernel complained, or no announced pid was ever looked at.
    pub fn close(self, complete: bool) -> Result<()> {
        let state = self
            .state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let mut seen = 0;
        for lab in state.free {
            seen += stand_ins::seen(&lab)?;
            lab.close()?;
        }
        println!(
            "stand-ins: {seen} announced pids looked at; nodes that died: {}",
            state.deaths
        );
        if complete && seen == 0 {
            bail!("no announced pid was looked at: the watch over them is broken");
        }
        Ok(())
    }
}
