//! Where a pod keeps its files on the host, and who holds it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open};
use rustix::io::Errno;
use thiserror::Error;

/// Where pods live, unless a test says otherwise.
pub const RUN_ROOT: &str = "/run/bulkhead";
/// Longest namespace or id: containerd's own bound (`identifiers.Validate`).
pub const MAX_ID_BYTES: usize = 76;
/// How often a namespace's directory may vanish under a new pod.
const ATTEMPTS: u32 = 16;

/// Most shares of a pod that one network or user-space file system has for itself,
/// each with a file server.
pub const MAX_REMOTE_SHARES: usize = 4;

/// Why the pod's directory cannot be had.
#[derive(Debug, Error)]
pub enum Error {
    /// A namespace, pod or container id that is no path component.
    #[error(
        "id {id:?} cannot name a directory: need 1 to {MAX_ID_BYTES} letters, digits, '-', '_' or '.', not starting with '.'"
    )]
    Id {
        /// As given.
        id: String,
    },
    /// The directory could not be made, opened or removed.
    #[error("{operation} {path}")]
    Io {
        /// As in "create directory".
        operation: &'static str,
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another live shim holds the pod.
    #[error("pod directory {path} is held by another running shim")]
    Held {
        /// Which.
        path: PathBuf,
    },
}

/// Checks that an id from a client can be a path component of ours.
pub fn check_id(id: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if id.is_empty() || id.len() > MAX_ID_BYTES || id.starts_with('.') || !id.bytes().all(allowed) {
        return Err(Error::Id { id: id.to_owned() });
    }
    Ok(())
}

/// The paths of one pod: `ROOT/NAMESPACE/POD_ID/...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPaths {
    root: PathBuf,
    namespace: String,
    id: String,
}

impl PodPaths {
    /// The paths of pod `id` in containerd namespace `namespace`, below
    /// [`RUN_ROOT`].
    pub fn try_new(namespace: &str, id: &str) -> Result<Self, Error> {
        Self::below(Path::new(RUN_ROOT), namespace, id)
    }

    /// The same below another root, for tests.
    pub fn below(root: &Path, namespace: &str, id: &str) -> Result<Self, Error> {
        check_id(namespace)?;
        check_id(id)?;
        Ok(Self {
            root: root.to_owned(),
            namespace: namespace.to_owned(),
            id: id.to_owned(),
        })
    }

    /// The root that all pods share.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// containerd's namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The pod's id: its sandbox's, or a lone container's.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The pod's directory.
    pub fn directory(&self) -> PathBuf {
        self.root.join(&self.namespace).join(&self.id)
    }

    /// The shim's ttrpc socket.
    pub fn shim_socket(&self) -> PathBuf {
        self.directory().join("shim.sock")
    }

    /// The host side of the guest's sockets, while a client needs a name.
    pub fn vsock_socket(&self) -> PathBuf {
        self.directory().join("vsock.sock")
    }

    /// The mount of a remote share, of which there are [`MAX_REMOTE_SHARES`] at
    /// most.
    pub fn remote_share(&self, number: usize) -> PathBuf {
        self.directory().join(format!("remote-{number}"))
    }

    /// The shared mount.
    pub fn share(&self) -> PathBuf {
        self.directory().join("share")
    }

    /// Where a network namespace of our making is bound.
    pub fn network_namespace(&self) -> PathBuf {
        self.directory().join("netns")
    }

    /// What `delete` needs when the shim is gone.
    pub fn record(&self) -> PathBuf {
        self.directory().join("pod.json")
    }

    /// Makes the directory (mode 0700) and takes its lock.
    ///
    /// # Errors
    /// [`Error::Held`] when a live shim has it.
    pub fn create_and_lock(&self) -> Result<PodLock, Error> {
        let path = self.directory();
        let mut attempts = 1;
        loop {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            match made {
                // The namespace's last pod took its directory along.
                Err(source) if source.kind() == io::ErrorKind::NotFound && attempts < ATTEMPTS => {
                    attempts += 1;
                    continue;
                }
                other => other.map_err(failed("create directory", &path))?,
            }
            let Some(lock) = self.try_lock()? else {
                return Err(Error::Held { path });
            };
            // Whoever held it before may have removed it while we waited: a
            // lock on a directory without a name keeps nobody out.
            if lock.is_linked() {
                return Ok(lock);
            }
        }
    }

    /// Whether a live shim holds the pod.
    pub fn is_held(&self) -> Result<bool, Error> {
        Ok(self.directory().exists() && self.try_lock()?.is_none())
    }

    /// The lock of an existing directory; `None` when another has it.
    fn try_lock(&self) -> Result<Option<PodLock>, Error> {
        let path = self.directory();
        let descriptor = self.open()?;
        match flock(&descriptor, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(PodLock { descriptor })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(source) => Err(failed("lock directory", &path)(source)),
        }
    }

