//! Flow control of one stream: its sender holds credit, and the receiver gives back what it has used up.
//!
//! So a reader that is slow on stdout stops the command's stdout, as a pipe would, while stderr and signals still pass.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::{MAX_DATA, WINDOW};

/// The receiver gave back more than it was sent.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("peer returned credit for bytes that it was never sent")]
pub struct ExcessCredit;

#[derive(Debug)]
struct State {
    available: u32,
    closed: bool,
}

/// The sender's side of a stream's window.
#[derive(Debug)]
pub struct Credit {
    state: Mutex<State>,
    changed: Condvar,
}

impl Default for Credit {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                available: WINDOW,
                closed: false,
            }),
            changed: Condvar::new(),
        }
    }
}

impl Credit {
    /// Blocks until something may be sent and returns how much: from 1 to [`MAX_DATA`]. `None` once the stream is closed.
    pub fn wait(&self) -> Option<usize> {
        let guard = self
            .changed
            .wait_while(self.lock(), |state| state.available == 0 && !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        (!guard.closed).then(|| MAX_DATA.min(guard.available as usize))
    }

    /// Takes off what was sent: at most what [`Self::wait`] returned.
    pub fn spend(&self, bytes: usize) {
        let mut state = self.lock();
        state.available = state.available.saturating_sub(bytes as u32);
    }

    /// Adds what the receiver has given back.
    ///
    /// # Errors
    /// [`ExcessCredit`] when the window would grow beyond its size.
    pub fn give(&self, bytes: u32) -> Result<(), ExcessCredit> {
        let mut state = self.lock();
        state.available = state
            .available
            .checked_add(bytes)
            .filter(|available| *available <= WINDOW)
            .ok_or(ExcessCredit)?;
        self.changed.notify_all();
        Ok(())
    }

    /// Ends the stream: every waiter returns, now and later.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn wait_window_used_up_blocks_until_given() {
        let credit = Arc::new(Credit::default());
        credit.spend(WINDOW as usize);
        let waiting = {
            let credit = Arc::clone(&credit);
            thread::spawn(move || credit.wait())
        };
        credit.give(10).unwrap();
        assert_eq!(waiting.join().unwrap(), Some(10));
    }

    #[test]
    fn close_wakes_the_waiter() {
        let credit = Arc::new(Credit::default());
        credit.spend(WINDOW as usize);
        let waiting = {
            let credit = Arc::clone(&credit);
            thread::spawn(move || credit.wait())
        };
        credit.close();
        assert_eq!(waiting.join().unwrap(), None);
    }

    #[test]
    fn give_more_than_was_sent_is_refused() {
        let credit = Credit::default();
        credit.spend(5);
        assert_eq!(credit.give(6), Err(ExcessCredit));
        assert_eq!(Credit::default().give(u32::MAX), Err(ExcessCredit));
    }

    proptest! {
        #[test]
        fn under_way_never_exceeds_the_window(wishes in proptest::collection::vec(1usize..100_000, 1..50)) {
            let credit = Credit::default();
            let mut under_way = 0;
            for wish in wishes {
                if under_way == WINDOW as usize {
                    credit.give(under_way as u32).unwrap();
                    under_way = 0;
                }
                let allowed = credit.wait().unwrap();
                prop_assert!((1..=MAX_DATA).contains(&allowed));
                let sent = wish.min(allowed);
                credit.spend(sent);
                under_way += sent;
                prop_assert!(under_way <= WINDOW as usize);
            }
        }
    }
}
