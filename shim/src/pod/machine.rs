//! A pod's VM as its pod sees it: booting, ready, ended and why.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use vmm_config::control::Request;
use vmm_config::{FdIndex, Network};

/// How long the monitor may take to change the VM: it waits for nobody's files,
/// nor for the guest.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

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
    memory_mib: watch::Receiver<u32>,
    stop: mpsc::UnboundedSender<String>,
    changes: mpsc::UnboundedSender<Change>,
}

/// A change of a running VM.
#[derive(Debug)]
pub struct Change {
    /// For the monitor.
    pub request: Request,
    /// What goes with it.
    pub descriptor: Option<OwnedFd>,
    /// The virtio slot in question, or the size, or why it cannot be.
    pub answer: oneshot::Sender<Result<u32, String>>,
}

/// The other side of a [`Machine`]: whoever watches over its processes.
#[derive(Debug)]
pub struct Watcher {
    /// Set as the VM proceeds.
    pub state: watch::Sender<State>,
    /// Set as its memory grows and shrinks.
    pub memory_mib: watch::Sender<u32>,
    /// Requests to end it at once, with the reason.
    pub stop: mpsc::UnboundedReceiver<String>,
    /// Changes of it, answered in their order.
    pub changes: mpsc::UnboundedReceiver<Change>,
}

impl Machine {
    /// A VM that is booting, with this memory.
    pub fn new(memory_mib: u32) -> (Self, Watcher) {
        let (state_sender, state) = watch::channel(State::Booting);
        let (memory_sender, memory_mib) = watch::channel(memory_mib);
        let (stop, stop_receiver) = mpsc::unbounded_channel();
        let (changes, changes_receiver) = mpsc::unbounded_channel();
        let watcher = Watcher {
            state: state_sender,
            memory_mib: memory_sender,
            stop: stop_receiver,
            changes: changes_receiver,
        };
        let machine = Self {
            state,
            memory_mib,
            stop,
            changes,
        };
        (machine, watcher)
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

    /// Puts a network device into the VM: frames go by `tap`. Returns its virtio
    /// slot.
    ///
    /// # Errors
    /// Why that cannot be.
    pub async fn add_network(&self, mac: [u8; 6], mtu: u16, tap: OwnedFd) -> Result<u32, String> {
        let network = Network {
            mac,
            mtu,
            tap: FdIndex(0),
        };
        self.change(Request::AddNetwork(network), Some(tap)).await
    }

    /// Takes a network device from the VM.
    ///
    /// # Errors
    /// Why that cannot be.
    pub async fn remove_network(&self, slot: u32) -> Result<(), String> {
        let request = Request::RemoveNetwork { slot };
        self.change(request, None).await.map(drop)
    }

    /// Asks for this much memory in all. The guest takes or gives it when it can:
    /// [`Machine::memory_mib`] tells. Returns the size that it was asked for, which
    /// is rounded up.
    ///
    /// # Errors
    /// Why that cannot be.
    pub async fn resize_memory(&self, size_mib: u32) -> Result<u32, String> {
        let request = Request::ResizeMemory { size_mib };
        self.change(request, None).await
    }

    /// Sees to it that there are so many vCPUs for the guest to start.
    ///
    /// # Errors
    /// Why that cannot be.
    pub async fn resize_vcpus(&self, count: u8) -> Result<(), String> {
        let request = Request::ResizeVcpus { count };
        self.change(request, None).await.map(drop)
    }

    /// How much memory it has, in MiB; told as it changes.
    pub fn memory_mib(&self) -> watch::Receiver<u32> {
        self.memory_mib.clone()
    }

    async fn change(&self, request: Request, descriptor: Option<OwnedFd>) -> Result<u32, String> {
        let (answer, answered) = oneshot::channel();
        let change = Change {
            request,
            descriptor,
            answer,
        };
        // Nobody listens, nor answers, once it has ended.
        let _ = self.changes.send(change);
        match timeout(CHANGE_TIMEOUT, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(format!("the VM has ended: {}", self.ended().await.reason)),
            Err(_) => Err(format!(
                "the VM's monitor did not answer within {CHANGE_TIMEOUT:?}"
            )),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn tap() -> OwnedFd {
        std::fs::File::open("/dev/null").expect("opens").into()
    }

    #[tokio::test(start_paused = true)]
    async fn add_network_of_a_monitor_that_does_not_answer_is_an_error_in_time() {
        let (machine, watcher) = Machine::new(512);
        let error = machine.add_network([2; 6], 1500, tap()).await;
        let error = error.expect_err("nobody answers");
        assert!(error.contains("did not answer"), "{error}");
        drop(watcher);
    }

    #[tokio::test]
    async fn add_network_to_a_vm_that_has_ended_tells_why_it_has() {
        let (machine, watcher) = Machine::new(512);
        watcher.state.send_replace(State::Ended(End {
            reason: "the guest powered off".to_owned(),
        }));
        drop(watcher);
        let error = machine.add_network([2; 6], 1500, tap()).await;
        assert_eq!(
            error,
            Err("the VM has ended: the guest powered off".to_owned())
        );
    }
}