    /// The lock for a cleaning process: `None` when there is nothing to clean.
    ///
    /// # Errors
    /// [`Error::Held`] when another still has it after `patience`.
    pub(super) fn lock_existing(&self, patience: Duration) -> Result<Option<PodLock>, Error> {
        let path = self.directory();
        let taken = match self.try_lock() {
            Ok(None) if patience > Duration::ZERO => self.lock_within(patience),
            other => other,
        };
        match taken {
            Ok(Some(lock)) if lock.is_linked() => Ok(Some(lock)),
            Ok(Some(_)) => Ok(None),
            Ok(None) => Err(Error::Held { path }),
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for the lock on a thread of its own, since flock has no timeout.
    /// A thread that gets it too late drops it at once.
    fn lock_within(&self, patience: Duration) -> Result<Option<PodLock>, Error> {
        let path = self.directory();
        let descriptor = self.open()?;
        let (sender, receiver) = mpsc::sync_channel(0);
        std::thread::spawn(move || {
            let locked = flock(&descriptor, FlockOperation::LockExclusive);
            let _ = sender.send(locked.map(|()| PodLock { descriptor }));
        });
        match receiver.recv_timeout(patience) {
            Ok(locked) => locked.map(Some).map_err(failed("lock directory", &path)),
            Err(_) => Ok(None),
        }
    }

    fn open(&self) -> Result<OwnedFd, Error> {
        let path = self.directory();
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        open(&path, flags, Mode::empty()).map_err(failed("open directory", &path))
    }

    /// Removes the directory with the files in it, and its namespace's when it
    /// was the last; the directories below it must be unmounted and empty.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        let path = self.directory();
        let entries = match fs::read_dir(&path) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(failed("list directory", &path))?,
        };
        // Never recursive: what lies deeper can only be the contents of a
        // mount, which are not ours to delete.
        for entry in entries.flatten() {
            let entry_path = entry.path();
            let removed = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir(&entry_path),
                _ => fs::remove_file(&entry_path),
            };
            removed.map_err(failed("remove", &entry_path))?;
        }
        match fs::remove_dir(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove directory", &path)(source));
            }
            _ => {}
        }
        // Fails while another pod of the namespace is there, as it should.
        let _ = fs::remove_dir(self.root.join(&self.namespace));
        Ok(())
    }
}

fn failed<E: Into<io::Error>>(operation: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
    move |source| Error::Io {
        operation,
        path: path.to_owned(),
        source: source.into(),
    }
}

/// The claim of one shim on a pod: an exclusive `flock` on the pod's
/// directory, which the kernel drops when its last holder dies.
///
/// It belongs to the open file description, so a forked server that inherits
/// the descriptor goes on holding it: `start` takes the lock, hands the
/// descriptor to the server, and exits.
#[derive(Debug)]
pub struct PodLock {
    descriptor: OwnedFd,
}

impl PodLock {
    /// Takes over a lock inherited as a descriptor.
    pub fn from_descriptor(descriptor: OwnedFd) -> Self {
        Self { descriptor }
    }

    /// The descriptor to hand on; close-on-exec is set.
    pub fn into_descriptor(self) -> OwnedFd {
        self.descriptor
    }

    /// A second holder of the same lock: it is free when both are gone.
    pub fn try_clone(&self) -> io::Result<Self> {
        let descriptor = self.descriptor.try_clone()?;
        Ok(Self { descriptor })
    }

    fn is_linked(&self) -> bool {
        fstat(&self.descriptor).is_ok_and(|stat| stat.st_nlink > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pod(root: &Path) -> PodPaths {
        PodPaths::below(root, "default", "pod").expect("plain ids")
    }

    #[test]
    fn create_and_lock_twice_is_held_until_the_first_is_dropped() {
        let root = tempfile::tempdir().expect("directory");
        let pod = pod(root.path());
        assert!(!pod.is_held().expect("looks"));
        let lock = pod.create_and_lock().expect("is free");
        assert!(pod.is_held().expect("looks"));
        assert!(matches!(pod.create_and_lock(), Err(Error::Held { .. })));
        drop(lock);
        assert!(!pod.is_held().expect("looks"));
        pod.create_and_lock().expect("is free again");
    }

    #[test]
    fn lock_existing_of_a_removed_pod_is_none() {
        let root = tempfile::tempdir().expect("directory");
        let pod = pod(root.path());
        assert!(pod.lock_existing(Duration::ZERO).expect("looks").is_none());
        drop(pod.create_and_lock().expect("is free"));
        pod.remove().expect("removes");
        assert!(pod.lock_existing(Duration::ZERO).expect("looks").is_none());
        assert!(!root.path().join("default").exists());
    }

    #[test]
    fn remove_with_contents_below_a_directory_refuses() {
        let root = tempfile::tempdir().expect("directory");
        let pod = pod(root.path());
        let _lock = pod.create_and_lock().expect("is free");
        fs::create_dir(pod.share()).expect("makes");
        fs::write(pod.share().join("precious"), "x").expect("writes");
        pod.remove()
            .expect_err("must not delete what it did not make");
        assert!(pod.share().join("precious").exists());
    }

    proptest! {
        #[test]
        fn check_id_of_any_text_accepts_only_single_components(id in "[a-zA-Z0-9._/\\-]{0,80}") {
            if check_id(&id).is_ok() {
                let mut parts = Path::new(&id).components();
                prop_assert!(matches!(parts.next(), Some(std::path::Component::Normal(_))));
                prop_assert!(parts.next().is_none());
            }
        }
    }
}
