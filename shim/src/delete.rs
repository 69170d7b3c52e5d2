//! `delete`: clean up a container or pod, its shim dead or alive.
//!
//! containerd runs this after a shim has gone, and after each ordinary delete
//! of a task as well; it has five seconds.

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::events::task::{TaskDelete, TaskExit};
use protobuf::{Message, MessageField};
use thiserror::Error;

use crate::args::Invocation;
use crate::bootstrap::{dismiss, remove_dead_socket, socket_path};
use crate::events::{Event, Events, now_ns, timestamp};
use crate::host::cleanup::{Deleted, Member, cleanup};
use crate::host::deadline::Deadline;
use crate::host::directory::{self, PodPaths, RUN_ROOT};
use crate::host::pod::ExitRecord;
use crate::pod::chain;

/// What a process that was killed with its pod has: 128 + SIGKILL.
const KILLED_STATUS: u32 = 137;
/// How long all of it may take: less than the five seconds after which
/// containerd kills it, with a margin for the start of a process.
const RUN_TIMEOUT: Duration = Duration::from_millis(4500);
/// How long the cleaning may take of that: the events need some, too.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(4);
/// How long the events of a dead pod's members may take.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Why not everything is clean. containerd shows it and tries no further; the
/// next `delete` goes on where this one stopped.
#[derive(Debug, Error)]
pub enum Error {
    /// An id that is none.
    #[error(transparent)]
    Directory(#[from] directory::Error),
    /// What stays.
    #[error("clean up {id}")]
    Cleanup {
        /// Container or pod.
        id: String,
        /// Why.
        #[source]
        source: crate::host::pod::Error,
    },
    /// The answer.
    #[error("{operation}")]
    Io {
        /// As in "write the answer".
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Does `delete` and writes a `DeleteResponse` to standard output.
pub fn delete(invocation: &Invocation) -> Result<(), Error> {
    let end = Deadline::after(RUN_TIMEOUT);
    let cleaned = Deadline::after(CLEANUP_TIMEOUT);
    let paths = PodPaths::try_new(&invocation.namespace, &invocation.id)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Io {
            operation: "start a runtime",
            source,
        })?;
    // Such as when containerd died between `start` and Create. A shim with
    // tasks stays.
    runtime.block_on(dismiss(&socket_path(&paths), paths.id()));
    let root = Path::new(RUN_ROOT);
    let deleted = cleanup(root, paths.namespace(), paths.id(), cleaned);
    let deleted = deleted.map_err(|source| Error::Cleanup {
        id: invocation.id.clone(),
        source,
    })?;
    remove_dead_socket(&paths);
    for failure in &deleted.hook_failures {
        eprintln!("{}", chain(failure));
    }
    runtime.block_on(tell_members(invocation, &deleted, end));
    io::stdout()
        .write_all(&response(&deleted))
        .map_err(|source| Error::Io {
            operation: "write the answer",
            source,
        })
}

/// containerd 2.0 to 2.3 does not tell that a dead pod's other containers have
/// ended, unless this does.
async fn tell_members(invocation: &Invocation, deleted: &Deleted, end: Deadline) {
    if deleted.members.is_empty() {
        return;
    }
    let address =
        std::env::var("TTRPC_ADDRESS").unwrap_or_else(|_| format!("{}.ttrpc", invocation.address));
    let events = Events::start(&address, &invocation.namespace);
    for event in deleted.members.iter().flat_map(obituary) {
        events.publish(&event);
    }
    events.flush(end.within(FLUSH_TIMEOUT)).await;
}

/// Exit and deletion of a container that died with its pod.
fn obituary(member: &Member) -> [Event; 2] {
    let ExitRecord {
        status,
        exited_at_ns,
    } = exit_of(None);
    let exited_at = MessageField::some(timestamp(exited_at_ns));
    let exit = TaskExit {
        container_id: member.id.clone(),
        id: member.id.clone(),
        pid: member.pid,
        exit_status: status,
        exited_at: exited_at.clone(),
        ..TaskExit::default()
    };
    let delete = TaskDelete {
        container_id: member.id.clone(),
        pid: member.pid,
        exit_status: status,
        exited_at,
        ..TaskDelete::default()
    };
    [Event::Exit(exit), Event::Delete(delete)]
}

fn exit_of(exit: Option<ExitRecord>) -> ExitRecord {
    exit.unwrap_or_else(|| ExitRecord {
        status: KILLED_STATUS,
        exited_at_ns: now_ns(),
    })
}

fn response(deleted: &Deleted) -> Vec<u8> {
    let exit = exit_of(deleted.exit);
    DeleteResponse {
        pid: deleted.pid,
        exit_status: exit.status,
        exited_at: MessageField::some(timestamp(exit.exited_at_ns)),
        ..DeleteResponse::default()
    }
    .write_to_bytes()
    .expect("a message without required fields encodes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn response_without_a_record_is_killed() {
        let bytes = response(&Deleted::default());
        let response = DeleteResponse::parse_from_bytes(&bytes).expect("decodes");
        assert_eq!((response.pid, response.exit_status), (0, 137));
        assert!(response.exited_at.seconds > 0);
    }

    #[test]
    fn response_with_a_record_is_the_recorded_exit() {
        let deleted = Deleted {
            pid: 7,
            exit: Some(ExitRecord {
                status: 3,
                exited_at_ns: 1_500_000_000,
            }),
            ..Deleted::default()
        };
        let response = DeleteResponse::parse_from_bytes(&response(&deleted)).expect("decodes");
        assert_eq!(
            (
                response.pid,
                response.exit_status,
                response.exited_at.seconds
            ),
            (7, 3, 1)
        );
    }

    #[test]
    fn obituary_of_a_member_carries_its_pid() {
        let member = Member {
            id: "m".to_owned(),
            pid: 7,
        };
        let [Event::Exit(exit), Event::Delete(delete)] = obituary(&member) else {
            panic!("the exit is told first");
        };
        assert_eq!(
            (exit.id.as_str(), exit.pid, exit.exit_status),
            ("m", 7, 137)
        );
        assert_eq!((delete.container_id.as_str(), delete.pid), ("m", 7));
        assert_eq!(exit.exited_at, delete.exited_at);
    }
}
