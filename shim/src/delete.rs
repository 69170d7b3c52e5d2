//! `delete`: clean up a container or pod, its shim dead or alive.
//!
//! containerd runs this after a shim has gone, and after each ordinary delete
//! of a task as well; it has five seconds.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::{DeleteResponse, ShutdownRequest};
use containerd_shim_protos::events::task::{TaskDelete, TaskExit};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use protobuf::{Message, MessageField};
use thiserror::Error;
use ttrpc::context;

use crate::args::Invocation;
use crate::bootstrap::{is_alive, socket_path, take_turn};
use crate::events::{Event, Events, now_ns, timestamp};
use crate::host::cleanup::{Deleted, cleanup};
use crate::host::directory::{self, PodPaths, RUN_ROOT};
use crate::host::pod::ExitRecord;
use crate::pod::chain;

/// What a process that was killed with its pod has: 128 + SIGKILL.
const KILLED_STATUS: u32 = 137;
/// How long a shim that may be idle has to say goodbye.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);
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
    let paths = PodPaths::try_new(&invocation.namespace, &invocation.id)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Io {
            operation: "start a runtime",
            source,
        })?;
    let socket = socket_path(&paths);
    runtime.block_on(dismiss(&socket, &invocation.id));
    let deleted =
        cleanup(Path::new(RUN_ROOT), &invocation.namespace, &invocation.id).map_err(|source| {
            Error::Cleanup {
                id: invocation.id.clone(),
                source,
            }
        })?;
    remove_short_socket(&paths, &socket);
    for failure in &deleted.hook_failures {
        eprintln!("{}", chain(failure));
    }
    runtime.block_on(tell_members(invocation, &deleted));
    io::stdout()
        .write_all(&response(&deleted))
        .map_err(|source| Error::Io {
            operation: "write the answer",
            source,
        })
}

/// A socket with a short name lies outside of the pod's directory, where nobody
/// removes it after a kill.
fn remove_short_socket(paths: &PodPaths, socket: &Path) {
    if socket == paths.shim_socket() {
        return;
    }
    // A `start` that is under way may be making it anew.
    if let Ok(_turn) = take_turn(paths.root())
        && !is_alive(socket)
    {
        let _ = fs::remove_file(socket);
    }
}

/// Asks the pod's shim to go if it has nothing to do, such as when containerd
/// died between `start` and Create. A shim with tasks stays.
async fn dismiss(socket: &Path, id: &str) {
    let asked = async {
        let client = Client::connect(&format!("unix://{}", socket.display())).await?;
        let timeout_ns = i64::try_from(SHUTDOWN_TIMEOUT.as_nanos()).unwrap_or(i64::MAX);
        let request = ShutdownRequest {
            id: id.to_owned(),
            ..ShutdownRequest::default()
        };
        TaskClient::new(client)
            .shutdown(context::with_timeout(timeout_ns), &request)
            .await
    };
    // Usually nobody is there.
    let _: Result<ttrpc::Result<_>, _> = tokio::time::timeout(SHUTDOWN_TIMEOUT, asked).await;
}

/// containerd 2.0 to 2.3 does not tell that a dead pod's other containers have
/// ended, unless this does.
async fn tell_members(invocation: &Invocation, deleted: &Deleted) {
    if deleted.members.is_empty() {
        return;
    }
    let address =
        std::env::var("TTRPC_ADDRESS").unwrap_or_else(|_| format!("{}.ttrpc", invocation.address));
    let events = Events::start(&address, &invocation.namespace);
    for (id, exit) in &deleted.members {
        let ExitRecord {
            status,
            exited_at_ns,
        } = exit_of(*exit);
        // An exit that is on record was told when it happened.
        if exit.is_none() {
            events.publish(&Event::Exit(TaskExit {
                container_id: id.clone(),
                id: id.clone(),
                exit_status: status,
                exited_at: MessageField::some(timestamp(exited_at_ns)),
                ..TaskExit::default()
            }));
        }
        events.publish(&Event::Delete(TaskDelete {
            container_id: id.clone(),
            exit_status: status,
            exited_at: MessageField::some(timestamp(exited_at_ns)),
            ..TaskDelete::default()
        }));
    }
    events.flush(FLUSH_TIMEOUT).await;
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
}
