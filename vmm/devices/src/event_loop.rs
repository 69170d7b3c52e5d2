//! A device's thread, and the events it sleeps on.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The token of the event that ends a thread.
const STOP: u64 = u64::MAX;
/// Events taken with one system call.
const BATCH: usize = 64;

/// Descriptors that a thread waits for, each under a token of its own.
///
/// A descriptor leaves when it is closed, as long as it was never duplicated;
/// devices close what they watch, and never share it.
pub(crate) struct Events {
    epoll: Epoll,
    stop: EventFd,
}

/// What happened to one descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Happened {
    pub(crate) token: u64,
    pub(crate) events: EventSet,
}

impl Events {
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>, token: u64, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd.as_raw_fd(), token, events)
    }

    /// Watches a queue's or another event descriptor.
    pub(crate) fn watch_event(&self, event: &EventFd, token: u64) -> io::Result<()> {
        self.control(
            ControlOperation::Add,
            event.as_raw_fd(),
            token,
            EventSet::IN,
        )
    }

    pub(crate) fn forget(&self, fd: BorrowedFd<'_>) {
        // Fails only when it is not watched.
        let _ = self.control(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            0,
            EventSet::empty(),
        );
    }

    /// Sleeps until something happens or the time is over, and calls `handle`
    /// for each event. False when the thread is to end.
    pub(crate) fn wait(
        &self,
        timeout: Option<Duration>,
        mut handle: impl FnMut(Happened),
    ) -> io::Result<bool> {
        let timeout = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX)
        });
        let mut happened = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(timeout, &mut happened) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let mut goes_on = true;
        for event in &happened[..count] {
            if event.data() == STOP {
                goes_on = false;
            } else {
                handle(Happened {
                    token: event.data(),
                    events: event.event_set(),
                });
            }
        }
        Ok(goes_on)
    }

    /// Sleeps until the thread is to end, deaf to everything else: for a device
    /// that waits to be reset.
    pub(crate) fn wait_for_stop(&self) {
        let Ok(epoll) = Epoll::new() else {
            return;
        };
        let event = EpollEvent::new(EventSet::IN, STOP);
        if epoll
            .ctl(ControlOperation::Add, self.stop.as_raw_fd(), event)
            .is_err()
        {
            return;
        }
        let mut happened = [EpollEvent::default()];
        while matches!(epoll.wait(-1, &mut happened), Ok(0) | Err(_)) {}
    }

    /// From now on [`wait`](Self::wait) does not tell that the thread is to end:
    /// for one that knows, and has something to finish.
    pub(crate) fn ignore_stop(&self) {
        // Fails only when it is not watched.
        let _ = self.control(
            ControlOperation::Delete,
            self.stop.as_raw_fd(),
            STOP,
            EventSet::empty(),
        );
    }

    /// Whether the thread is asked to end, without sleeping.
    pub(crate) fn is_stopping(&self) -> bool {
        let stopping = self.stop.read().is_ok();
        if stopping {
            let _ = self.stop.write(1);
        }
        stopping
    }

    pub(crate) fn try_new() -> io::Result<Self> {
        let events = Self {
            epoll: Epoll::new()?,
            stop: EventFd::new(EFD_NONBLOCK)?,
        };
        events.watch_event(&events.stop, STOP)?;
        Ok(events)
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        token: u64,
        events: EventSet,
    ) -> io::Result<()> {
        self.epoll
            .ctl(operation, fd, EpollEvent::new(events, token))
    }
}

/// A running device: its thread, which gives back what it was given.
pub(crate) struct Worker<T> {
    thread: JoinHandle<T>,
    stop: EventFd,
    /// Nothing is ever sent: it is disconnected when the thread ends.
    ended: mpsc::Receiver<Infallible>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread of this name. `prepare` watches the descriptors, so that
    /// a host without any left refuses the device instead of serving half of
    /// it; `serve` runs on the thread until [`Events::wait`] says false.
    ///
    /// # Errors
    /// When the host lacks descriptors or threads.
    pub(crate) fn spawn(
        name: &str,
        mut device: T,
        prepare: impl FnOnce(&mut T, &Events) -> io::Result<()>,
        serve: impl FnOnce(&mut T, &Events) + Send + 'static,
    ) -> io::Result<Self> {
        let events = Events::try_new()?;
        let stop = events.stop.try_clone()?;
        prepare(&mut device, &events)?;
        let (running, ended) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let _running = running;
                serve(&mut device, &events);
                device
            })?;
        Ok(Self {
            thread,
            stop,
            ended,
        })
    }

    /// Like [`stop`](Self::stop), but if that takes longer than `patience`,
    /// calls `give_up`, which must make the thread end.
    pub(crate) fn stop_within(self, patience: Duration, give_up: impl FnOnce()) -> Option<T> {
        let _ = self.stop.write(1);
        if let Err(mpsc::RecvTimeoutError::Timeout) = self.ended.recv_timeout(patience) {
            give_up();
        }
        self.stop()
    }

    /// Ends the thread and takes back the device; nothing if it panicked.
    pub(crate) fn stop(self) -> Option<T> {
        // Fails only when the counter is full, and then it is set.
        let _ = self.stop.write(1);
        self.thread.join().ok()
    }
}
