//! `mount_setattr(2)`, which no crate of ours wraps.
#![expect(unsafe_code, reason = "a system call without a safe wrapper")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use rustix::io::{Errno, Result};

use super::mounts::Access;

/// What every tree of the host loses before the guest's file server sees it:
/// device nodes, set-uid bits and programs have no meaning on the host's side.
const HARMLESS: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Makes a detached tree nodev, nosuid and noexec all the way down, private,
/// and as writable as `access` says.
pub(super) fn disarm(tree: BorrowedFd<'_>, access: Access) -> Result<()> {
    let (throughout, top) = match access {
        Access::Writable => (0, 0),
        Access::ReadOnly => (0, libc::MOUNT_ATTR_RDONLY),
        Access::ReadOnlyThroughout => (libc::MOUNT_ATTR_RDONLY, 0),
    };
    let private = |attr_set| MountAttr {
        attr_set,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    set(tree, &private(HARMLESS | throughout), libc::AT_RECURSIVE)?;
    if top == 0 {
        Ok(())
    } else {
        set(tree, &private(top), 0)
    }
}

/// Lets a mount be written to, and changes nothing else of it.
pub(super) fn make_writable(mount: BorrowedFd<'_>) -> Result<()> {
    let attributes = MountAttr {
        attr_set: 0,
        attr_clr: libc::MOUNT_ATTR_RDONLY,
        propagation: 0,
        userns_fd: 0,
    };
    set(mount, &attributes, 0)
}

/// Shows the files of a detached mount with other owners: as the user namespace `maps`
/// has them. What is mounted below the top stays as it is.
///
/// # Errors
/// `EINVAL` when its file system cannot (network and user-space ones, mostly).
pub(super) fn map_ids(tree: BorrowedFd<'_>, maps: BorrowedFd<'_>) -> Result<()> {
    let attributes = MountAttr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        // A descriptor that is open is no negative number.
        userns_fd: u64::from(maps.as_raw_fd().cast_unsigned()),
    };
    set(tree, &attributes, 0)
}

fn set(tree: BorrowedFd<'_>, attributes: &MountAttr, flags: i32) -> Result<()> {
    // SAFETY: the path is an empty string, the structure outlives the call and
    // its size is the one given.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            ptr::from_ref(attributes),
            size_of::<MountAttr>(),
        )
    };
    if returned < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(())
}
