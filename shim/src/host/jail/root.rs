//! The detached tmpfs mounts that become roots.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, mkdirat, openat, symlinkat};
use rustix::io::Result;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};
use rustix::process::{Resource, getrlimit};

/// An empty, read-only directory.
pub(super) fn empty() -> Result<OwnedFd> {
    detached(MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// What virtiofsd opens by name before it goes into `share`: nothing else is
/// there. `proc` is a directory of ours and not procfs, so that `/proc/sys`
/// holds the one number that it reads and nothing that it could write; `self`
/// leads to the processes, where the child mounts them.
pub(super) fn server() -> Result<OwnedFd> {
    let root = detached(MountAttrFlags::empty())?;
    for directory in ["share", "processes", "proc", "proc/sys", "proc/sys/fs"] {
        mkdirat(&root, directory, Mode::from_raw_mode(0o555))?;
    }
    symlinkat("../processes/self", &root, "proc/self")?;
    let file = openat(
        &root,
        "proc/sys/fs/nr_open",
        OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o444),
    )?;
    let most = nr_open();
    File::from(file)
        .write_all(format!("{most}\n").as_bytes())
        .map_err(|error| {
            rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO)
        })?;
    Ok(root)
}

fn detached(attributes: MountAttrFlags) -> Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Read-only for its user, so these only bound a mistake of ours.
    for (key, value) in [("size", "64k"), ("nr_inodes", "16"), ("mode", "0555")] {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

/// As many descriptors as a process of ours may have: bounded by `fs.nr_open`,
/// and by what this process itself was given.
pub(in super::super) fn most_open_files() -> u64 {
    let own = getrlimit(Resource::Nofile).maximum;
    own.map_or_else(nr_open, |own| own.min(nr_open()))
}

fn nr_open() -> u64 {
    std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        // The kernel's own default (fs/file.c, sysctl_nr_open).
        .unwrap_or(1024 * 1024)
}
