//! Watching a node: its agent answers, its kernel does not complain.

use std::io;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use node_agent::wire::{Frame, WireError, read_frame, write_frame};

use crate::console;
use crate::qemu::Mode;
use crate::session::{Cutter, Endpoint};

const INTERVAL: Duration = Duration::from_secs(1);

/// How long the agent may be silent. An emulated node shares its CPUs with the compiler and other nodes.
pub(crate) fn patience(mode: Mode) -> Duration {
    match mode {
        Mode::Nested => Duration::from_secs(10),
        Mode::Emulated => Duration::from_secs(30),
    }
}

#[derive(Debug, Default)]
struct Verdict {
    failure: Option<String>,
    sessions: Vec<Cutter>,
}

/// A thread that watches one node until this is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    verdict: Arc<Mutex<Verdict>>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub(crate) fn start(endpoint: Endpoint, mode: Mode, console: &Path) -> Self {
        let verdict = Arc::new(Mutex::new(Verdict::default()));
        let (stop, stopped) = mpsc::channel();
        let watching = Arc::clone(&verdict);
        let console = console.to_owned();
        let thread = thread::spawn(move || {
            let failure = watch(endpoint, mode, &console, |wait| {
                stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout)
            });
            if let Some(failure) = failure {
                let mut verdict = watching.lock().unwrap_or_else(PoisonError::into_inner);
                verdict.failure = Some(failure);
                for session in verdict.sessions.drain(..) {
                    session.cut();
                }
            }
        });
        Self {
            verdict,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// Why the node is of no use any more, once it is not.
    pub(crate) fn failure(&self) -> Option<String> {
        self.verdict
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .failure
            .clone()
    }

    /// Ends this session too when the node fails.
    pub(crate) fn guard(&self, session: Cutter) {
        let mut verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        verdict.sessions.retain(|session| !session.is_over());
        match verdict.failure {
            Some(_) => session.cut(),
            None => verdict.sessions.push(session),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        // It may be waiting for an answer that does not come; nothing depends on it any more.
        drop(self.thread.take());
    }
}

/// Returns what went wrong, or `None` when `go_on` said no.
fn watch(
    endpoint: Endpoint,
    mode: Mode,
    console: &Path,
    go_on: impl Fn(Duration) -> bool,
) -> Option<String> {
    let patience = patience(mode);
    let silent = |error: &dyn std::fmt::Display| {
        format!(
            "its agent does not answer within {} s: {error}",
            patience.as_secs()
        )
    };
    let mut stream = match endpoint.open(patience) {
        Ok(stream) => stream,
        Err(error) => return Some(silent(&error)),
    };
    if let Err(error) = stream.set_read_timeout(Some(patience)) {
        return Some(silent(&error));
    }
    let mut seen = 0;
    while go_on(INTERVAL) {
        let length = console.metadata().map_or(0, |metadata| metadata.len());
        if length != seen {
            seen = length;
            if let Some(fault) = console::read(console)
                .ok()
                .as_deref()
                .and_then(console::first_fault)
            {
                return Some(format!("its kernel complains:\n{fault}"));
            }
        }
        let answer = write_frame(&mut stream, &Frame::Ping).and_then(|()| read_frame(&mut stream));
        match answer {
            Ok(Some(Frame::Pong)) => {}
            Err(WireError::Io(error)) if is_timeout(&error) => return Some(silent(&error)),
            Ok(_) | Err(_) => return Some("it has died".to_owned()),
        }
    }
    None
}

/// A socket's timeout shows as either, see `TcpStream::set_read_timeout`.
fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
