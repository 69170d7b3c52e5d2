//! The one directory that holds everything of a running node, and the lock that tells whether it runs.
//!
//! `lock` is held through an open file description that QEMU inherits: as long as QEMU or the node's owner lives, the lock
//! is held, and no pid can be mistaken for another's. Whoever gets the lock of a directory may remove it.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Mode;

/// Overrides where run directories go.
pub const RUN_VARIABLE: &str = "BULKHEAD_NODE_RUN";

const LOCK: &str = "lock";
const RECORD: &str = "node.json";

/// What can go wrong with run directories.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// A name that cannot be a directory's and a host's.
    #[error(
        "node name {name:?} must be 1 to 40 letters, digits and hyphens, not starting with a hyphen"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// There is such a node.
    #[error("node {name} is up already: choose another name, or take it down first")]
    InUse {
        /// The name.
        name: String,
    },
    /// There is no such node.
    #[error("no node {name} is up: start it with `bulkhead-node up {name}`")]
    NotFound {
        /// The name.
        name: String,
    },
    /// Somebody else could write there.
    #[error("{path} does not belong to this user alone: set {RUN_VARIABLE} to another directory")]
    NotPrivate {
        /// The directory.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn failed<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> RunDirError + 'a {
    move |source| RunDirError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// What others need to know to use a running node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// QEMU's process.
    pub pid: i32,
    /// QEMU's start time in clock ticks since boot, field 22 of `/proc/PID/stat`.
    pub start_time: u64,
    /// The loopback port of its agent.
    pub port: u16,
    /// The agent's key.
    pub token: [u8; 32],
    /// How it runs guests.
    pub mode: Mode,
    /// The shared network that it is on, and its address there.
    pub network: Option<(String, String)>,
}

/// A node's directory, whose lock this process holds.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    lock: File,
}

impl RunDir {
    /// Makes the directory of a new node, after removing what dead nodes have left.
    ///
    /// # Errors
    /// [`RunDirError::BadName`], [`RunDirError::InUse`], [`RunDirError::NotPrivate`], [`RunDirError::File`].
    pub fn create(name: &str) -> Result<Self, RunDirError> {
        Self::create_in(&base()?, name)
    }

    fn create_in(base: &Path, name: &str) -> Result<Self, RunDirError> {
        check_name(name)?;
        sweep(base)?;
        let path = base.join(name);
        loop {
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.map_err(failed("create", &path))?,
            }
            let lock_path = path.join(LOCK);
            let lock = match open_lock(&lock_path, true) {
                // Swept between the two steps.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(failed("open", &lock_path))?,
            };
            match lock.try_lock() {
                Err(TryLockError::WouldBlock) => {
                    return Err(RunDirError::InUse {
                        name: name.to_owned(),
                    });
                }
                Err(TryLockError::Error(error)) => return Err(failed("lock", &lock_path)(error)),
                Ok(()) if is_same_file(&lock, &lock_path) => return Ok(Self { path, lock }),
                Ok(()) => {}
            }
        }
    }

    /// The path of the file `name` in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Another handle of the lock, for QEMU to hold.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn lock_handle(&self) -> io::Result<File> {
        self.lock.try_clone()
    }

    /// Publishes how the node is reached. From now on [`running`] finds it.
    ///
    /// # Errors
    /// [`RunDirError::File`].
    pub fn publish(&self, record: &Record) -> Result<(), RunDirError> {
        let path = self.file(RECORD);
        let temporary = self.file("node.json.new");
        let text = serde_json::to_vec(record)
            .map_err(io::Error::other)
            .map_err(failed("encode", &path))?;
        fs::write(&temporary, text).map_err(failed("write", &temporary))?;
        fs::rename(&temporary, &path).map_err(failed("rename", &path))
    }

    /// Removes the directory. QEMU must have ended.
    ///
    /// # Errors
    /// [`RunDirError::File`].
    pub fn remove(self) -> Result<(), RunDirError> {
        fs::remove_dir_all(&self.path).map_err(failed("remove", &self.path))
    }
}

/// Where all run directories are: a directory of this user alone.
///
/// Not `XDG_RUNTIME_DIR`: that is a small tmpfs, and a node's disk can grow by gigabytes.
///
/// # Errors
/// [`RunDirError::NotPrivate`], [`RunDirError::File`].
pub fn base() -> Result<PathBuf, RunDirError> {
    let uid = nix::unistd::geteuid().as_raw();
    let path = std::env::var_os(RUN_VARIABLE).map_or_else(
        || std::env::temp_dir().join(format!("bulkhead-node-{uid}")),
        PathBuf::from,
    );
    match DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other.map_err(failed("create", &path))?,
    }
    let metadata = fs::symlink_metadata(&path).map_err(failed("look at", &path))?;
    if !metadata.is_dir() || metadata.uid() != uid || metadata.mode() & 0o077 != 0 {
        return Err(RunDirError::NotPrivate { path });
    }
    Ok(path)
}

