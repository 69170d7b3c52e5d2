//! The pod's share: all that the file server, and through it the guest, sees.
//!
//! It is a small tmpfs of its own, shared with the file server's mount
//! namespace, so that what is mounted in it later appears there. The server
//! sees its directories read-only; they are the shim's, which mounts by these
//! names.
//!
//! ```text
//! share/containers/ID/rootfs    a container's root file system
//! share/volumes/N               a volume, directory or file: see `volumes`
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use thiserror::Error;

use super::directory;
use super::mounts::{self, RootFs};

/// Why something cannot be brought into the share or out of it.
#[derive(Debug, Error)]
pub enum Error {
    /// A step with one of the share's own directories failed.
    #[error("{operation} {path} of the pod's share")]
    Io {
        /// As in "make directory".
        operation: &'static str,
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A container of this id is there.
    #[error("container {id} is already in the pod")]
    Exists {
        /// Its id.
        id: String,
    },
    /// The id is no path component.
    #[error(transparent)]
    Id(#[from] directory::Error),
    /// The root file system cannot be mounted.
    #[error(transparent)]
    RootFs(#[from] mounts::Error),
}

fn failed<E: Into<io::Error>>(operation: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
    move |source| Error::Io {
        operation,
        path: path.to_owned(),
        source: source.into(),
    }
}

/// The name by which a share is known in the host's table of mounts.
pub(super) const SOURCE: &str = "bulkhead-share";

/// A pod's share. Dropping it unmounts nothing: see [`remove`].
#[derive(Debug)]
pub struct Share {
    path: PathBuf,
}

impl Share {
    /// Mounts the share at `path`, which is made.
    pub fn create(path: &Path) -> Result<Self, Error> {
        fs::create_dir_all(path).map_err(failed("make directory", path))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        // Mount points only, so this bounds the number of containers and
        // volumes of one pod.
        let options = c"size=4m,nr_inodes=16k,mode=0755";
        mount(SOURCE, path, "tmpfs", flags, Some(options)).map_err(failed("mount", path))?;
        let share = Self {
            path: path.to_owned(),
        };
        share.furnish().inspect_err(|_| {
            let _ = mounts::unmount_all(path);
        })?;
        Ok(share)
    }

    fn furnish(&self) -> Result<(), Error> {
        // First private: below a shared /run it would be its mounts' peer.
        for propagation in [
            MountPropagationFlags::PRIVATE,
            MountPropagationFlags::SHARED,
        ] {
            mount_change(&self.path, propagation)
                .map_err(failed("set propagation of", &self.path))?;
        }
        for name in ["containers", "volumes"] {
            let path = self.path.join(name);
            fs::create_dir(&path).map_err(failed("make directory", &path))?;
        }
        Ok(())
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a container's root file system is mounted on the host.
    pub fn rootfs(&self, container_id: &str) -> PathBuf {
        self.path.join(relative_rootfs(container_id))
    }

    /// Mounts a container's root file system and returns its path relative to
    /// the share. On an error nothing of it is left.
    pub fn add_container(&self, container_id: &str, rootfs: &RootFs) -> Result<PathBuf, Error> {
        directory::check_id(container_id)?;
        let container = self.path.join("containers").join(container_id);
        match fs::create_dir(&container) {
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::Exists {
                    id: container_id.to_owned(),
                });
            }
            other => other.map_err(failed("make directory", &container))?,
        }
        let target = container.join("rootfs");
        let mounted = fs::create_dir(&target)
            .map_err(failed("make directory", &target))
            .and_then(|()| Ok(mounts::mount_rootfs(rootfs, &target)?));
        if let Err(error) = mounted {
            let _ = fs::remove_dir(&target);
            let _ = fs::remove_dir(&container);
            return Err(error);
        }
        Ok(relative_rootfs(container_id))
    }
}

fn relative_rootfs(container_id: &str) -> PathBuf {
    Path::new("containers").join(container_id).join("rootfs")
}

/// Unmounts a container's root file system from the share at `share` and
/// removes its directories. Idempotent.
pub fn remove_container(share: &Path, container_id: &str) -> Result<(), Error> {
    directory::check_id(container_id)?;
    let target = share.join(relative_rootfs(container_id));
    mounts::unmount_all(&target).map_err(failed("unmount", &target))?;
    // Not recursive: were it still mounted, this must fail.
    for path in [target.as_path(), target.parent().unwrap_or(&target)] {
        match fs::remove_dir(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove directory", path)(source));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Unmounts everything in the share at `share`, and the share. Idempotent, and
/// resumable after a kill.
pub fn remove(share: &Path) -> Result<(), Error> {
    let below = |name: &str| {
        let entries = fs::read_dir(share.join(name))
            .into_iter()
            .flatten()
            .flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let containers = below("containers")
        .into_iter()
        .map(|container| container.join("rootfs"));
    for target in containers.chain(below("volumes")) {
        mounts::unmount_all(&target).map_err(failed("unmount", &target))?;
    }
    mounts::unmount_all(share).map_err(failed("unmount", share))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::mounts::{Access, tests::private_mounts};
    use crate::host::source::Source;
    use crate::host::volumes::{Below, Volumes, Wanted};

    fn make(base: &Path, name: &str) -> PathBuf {
        let path = base.join(name);
        fs::create_dir_all(&path).expect("makes");
        path
    }

    #[test]
    fn add_container_and_remove_leaves_the_source_as_it_was() {
        let Some(base) = private_mounts() else { return };
        let source = make(base.path(), "source");
        fs::write(source.join("file"), "x").expect("writes");
        let share = Share::create(&base.path().join("share")).expect("creates");
        let rootfs = RootFs::Premounted(source.clone());
        let relative = share.add_container("c1", &rootfs).expect("adds");
        assert_eq!(relative, Path::new("containers/c1/rootfs"));
        assert!(share.path().join(relative).join("file").exists());
        assert!(matches!(
            share.add_container("c1", &rootfs),
            Err(Error::Exists { .. })
        ));
        assert!(matches!(
            share.add_container("../c1", &rootfs),
            Err(Error::Id(_))
        ));
        remove_container(share.path(), "c1").expect("removes");
        remove_container(share.path(), "c1").expect("removes what is not there");
        assert!(!share.path().join("containers/c1").exists());
        assert!(source.join("file").exists());
    }

    #[test]
    fn add_container_that_fails_leaves_nothing() {
        let Some(base) = private_mounts() else { return };
        let share = Share::create(&base.path().join("share")).expect("creates");
        let missing = RootFs::Premounted(base.path().join("missing"));
        share
            .add_container("c1", &missing)
            .expect_err("is not there");
        assert!(!share.path().join("containers/c1").exists());
    }

    #[test]
    fn remove_with_busy_mounts_leaves_no_mount() {
        let Some(base) = private_mounts() else { return };
        let source = make(base.path(), "source");
        let path = base.path().join("share");
        let share = Share::create(&path).expect("creates");
        share
            .add_container("c1", &RootFs::Premounted(source.clone()))
            .expect("adds");
        let volume = Source::open(&source).expect("opens");
        Volumes::new(&path)
            .place(&volume, &Wanted::unmapped(Access::Writable, Below::Now))
            .expect("places");
        let _busy = fs::File::open(share.rootfs("c1")).expect("opens");
        remove(&path).expect("removes");
        remove(&path).expect("removes what is not there");
        let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("table");
        assert!(!table.contains(path.to_str().expect("text")), "{table}");
        assert_eq!(fs::read_dir(&path).expect("lists").count(), 0);
    }
}
