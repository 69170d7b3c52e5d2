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

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::kernel_calls::{EndedChild, reap_child};

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
            match reap_child() {
                Ok(Some(child)) => self.ended(child.pid, exit_status(child)),
                Ok(None) => return,
                Err(error) => match error.raw_os_error() {
                    Some(libc::ECHILD) => return,
                    Some(libc::EINTR) => {}
                    // Nothing was reaped: the next SIGCHLD tries again.
                    _ => {
                        tracing::error!(%error, "cannot reap");
                        return;
                    }
                },
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

/// As shells have it, also for the real-time signals.
fn exit_status(child: EndedChild) -> u32 {
    let status = child.status.cast_unsigned();
    match child.code {
        libc::CLD_EXITED => status & 0xff,
        _ => 128 + status,
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

    #[tokio::test]
    #[expect(clippy::zombie_processes, reason = "the reaper waits for them")]
    async fn spawn_child_killed_by_a_real_time_signal_has_ended_with_its_number() {
        let reaper = Arc::new(Reaper::default());
        reaper.spawn().expect("listens");
        for (line, status) in [("kill -36 $$", 128 + 36), ("exit 7", 7)] {
            let creation = reaper.creation();
            let child = std::process::Command::new("sh")
                .args(["-c", line])
                .spawn()
                .expect("a shell");
            let mut exit = creation.watch(child.id().cast_signed());
            let seen = exit.wait_for(Option::is_some).await.expect("watched");
            assert_eq!(seen.map(|exit| exit.status), Some(status), "{line}");
        }
    }

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
