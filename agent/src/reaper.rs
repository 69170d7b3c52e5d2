//! PID 1 reaps every process that ends, and tells whoever watches it.
//!
//! A container's init can end before its creator has learnt its pid. So while
//! any container is being created, the ends of processes that nobody watches
//! yet are kept; at all other times they are forgotten, because a kept pid
//! could be taken for a later process of the same number.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use nix::{
    errno::Errno,
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0..255 as returned, or 128 + N for death by signal N.
    pub status: u32,
    /// When it was reaped.
    pub at: SystemTime,
}

/// Where a watcher sees the end; `None` while the process lives.
pub type ExitWatch = watch::Receiver<Option<Exit>>;

/// Reaps the children of this process.
#[derive(Default)]
pub struct Reaper {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    watched: HashMap<i32, watch::Sender<Option<Exit>>>,
    unclaimed: HashMap<i32, Exit>,
    creations: usize,
}

impl Reaper {
    /// Reaps until the end of time. Must run before anything is created.
    ///
    /// # Errors
    /// When SIGCHLD cannot be listened to.
    pub fn spawn(self: &Arc<Self>) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        let reaper = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                reaper.reap_ended();
                children.recv().await;
            }
        });
        Ok(())
    }

    /// Announces that a process is about to be created, whose pid will be
    /// watched through the guard.
    pub fn creation(self: &Arc<Self>) -> Creation {
        self.lock().creations += 1;
        Creation {
            reaper: Arc::clone(self),
        }
    }

    fn reap_ended(&self) {
        loop {
            match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
                Ok(WaitStatus::Exited(pid, code)) => {
                    self.ended(pid.as_raw(), u32::from(code.to_le_bytes()[0]));
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    self.ended(pid.as_raw(), 128 + signal as u32);
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "cannot reap");
                    return;
                }
            }
        }
    }

    fn ended(&self, pid: i32, status: u32) {
        let exit = Exit {
            status,
            at: SystemTime::now(),
        };
        let mut state = self.lock();
        if let Some(watcher) = state.watched.remove(&pid) {
            watcher.send_replace(Some(exit));
        } else if state.creations > 0 {
            state.unclaimed.insert(pid, exit);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// While this lives, no end of a process is forgotten.
pub struct Creation {
    reaper: Arc<Reaper>,
}

impl Creation {
    /// Watches a process that was created since the guard was made.
    pub fn watch(&self, pid: i32) -> ExitWatch {
        let mut state = self.reaper.lock();
        if let Some(exit) = state.unclaimed.remove(&pid) {
            return watch::channel(Some(exit)).1;
        }
        let (sender, receiver) = watch::channel(None);
        state.watched.insert(pid, sender);
        receiver
    }
}

impl Drop for Creation {
    fn drop(&mut self) {
        let mut state = self.reaper.lock();
        state.creations -= 1;
        if state.creations == 0 {
            state.unclaimed.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watch_process_that_ended_before_its_pid_was_known_sees_the_end() {
        let reaper = Arc::new(Reaper::default());
        let creation = reaper.creation();
        reaper.ended(42, 7);
        let seen = creation.watch(42).borrow().map(|exit| exit.status);
        assert_eq!(seen, Some(7));
    }

    #[test]
    fn watch_pid_of_an_older_stranger_waits_for_its_own_end() {
        let reaper = Arc::new(Reaper::default());
        reaper.ended(42, 7);
        let creation = reaper.creation();
        let watch = creation.watch(42);
        assert_eq!(*watch.borrow(), None);
        reaper.ended(42, 9);
        assert_eq!(watch.borrow().map(|exit| exit.status), Some(9));
    }

    #[test]
    fn unclaimed_ends_are_forgotten_with_the_last_creation() {
        let reaper = Arc::new(Reaper::default());
        let (first, second) = (reaper.creation(), reaper.creation());
        reaper.ended(42, 7);
        drop(first);
        assert_eq!(reaper.lock().unclaimed.len(), 1);
        drop(second);
        assert!(reaper.lock().unclaimed.is_empty());
    }
}
