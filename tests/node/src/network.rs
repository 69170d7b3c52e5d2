//! Networks of two nodes: a Unix socket between their QEMUs, and who has which end.
//!
//! Each end is a lock file whose lock QEMU inherits, as with run directories.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use crate::qemu::SharedNetwork;
use crate::rundir::{self, RunDirError};

/// What can go wrong in joining a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A name that cannot be a file's.
    #[error("network name {name:?} must be 1 to 40 letters, digits and hyphens")]
    BadName {
        /// The name.
        name: String,
    },
    /// Two nodes are on it.
    #[error("network {name} has two nodes already, which is all that it can have")]
    Full {
        /// The name.
        name: String,
    },
    /// There is no place for its files.
    #[error("find the networks' directory")]
    RunDir(#[from] RunDirError),
    /// A file operation failed.
    #[error("open {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

const SOCKET: &str = ".network";
/// The ends' lock files; the end's number follows.
const ENDS: &str = ".end";

/// One end of a network, or none.
#[derive(Debug)]
pub(crate) struct Seat {
    taken: Option<Taken>,
}

#[derive(Debug)]
struct Taken {
    network: String,
    /// 0 listens, 1 connects.
    index: u8,
    socket: PathBuf,
    lock: File,
}

impl Seat {
    pub(crate) fn alone() -> Self {
        Self { taken: None }
    }

    /// Takes a free end of the network `name`, which exists by being named.
    pub(crate) fn take(name: &str) -> Result<Self, NetworkError> {
        let plain = (1..=40).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if !plain {
            return Err(NetworkError::BadName {
                name: name.to_owned(),
            });
        }
        let base = rundir::base()?;
        let socket = base.join(format!("{name}{SOCKET}"));
        for index in 0..2 {
            let path = base.join(format!("{name}{ENDS}{index}"));
            let Some(lock) = lock_end(&path)? else {
                continue;
            };
            if index == 0 {
                // Left by the one who had this end before.
                let _ = fs::remove_file(&socket);
            }
            return Ok(Self {
                taken: Some(Taken {
                    network: name.to_owned(),
                    index,
                    socket,
                    lock,
                }),
            });
        }
        Err(NetworkError::Full {
            name: name.to_owned(),
        })
    }

    pub(crate) fn socket(&self) -> SharedNetwork {
        match &self.taken {
            None => SharedNetwork::None,
            Some(taken) if taken.index == 0 => SharedNetwork::Listen(taken.socket.clone()),
            Some(taken) => SharedNetwork::Connect(taken.socket.clone()),
        }
    }

    /// For QEMU to hold.
    pub(crate) fn lock_handle(&self) -> io::Result<Option<std::os::fd::OwnedFd>> {
        let lock = self
            .taken
            .as_ref()
            .map(|taken| taken.lock.try_clone())
            .transpose()?;
        Ok(lock.map(Into::into))
    }

    /// The node's address and its card's.
    pub(crate) fn address(&self) -> Option<(String, String)> {
        let number = self.taken.as_ref()?.index + 1;
        Some((
            format!("10.77.0.{number}"),
            format!("52:54:00:00:77:{number:02x}"),
        ))
    }

    /// The network's name and the node's address.
    pub(crate) fn described(&self) -> Option<(String, String)> {
        let (address, _) = self.address()?;
        Some((self.taken.as_ref()?.network.clone(), address))
    }
}

/// The lock of an end, or `None` when a node has it.
fn lock_end(path: &Path) -> Result<Option<File>, NetworkError> {
    let failed = |source| NetworkError::File {
        path: path.to_owned(),
        source,
    };
    loop {
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed)?;
        match lock.try_lock() {
            Ok(()) if rundir::is_same_file(&lock, path) => return Ok(Some(lock)),
            // Swept before it was locked.
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
    }
}

/// Removes the files of ends that no node has any more, and the socket with the end that listens.
pub(crate) fn sweep() -> Result<(), NetworkError> {
    let base = rundir::base()?;
    for path in fs::read_dir(&base)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
    {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let Some((network, index)) = name.rsplit_once(ENDS) else {
            continue;
        };
        let Some(_lock) = lock_end(&path)? else {
            continue;
        };
        if index == "0" {
            let _ = fs::remove_file(base.join(format!("{network}{SOCKET}")));
        }
        fs::remove_file(&path).map_err(|source| NetworkError::File { path, source })?;
    }
    Ok(())
}
