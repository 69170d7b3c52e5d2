//! The server's socket: where it is, whether somebody answers, and how to ask
//! that somebody to go.

use std::fmt::Write as _;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::api::ShutdownRequest;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use sha2::{Digest, Sha256};
use ttrpc::context;

use crate::host::directory::PodPaths;

/// Longest path of a Unix socket: `sun_path` less its NUL (unix(7)).
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// Where sockets of pods with long names live. No namespace begins with a dot.
const SHORT_DIRECTORY: &str = ".sockets";
/// How much of the digest a short name shows: enough that no two pods meet.
const SHORT_NAME_BYTES: usize = 16;

/// How long a server that may be idle has to say goodbye.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// The socket of a pod's server: `shim.sock` in the pod's directory, or, where
/// namespace and id make that longer than a socket's path may be, a name made
/// of their digest.
pub fn socket_path(paths: &PodPaths) -> PathBuf {
    let path = paths.shim_socket();
    if path.as_os_str().len() <= MAX_SOCKET_PATH_BYTES {
        return path;
    }
    // Neither part has a '/', so that no two pods have the same text.
    let digest = Sha256::digest(format!("{}/{}", paths.namespace(), paths.id()));
    let mut name = String::new();
    for byte in &digest[..SHORT_NAME_BYTES] {
        // Writing to a String does not fail.
        let _ = write!(name, "{byte:02x}");
    }
    paths.root().join(SHORT_DIRECTORY).join(name)
}

/// Whether a server listens. A socket whose server has died refuses.
pub fn is_alive(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}

/// Listens at `path`, in place of what a dead server left there. The caller
/// holds the pod's lock.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(path),
    }
}

/// Asks the server of pod `id` to go if it has nothing to do. Nothing happens
/// where there is none, or one with tasks.
pub async fn dismiss(socket: &Path, id: &str) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    fn paths(root: &Path, id: &str) -> PodPaths {
        PodPaths::below(root, "default", id).expect("is an id")
    }

    #[test]
    fn socket_path_of_longest_id_still_binds() {
        let root = tempfile::tempdir().expect("makes a directory");
        let long = socket_path(&paths(root.path(), &"x".repeat(76)));
        let other = socket_path(&paths(root.path(), &"y".repeat(76)));
        assert!(long.as_os_str().as_bytes().len() <= MAX_SOCKET_PATH_BYTES);
        assert_ne!(long, other);
        let _listener = bind(&long).expect("binds");
        assert!(is_alive(&long));
        assert!(!is_alive(&other));
    }

    #[test]
    fn bind_over_dead_socket_replaces_it() {
        let root = tempfile::tempdir().expect("makes a directory");
        let path = socket_path(&paths(root.path(), "c"));
        drop(bind(&path).expect("binds"));
        assert!(!is_alive(&path));
        let _listener = bind(&path).expect("binds again");
        assert!(is_alive(&path));
    }
}
