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
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
use rustix::mount::{UnmountFlags, unmount};

use crate::host::mounts::{self, Access};
use crate::host::source::{Mounted, Newcomer};

/// A directory of the host below which mounts are followed, and those that are
/// known of.
#[derive(Clone, Debug)]
pub struct Followee {
    /// Which of the pod's volumes it is.
    pub(in crate::host) volume: u32,
    /// On the host.
    pub(in crate::host) directory: PathBuf,
    /// The mount that it lies on (`stx_mnt_id` of statx(2)).
    pub(in crate::host) mount: u64,
    /// Below it, by the identity that the host's mount has.
    pub(in crate::host) known: BTreeMap<u64, Mounted>,
}

impl Followee {
    /// On the host.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// Where the mounts below one directory go, and those that are there.
#[derive(Debug)]
pub(super) struct Followed {
    directory: PathBuf,
    mount: u64,
    /// The volume in the share, on the host: a name that the guest cannot change.
    target: PathBuf,
    access: Access,
    /// The user namespace that maps their ids, if they are mapped like the directory's.
    id_maps: Option<OwnedFd>,
    attached: BTreeMap<u64, Attached>,
}

#[derive(Debug)]
struct Attached {
    mounted: Mounted,
    /// `None` when it could not be attached, which has been told.
    copy: Option<OwnedFd>,
}

impl Followed {
    pub(super) fn new(
        directory: PathBuf,
        mount: u64,
        target: PathBuf,
        access: Access,
        id_maps: Option<OwnedFd>,
    ) -> Self {
        Self {
            directory,
            mount,
            target,
            access,
            id_maps,
            attached: BTreeMap::new(),
        }
    }

    /// As others look at it, with nothing held.
    pub(super) fn followee(&self, volume: u32) -> Followee {
        let known = self.attached.iter();
        Followee {
            volume,
            directory: self.directory.clone(),
            mount: self.mount,
            known: known
                .map(|(id, attached)| (*id, attached.mounted.clone()))
                .collect(),
        }
    }

    /// Somebody has the directory once more, perhaps to write to it.
    pub(super) fn also(&mut self, access: Access) {
        if access == Access::Writable && self.access != Access::Writable {
            self.access = access;
            // They come anew, writable, with the next update.
            self.keep(|_, _| false);
        }
    }

    /// Detaches what is not among the mounts that the host has now, `present`.
    pub(super) fn retain(&mut self, present: &BTreeMap<u64, Mounted>) {
        // An identity may be another mount's by now.
        self.keep(|id, mounted| present.get(&id) == Some(mounted));
    }

    /// Attaches what is new, outermost first.
    pub(super) fn add(&mut self, newcomers: Vec<Newcomer>) {
        for newcomer in newcomers {
            if self.attached.contains_key(&newcomer.id) {
                continue;
            }
            let copy = self.attach(&newcomer);
            if let Err(error) = &copy {
                tracing::warn!(
                    "a mount of the host below {} is not passed on to the pod, {}: {error}",
                    self.directory.display(),
                    newcomer.mounted.at.display()
                );
            }
            let attached = Attached {
                mounted: newcomer.mounted,
                copy: copy.ok(),
            };
            self.attached.insert(newcomer.id, attached);
        }
    }

    fn attach(&self, newcomer: &Newcomer) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let volume = open(&self.target, flags | OFlags::NOFOLLOW, Mode::empty())?;
        // The guest may be renaming directories in the volume: by no link, and not
        // out of it.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let at = &newcomer.mounted.at;
        let at = openat2(&volume, at, flags, Mode::empty(), resolve)?;
        let maps = self.id_maps.as_ref().map(OwnedFd::as_fd);
        Ok(mounts::attach_copy_at(
            &newcomer.opened,
            &at,
            self.access,
            maps,
        )?)
    }

    fn keep(&mut self, stays: impl Fn(u64, &Mounted) -> bool) {
        let leaving = |id: &u64, attached: &mut Attached| !stays(*id, &attached.mounted);
        let mut leaving: Vec<_> = self.attached.extract_if(.., leaving).collect();
        let depth = |attached: &Attached| attached.mounted.at.components().count();
        leaving.sort_by_key(|(_, attached)| std::cmp::Reverse(depth(attached)));
        for (_, attached) in leaving {
            let Some(copy) = attached.copy else { continue };
            // By the mount itself, whatever its name leads to by now.
            let mount = format!("/proc/thread-self/fd/{}", copy.as_raw_fd());
            match unmount(Path::new(&mount), UnmountFlags::DETACH) {
                // It went with the one that it was mounted on.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => tracing::warn!(
                    "a mount that the host no longer has stays in the pod, {}: {error}",
                    attached.mounted.at.display()
                ),
            }
        }
    }
}
