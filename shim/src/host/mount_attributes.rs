//! `mount_setattr(2)`, which no crate of ours wraps.
#![expect(unsafe_code, reason = "a system call without a safe wrapper")]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::{Errno, Result};

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

/// Makes a detached tree nodev, nosuid and noexec, `read_only` on request, and
/// private, all the way down.
pub(super) fn disarm(tree: BorrowedFd<'_>, read_only: bool) -> Result<()> {
    let attributes = MountAttr {
        attr_set: HARMLESS
            | if read_only {
                libc::MOUNT_ATTR_RDONLY
            } else {
                0
            },
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty string, the structure outlives the call and
    // its size is the one given.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    if returned < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(())
}
