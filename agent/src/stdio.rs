//! The agent's ends of the containers' standard streams, until a stream from
//! the host takes them.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use agent_protocol::api::{ProcessId, Stdio, stream_header::Kind};
use nix::{fcntl::OFlag, unistd::pipe2};
use thiserror::Error;

/// Why a stream cannot be had.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StreamError {
    /// No such process, or it has no such stream.
    #[error("process {container_id:?} {exec_id:?} has no {kind:?} stream to connect")]
    NotFound {
        /// As asked for.
        container_id: String,
        /// As asked for.
        exec_id: String,
        /// As asked for.
        kind: Kind,
    },
    /// Another connection has it.
    #[error("{kind:?} stream of process {container_id:?} {exec_id:?} is connected already")]
    Busy {
        /// As asked for.
        container_id: String,
        /// As asked for.
        exec_id: String,
        /// As asked for.
        kind: Kind,
    },
}

/// The pipes of one process: what it gets, and what the agent keeps.
pub struct Pipes {
    /// Descriptors 0, 1 and 2 of the process.
    pub process: [OwnedFd; 3],
    /// The agent's ends, by stream.
    pub agent: Vec<(Kind, OwnedFd)>,
}

/// Makes a pipe for each stream that the host will connect; the others are
/// `/dev/null`.
///
/// # Errors
/// When descriptors run out.
pub fn open_pipes(wanted: &Stdio) -> io::Result<Pipes> {
    let mut agent = Vec::new();
    let mut end = |kind: Kind, asked: bool| -> io::Result<OwnedFd> {
        if !asked {
            let null = File::options().read(true).write(true).open("/dev/null")?;
            return Ok(null.into());
        }
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        let (ours, theirs) = match kind {
            Kind::STDIN => (writer, reader),
            _ => (reader, writer),
        };
        agent.push((kind, ours));
        Ok(theirs)
    };
    let process = [
        end(Kind::STDIN, wanted.stdin)?,
        end(Kind::STDOUT, wanted.stdout)?,
        end(Kind::STDERR, wanted.stderr)?,
    ];
    Ok(Pipes { process, agent })
}

/// Names one stream of one process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StreamKey {
    container_id: String,
    exec_id: String,
    kind: Kind,
}

impl StreamKey {
    /// Names a stream.
    pub fn new(process: &ProcessId, kind: Kind) -> Self {
        Self {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            kind,
        }
    }

    /// Which of the process's streams.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

/// The agent's end of one stream.
#[derive(Debug)]
pub struct End {
    /// Of a pipe or a terminal.
    pub descriptor: OwnedFd,
    /// What was read for a connection that broke before it took it; goes first.
    pub unsent: Vec<u8>,
}

impl From<OwnedFd> for End {
    fn from(descriptor: OwnedFd) -> Self {
        Self {
            descriptor,
            unsent: Vec::new(),
        }
    }
}

enum Slot {
    /// Waits for a connection.
    Free(End),
    /// A connection has it.
    Taken,
    /// A connection has it, and it is to be closed when that ends.
    Closing,
}

/// Every stream of every process.
#[derive(Default)]
pub struct StreamTable {
    slots: Mutex<HashMap<StreamKey, Slot>>,
}

impl StreamTable {
    /// Offers the streams of a process to the host.
    pub fn insert(&self, process: &ProcessId, ends: Vec<(Kind, OwnedFd)>) {
        let mut slots = self.lock();
        for (kind, end) in ends {
            slots.insert(StreamKey::new(process, kind), Slot::Free(end.into()));
        }
    }

    /// Takes a stream for a connection.
    ///
    /// # Errors
    /// When there is none, or another connection has it.
    pub fn take(&self, key: &StreamKey) -> Result<End, StreamError> {
        let StreamKey {
            container_id,
            exec_id,
            kind,
        } = key.clone();
        match self.lock().get_mut(key) {
            Some(slot @ Slot::Free(_)) => match std::mem::replace(slot, Slot::Taken) {
                Slot::Free(end) => Ok(end),
                Slot::Taken | Slot::Closing => unreachable!("matched as free"),
            },
            Some(Slot::Taken | Slot::Closing) => Err(StreamError::Busy {
                container_id,
                exec_id,
                kind,
            }),
            None => Err(StreamError::NotFound {
                container_id,
                exec_id,
                kind,
            }),
        }
    }

    /// Gives a stream back whose connection broke, so that the host can connect
    /// again. Dropped if the stream was closed or its process deleted meanwhile.
    pub fn put_back(&self, key: &StreamKey, end: End) {
        let mut slots = self.lock();
        match slots.get_mut(key) {
            Some(slot @ Slot::Taken) => *slot = Slot::Free(end),
            Some(Slot::Closing) => {
                slots.remove(key);
            }
            Some(Slot::Free(_)) | None => {}
        }
    }

    /// Ends a stream: nobody connects to it again. A connection that has it
    /// keeps it to its own end.
    pub fn close(&self, key: &StreamKey) {
        let mut slots = self.lock();
        match slots.get_mut(key) {
            Some(Slot::Free(_)) => {
                slots.remove(key);
            }
            Some(slot) => *slot = Slot::Closing,
            None => {}
        }
    }

    /// Forgets every stream of a process.
    pub fn remove(&self, process: &ProcessId) {
        self.lock().retain(|key, _| {
            key.container_id != process.container_id || key.exec_id != process.exec_id
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<StreamKey, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stdin_of(container_id: &str) -> (ProcessId, StreamKey) {
        let process = ProcessId {
            container_id: container_id.to_owned(),
            ..ProcessId::default()
        };
        let key = StreamKey::new(&process, Kind::STDIN);
        (process, key)
    }

    fn offered(table: &StreamTable, container_id: &str) -> StreamKey {
        let (process, key) = stdin_of(container_id);
        let wanted = Stdio {
            stdin: true,
            ..Stdio::default()
        };
        table.insert(&process, open_pipes(&wanted).expect("pipes").agent);
        key
    }

    #[test]
    fn take_twice_second_is_busy() {
        let table = StreamTable::default();
        let key = offered(&table, "a");
        let _end = table.take(&key).expect("free");
        assert!(matches!(table.take(&key), Err(StreamError::Busy { .. })));
    }

    #[test]
    fn take_after_put_back_succeeds() {
        let table = StreamTable::default();
        let key = offered(&table, "a");
        let end = table.take(&key).expect("free");
        table.put_back(&key, end);
        assert!(table.take(&key).is_ok());
    }

    #[test]
    fn put_back_of_a_closed_stream_drops_it() {
        let table = StreamTable::default();
        let key = offered(&table, "a");
        let end = table.take(&key).expect("free");
        table.close(&key);
        table.put_back(&key, end);
        assert!(matches!(
            table.take(&key),
            Err(StreamError::NotFound { .. })
        ));
    }

    #[test]
    fn remove_leaves_the_streams_of_others() {
        let table = StreamTable::default();
        let (gone, kept) = (offered(&table, "a"), offered(&table, "b"));
        table.remove(&stdin_of("a").0);
        assert!(table.take(&gone).is_err());
        assert!(table.take(&kept).is_ok());
    }

    #[test]
    fn open_pipes_streams_not_asked_for_have_no_end_of_ours() {
        let wanted = Stdio {
            stdout: true,
            ..Stdio::default()
        };
        let pipes = open_pipes(&wanted).expect("pipes");
        let kinds: Vec<Kind> = pipes.agent.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [Kind::STDOUT]);
    }
}
