//! `linux.maskedPaths` and `linux.readonlyPaths`. A path that is not there needs neither.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};

use super::mounts::new_empty_directory;
use super::{RootfsError, Tree};
use crate::kernel_calls::{
    MountAttributes, attach_mount, clone_mount, mount_attr, set_mount_attributes,
};

const READONLY: MountAttributes = MountAttributes {
    set: mount_attr::RDONLY,
    clear: 0,
    propagation: 0,
    userns_fd: 0,
};

/// A copy of the guest's own `/dev/null`, which no container can have replaced:
/// the caller's root is still the guest's. Read-only, since its owner and mode
/// are those of every container's masked files.
pub fn open_null() -> Result<OwnedFd, RootfsError> {
    open("/dev/null", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(io::Error::from)
        .and_then(|null| clone_mount(null.as_fd(), false))
        .and_then(|mount| {
            set_mount_attributes(mount.as_fd(), READONLY, false)?;
            Ok(mount)
        })
        .map_err(|source| RootfsError::Enter {
            step: "take /dev/null of the guest",
            source,
        })
}

/// Covers a directory with an empty one, anything else with what `null` returns.
pub fn mask(
    tree: &Tree,
    path: &Path,
    null: impl FnOnce() -> Result<OwnedFd, RootfsError>,
) -> Result<(), RootfsError> {
    cover(tree, path, |target| {
        let kind = SFlag::from_bits_truncate(fstat(target)?.st_mode) & SFlag::S_IFMT;
        let mount = if kind == SFlag::S_IFDIR {
            new_empty_directory()?
        } else {
            null().map_err(io::Error::other)?
        };
        attach_mount(mount.as_fd(), target)
    })
    .map_err(|source| RootfsError::Mask {
        path: path.to_owned(),
        source,
    })
}

/// Makes a path read-only, with everything mounted below it.
pub fn make_readonly(tree: &Tree, path: &Path) -> Result<(), RootfsError> {
    cover(tree, path, |target| {
        let mount = clone_mount(target, true)?;
        set_mount_attributes(mount.as_fd(), READONLY, true)?;
        attach_mount(mount.as_fd(), target)
    })
    .map_err(|source| RootfsError::Readonly {
        path: path.to_owned(),
        source,
    })
}

fn cover(
    tree: &Tree,
    path: &Path,
    mount: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> io::Result<()> {
    match tree.find(path) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
        Err(errno) => Err(errno.into()),
        Ok(target) => mount(target.as_fd()),
    }
}

/// Makes the root file system read-only, but nothing that is mounted in it.
pub fn make_root_readonly(tree: &Tree) -> Result<(), RootfsError> {
    set_mount_attributes(tree.as_fd(), READONLY, false).map_err(|source| RootfsError::Readonly {
        path: "/".into(),
        source,
    })
}