/// The path and the record of the running node `name`.
///
/// # Errors
/// [`RunDirError::NotFound`] when it is not up, or not yet.
pub fn find(name: &str) -> Result<(PathBuf, Record), RunDirError> {
    check_name(name)?;
    let path = base()?.join(name);
    let record = read_record(&path).filter(|_| is_locked(&path));
    record
        .map(|record| (path, record))
        .ok_or_else(|| RunDirError::NotFound {
            name: name.to_owned(),
        })
}

/// Waits until nobody holds the directory of a node that was told to end, and removes it.
///
/// # Errors
/// [`RunDirError::File`].
pub(crate) fn remove_when_free(path: &Path) -> Result<(), RunDirError> {
    let lock_path = path.join(LOCK);
    let lock = match open_lock(&lock_path, false) {
        // Swept by another `up` in the meantime.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed("open", &lock_path))?,
    };
    lock.lock().map_err(failed("lock", &lock_path))?;
    if is_same_file(&lock, &lock_path) {
        fs::remove_dir_all(path).map_err(failed("remove", path))?;
    }
    Ok(())
}

/// The directory of the node `name`, running or dead; what a dead one has left is there until the next `up`.
///
/// # Errors
/// [`RunDirError::NotFound`], [`RunDirError::BadName`].
pub(crate) fn directory(name: &str) -> Result<PathBuf, RunDirError> {
    check_name(name)?;
    let path = base()?.join(name);
    if path.is_dir() {
        Ok(path)
    } else {
        Err(RunDirError::NotFound {
            name: name.to_owned(),
        })
    }
}

/// All running nodes, by name.
///
/// # Errors
/// [`RunDirError::File`] when the directory cannot be listed.
pub fn running() -> Result<Vec<Record>, RunDirError> {
    let base = base()?;
    let mut records: Vec<_> = directories(&base)?
        .into_iter()
        .filter(|path| is_locked(path))
        .filter_map(|path| read_record(&path))
        .collect();
    records.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(records)
}

/// When a process started: field 22 of its stat line, counted after the command name, which may hold anything.
///
/// # Errors
/// When there is no such process.
pub fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name
        .split_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn check_name(name: &str) -> Result<(), RunDirError> {
    let good = (1..=40).contains(&name.len())
        && !name.starts_with('-')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if good {
        Ok(())
    } else {
        Err(RunDirError::BadName {
            name: name.to_owned(),
        })
    }
}

/// Removes the directories that nobody holds.
fn sweep(base: &Path) -> Result<(), RunDirError> {
    for path in directories(base)? {
        let lock_path = path.join(LOCK);
        let Ok(lock) = open_lock(&lock_path, false) else {
            // Made a moment ago by somebody who is about to lock it, or already empty.
            continue;
        };
        if lock.try_lock().is_ok() && is_same_file(&lock, &lock_path) {
            fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
        }
    }
    Ok(())
}

fn directories(base: &Path) -> Result<Vec<PathBuf>, RunDirError> {
    let entries = fs::read_dir(base).map_err(failed("list", base))?;
    Ok(entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join(LOCK).exists())
        .collect())
}

fn read_record(path: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(path.join(RECORD)).ok()?).ok()
}

fn is_locked(path: &Path) -> bool {
    open_lock(&path.join(LOCK), false)
        .is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

fn open_lock(path: &Path, create: bool) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

/// Whether `file` is still what `path` names: it may have been removed before it was locked.
pub(crate) fn is_same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn create_name_in_use_is_refused_and_free_again_when_dropped() {
        let base = tempfile::tempdir().unwrap();
        let first = RunDir::create_in(base.path(), "one").unwrap();
        assert!(matches!(
            RunDir::create_in(base.path(), "one"),
            Err(RunDirError::InUse { .. })
        ));
        drop(first);
        RunDir::create_in(base.path(), "one").unwrap();
    }

    #[test]
    fn create_lock_kept_by_an_heir_keeps_the_name() {
        let base = tempfile::tempdir().unwrap();
        let first = RunDir::create_in(base.path(), "one").unwrap();
        let heir = first.lock_handle().unwrap();
        drop(first);
        assert!(matches!(
            RunDir::create_in(base.path(), "one"),
            Err(RunDirError::InUse { .. })
        ));
        drop(heir);
        RunDir::create_in(base.path(), "one").unwrap();
    }

    #[test]
    fn create_sweeps_the_dead_and_not_the_living() {
        let base = tempfile::tempdir().unwrap();
        let dead = RunDir::create_in(base.path(), "dead").unwrap();
        fs::write(dead.file("disk.qcow2"), "x").unwrap();
        drop(dead);
        let living = RunDir::create_in(base.path(), "living").unwrap();
        RunDir::create_in(base.path(), "new").unwrap();
        assert!(!base.path().join("dead").exists());
        assert!(living.path().exists());
    }

    #[test]
    fn check_name_path_or_option_is_refused() {
        for name in ["", ".", "..", "a/b", "-x", "a b", &"x".repeat(41)] {
            assert!(check_name(name).is_err(), "{name}");
        }
        check_name("e2e-1").unwrap();
    }

    #[test]
    fn start_time_of_this_process_is_known() {
        let own = start_time(std::process::id() as i32).unwrap();
        assert!(own > 0);
        assert!(start_time(0).is_err());
    }
}
