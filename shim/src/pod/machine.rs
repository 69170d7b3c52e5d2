//! A pod's VM as its pod sees it: booting, ready, ended and why.

use tokio::sync::{mpsc, watch};

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Why, for the user.
    pub reason: String,
}

/// Where a VM stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Its processes run; the guest does not answer yet.
    Booting,
    /// The agent listens.
    Ready,
    /// It is gone, and so are its processes.
    Ended(End),
}

/// A VM. Clones are the same VM.
#[derive(Clone, Debug)]
pub struct Machine {
    state: watch::Receiver<State>,
    stop: mpsc::UnboundedSender<String>,
}

/// The other side of a [`Machine`]: whoever watches over its processes.
#[derive(Debug)]
pub struct Watcher {
    /// Set as the VM proceeds.
    pub state: watch::Sender<State>,
    /// Requests to end it at once, with the reason.
    pub stop: mpsc::UnboundedReceiver<String>,
}

impl Machine {
    /// A VM that is booting.
    pub fn new() -> (Self, Watcher) {
        let (state_sender, state) = watch::channel(State::Booting);
        let (stop, stop_receiver) = mpsc::unbounded_channel();
        let watcher = Watcher {
            state: state_sender,
            stop: stop_receiver,
        };
        (Self { state, stop }, watcher)
    }

    /// Waits until the agent listens.
    ///
    /// # Errors
    /// How the VM ended instead.
    pub async fn ready(&self) -> Result<(), End> {
        match self.wait(|state| *state != State::Booting).await {
            State::Ended(end) => Err(end),
            State::Booting | State::Ready => Ok(()),
        }
    }

    /// Waits until the VM is gone.
    pub async fn ended(&self) -> End {
        match self.wait(|state| matches!(state, State::Ended(_))).await {
            State::Ended(end) => end,
            State::Booting | State::Ready => unwatched(),
        }
    }

    /// How the VM ended, if it has.
    pub fn end(&self) -> Option<End> {
        match &*self.state.borrow() {
            State::Ended(end) => Some(end.clone()),
            State::Booting | State::Ready => None,
        }
    }

    /// Ends the VM at once, for `reason`. Idempotent; [`Machine::ended`] tells
    /// when it is done.
    pub fn stop(&self, reason: impl Into<String>) {
        // Nobody listens once it has ended.
        let _ = self.stop.send(reason.into());
    }

    async fn wait(&self, reached: impl FnMut(&State) -> bool) -> State {
        let mut state = self.state.clone();
        match state.wait_for(reached).await {
            Ok(state) => state.clone(),
            Err(_) => State::Ended(unwatched()),
        }
    }
}

/// The watcher went without a word: only when it panicked.
fn unwatched() -> End {
    End {
        reason: "the VM is no longer watched over".to_owned(),
    }
}
