//! Mounts that come and go below a volume while the pod runs, for containers that
//! have it as a slave of the host's (`rslave`, Kubernetes' `HostToContainer`).
//!
//! The kernel could pass them on by itself, if the volume in the share were a slave
//! of its source. But then a mount would come as the host has it, device nodes and
//! all, in the file server's namespace, and the host could not unmount what the
//! server holds open. So the shim watches the host's table of mounts, and attaches a
//! copy of each in the share as it does with every volume.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
use rustix::mount::{UnmountFlags, unmount};

use crate::host::mounts::{self, Access};
use crate::host::source::Part;

/// A directory of the host below which mounts are followed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Followee {
    /// On the host.
    pub(in crate::host) directory: PathBuf,
    /// The mount that it lies on (`stx_mnt_id` of statx(2)).
    pub(in crate::host) mount: u64,
}

/// Where the mounts below one directory go, and those that are there.
#[derive(Debug)]
pub(super) struct Followed {
    /// In the share, on the host.
    target: PathBuf,
    access: Access,
    /// By the identity that the host's mount has.
    attached: BTreeMap<u64, Attached>,
}

#[derive(Debug)]
struct Attached {
    /// Relative to the directory.
    at: PathBuf,
    mount: OwnedFd,
}

impl Followed {
    pub(super) fn new(target: PathBuf, access: Access) -> Self {
        Self {
            target,
            access,
            attached: BTreeMap::new(),
        }
    }

    /// Somebody has the directory once more, perhaps to write to it.
    pub(super) fn also(&mut self, access: Access) {
        if access == Access::Writable && self.access != Access::Writable {
            self.access = access;
            // They come anew, writable, with the next update.
            self.detach(|_| true);
        }
    }

    /// Attaches what is new of `parts`, the mounts that the host has below the
    /// directory, outermost first, and detaches what has gone.
    pub(super) fn update(&mut self, parts: &[Part]) {
        self.detach(|id| parts.iter().all(|part| part.mount != id));
        self.add(parts.iter());
    }

    /// Attaches what is new of `parts`, outermost first.
    pub(super) fn add<'a>(&mut self, parts: impl Iterator<Item = &'a Part>) {
        for part in parts {
            if self.attached.contains_key(&part.mount) {
                continue;
            }
            match self.attach(part) {
                Ok(attached) => drop(self.attached.insert(part.mount, attached)),
                Err(error) => tracing::warn!(
                    "a mount of the host at {} is not passed on to the pod: {error}",
                    part.at.display()
                ),
            }
        }
    }

    fn attach(&self, part: &Part) -> io::Result<Attached> {
        if part.is_remote {
            return Err(io::Error::other(
                "its server could hold up the pod's other volumes; only those that are there at the start have a file server of their own",
            ));
        }
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let directory = open(&self.target, flags, Mode::empty())?;
        // The guest may be renaming directories there: by no link, and not out.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let at = openat2(&directory, &part.at, flags, Mode::empty(), resolve)?;
        let mount = mounts::attach_copy_at(&part.opened, &at, self.access)?;
        Ok(Attached {
            at: part.at.clone(),
            mount,
        })
    }

    fn detach(&mut self, gone: impl Fn(u64) -> bool) {
        let mut leaving: Vec<_> = self.attached.extract_if(.., |id, _| gone(*id)).collect();
        leaving.sort_by_key(|(_, attached)| std::cmp::Reverse(attached.at.components().count()));
        for (_, attached) in leaving {
            // By the mount itself, whatever its name leads to by now.
            let mount = format!("/proc/thread-self/fd/{}", attached.mount.as_raw_fd());
            match unmount(Path::new(&mount), UnmountFlags::DETACH) {
                // It went with the one that it was mounted on.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => tracing::warn!(
                    "a mount at {} that the host no longer has stays in the pod: {error}",
                    attached.at.display()
                ),
            }
        }
    }
}
