//! The pod's volumes in its share: every source once.
//!
//! The file server tells files apart by inode and mount, so what enters the
//! share by two mounts is two files to the guest: a Unix socket in one is not
//! the other's, locks do not meet, and pages mapped from both differ. So a
//! source that lies in a volume that is there already is that volume's
//! directory, whatever mount the host shows it by (kubelet binds each `subPath`
//! of each container once more). What is mounted below a source enters as a
//! volume of its own, and the guest puts the tree together.
//!
//! A volume of a network or user-space file system has a share and a file server
//! of its own, as far as there are any: requests that its server leaves
//! unanswered hold a server's threads and a device's buffers.
//!
//! A volume is read-only on the host, where a guest that was taken over cannot
//! change it, as long as no container of the pod may write to it. Among the
//! containers of a pod, the guest sees to it.

mod followed;
mod wanted;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use agent_protocol::REMOTE_DIR;
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, open, openat2};
use rustix::mount::{OpenTreeFlags, open_tree};
use thiserror::Error;

use super::id_maps::IdMaps;
use super::mount_attributes;
use super::mounts::{self, Access};
use super::source::{self, FileId, Location, News, Part, Source};
use followed::Followed;

pub use followed::Followee;
pub use wanted::{Below, Mapping, Wanted};

/// Why a volume cannot be brought into the share.
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
    /// It cannot be mounted into the share.
    #[error("bind mount source {path} into the pod's share")]
    Bind {
        /// As in the spec.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It cannot be mounted into the share with its ids mapped.
    #[error(
        "bind mount source {path} with mapped ids: does its file system support id-mapped mounts?"
    )]
    BindMapped {
        /// As in the spec.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No user namespace to map ids by.
    #[error("make the user namespace that maps ids (check sysctl user.max_user_namespaces)")]
    IdMaps(#[source] io::Error),
    /// It entered read-only and does not become writable.
    #[error("make mount source {path} writable in the pod's share")]
    MakeWritable {
        /// As in the spec.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// How one mount of a source is had.
#[derive(Clone, Copy)]
struct Manner<'a> {
    access: Access,
    id_maps: Option<&'a IdMaps>,
}

/// Where a mount source is in the share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// In the guest: relative to the share, or absolute.
    pub path: PathBuf,
    /// The host does not let anybody write by the mount that the source names,
    /// though the share may.
    pub read_only: bool,
    /// What the guest has to mount over it, in this order.
    pub below: Vec<PlacedBelow>,
}

/// Something that belongs below a placed source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedBelow {
    /// Relative to the source.
    pub at: PathBuf,
    /// As [`Placed::path`].
    pub path: PathBuf,
    /// As [`Placed::read_only`].
    pub read_only: bool,
    /// Whether the host has a mount there; otherwise it is the same file
    /// system's, brought in before for another container.
    pub is_mount: bool,
}

/// The pod's share, or a remote one.
#[derive(Debug)]
struct Place {
    /// On the host.
    path: PathBuf,
    /// The file server, whose mounts are its own.
    server: Option<OwnedFd>,
    /// Of a remote share in use: whose it is.
    file_system: Option<String>,
}

#[derive(Debug)]
struct Volume {
    /// Which of the shares it is in.
    place: usize,
    number: u32,
    location: Location,
    file: FileId,
    read_only: bool,
    /// Another volume than the same files with other owners.
    id_maps: Option<IdMaps>,
}

impl Volume {
    /// Relative to its share.
    fn in_share(&self) -> PathBuf {
        Path::new("volumes").join(self.number.to_string())
    }

    /// In the guest.
    fn path(&self) -> PathBuf {
        match self.place.checked_sub(1) {
            None => self.in_share(),
            Some(remote) => Path::new(REMOTE_DIR)
                .join(remote.to_string())
                .join(self.in_share()),
        }
    }
}

/// The volumes of one pod. Dropping it unmounts nothing.
#[derive(Debug)]
pub(super) struct Volumes {
    /// The pod's share first, then the remote ones.
    places: Vec<Place>,
    known: Vec<Volume>,
    next: u32,
    /// By the volume's number.
    followed: BTreeMap<u32, Followed>,
    /// Made once for all volumes with the same maps.
    user_namespaces: BTreeMap<IdMaps, OwnedFd>,
}

impl Volumes {
    /// None yet in the share at `share`, which has their directory.
    pub(super) fn new(share: &Path) -> Self {
        let mut volumes = Self {
            places: Vec::new(),
            known: Vec::new(),
            next: 0,
            followed: BTreeMap::new(),
            user_namespaces: BTreeMap::new(),
        };
        volumes.add_share(share);
        volumes
    }

    /// A further share, for one network or user-space file system.
    pub(super) fn add_share(&mut self, share: &Path) {
        self.places.push(Place {
            path: share.to_owned(),
            server: None,
            file_system: None,
        });
    }

    /// The shares of network and user-space file systems.
    pub(super) fn remote_shares(&self) -> Vec<PathBuf> {
        let remote = self.places.iter().skip(1);
        remote.map(|place| place.path.clone()).collect()
    }

    /// From now on the processes of `pidfds` serve the shares, in their order.
    pub(super) fn set_servers(&mut self, pidfds: impl Iterator<Item = OwnedFd>) {
        for (place, pidfd) in self.places.iter_mut().zip(pidfds) {
            place.server = Some(pidfd);
        }
    }

    /// Where a file system's volumes go: to a share of its own if its server may
    /// leave us waiting, with those that come when none is left in the last.
    fn place_for(&mut self, part: &Part) -> usize {
        let last = self.places.len() - 1;
        if !part.is_remote || last == 0 {
            return 0;
        }
        let name = &part.location.file_system;
        let remote = || self.places.iter().enumerate().skip(1);
        let own = remote().find(|(_, place)| place.file_system.as_ref() == Some(name));
        let free = || remote().find(|(_, place)| place.file_system.is_none());
        let found = own.or_else(free).map(|(index, _)| index);
        let index = found.unwrap_or_else(|| {
            tracing::warn!(
                file_system = name,
                "no share is left for it alone: it waits with another when that one's server does not answer"
            );
            last
        });
        self.places[index].file_system.get_or_insert(name.clone());
        index
    }

    /// Brings a source into the share, as far as it is not there, and tells where,
    /// with as much of what is mounted below it as is wanted.
    pub(super) fn place(&mut self, source: &Source, wanted: &Wanted) -> Result<Placed, Error> {
        let recursive = wanted.below != Below::Nothing;
        let mut is_followed = false;
        let mut below = Vec::new();
        let mut path = PathBuf::new();
        for part in &source.parts {
            let is_mount = !part.at.as_os_str().is_empty();
            if is_mount && !recursive {
                break;
            }
            if is_followed && source.follows(part) {
                continue;
            }
            // `ro` is for the source itself: mounts below it stay as they are.
            let access = match wanted.access {
                _ if part.read_only => Access::ReadOnly,
                Access::ReadOnly if is_mount => Access::Writable,
                access => access,
            };
            let mapping = wanted.id_maps.as_ref();
            let mapping = mapping.filter(|mapping| mapping.recursive || !is_mount);
            let manner = Manner {
                access,
                id_maps: mapping.map(|mapping| &mapping.maps),
            };
            let placed = self.place_part(&source.path, part, manner)?;
            if is_mount {
                below.push(PlacedBelow {
                    at: part.at.clone(),
                    path: placed,
                    read_only: part.read_only,
                    is_mount,
                });
            } else {
                path = placed;
                is_followed = wanted.below == Below::Followed
                    && self.follow(source, access, wanted.id_maps.as_ref(), &path);
            }
            let hidden = |at: &Path| {
                recursive
                    && source.parts.iter().any(|other| {
                        other.at != part.at
                            && other.at.starts_with(&part.at)
                            && at.starts_with(&other.at)
                    })
            };
            below.extend(self.known_inside(&source.path, part, manner, hidden)?);
        }
        below.sort_by_key(|placed| placed.at.components().count());
        Ok(Placed {
            path,
            read_only: source.parts.first().is_some_and(|top| top.read_only),
            below,
        })
    }

    /// Passes on what is mounted below a source that is at `path`, now and later, if
    /// that can be done.
    fn follow(
        &mut self,
        source: &Source,
        access: Access,
        mapping: Option<&Mapping>,
        path: &Path,
    ) -> bool {
        let newcomers = match source.newcomers() {
            Ok(newcomers) => newcomers,
            Err(error) => {
                tracing::warn!("mounts are not followed: {error}");
                return false;
            }
        };
        // A directory within a volume has a name that the guest may change.
        let volume = self.known.iter().find(|known| known.path() == path);
        let (Some(volume), true) = (volume, source.is_followable()) else {
            tracing::warn!(
                "what is mounted below {} later is not passed on to the pod: it lies on a server, or within another volume of the pod",
                source.path.display()
            );
            return false;
        };
        let target = self.places[volume.place].path.join(volume.in_share());
        let mount = source.parts.first().map_or(0, |top| top.mount);
        // The first who follows decides for the volume.
        let maps = mapping.filter(|mapping| mapping.recursive);
        let maps = maps.and_then(|mapping| self.user_namespaces.get(&mapping.maps));
        let maps = match maps.map(OwnedFd::try_clone).transpose() {
            Ok(maps) => maps,
            Err(error) => {
                tracing::warn!("mounts are not followed: {error}");
                return false;
            }
        };
        let new = || Followed::new(source.canonical.clone(), mount, target, access, maps);
        let followed = self.followed.entry(volume.number).or_insert_with(new);
        followed.also(access);
        followed.add(newcomers);
        true
    }

    /// The directories below which mounts are followed.
    pub(super) fn followees(&self) -> Vec<Followee> {
        let followed = self.followed.iter();
        followed
            .map(|(number, followed)| followed.followee(*number))
            .collect()
    }

    /// Passes on what has been mounted below a directory, and takes away what has been
    /// unmounted.
    pub(super) fn update(&mut self, followee: &Followee, news: News) {
        if let Some(followed) = self.followed.get_mut(&followee.volume) {
            followed.retain(&news.present);
            followed.add(news.newcomers);
        }
    }

    /// What is below a directory is no longer followed; what is there stays.
    pub(super) fn unfollow(&mut self, followee: &Followee) {
        self.followed.remove(&followee.volume);
    }

    fn place_part(
        &mut self,
        name: &Path,
        part: &Part,
        manner: Manner<'_>,
    ) -> Result<PathBuf, Error> {
        let writable = manner.access == Access::Writable;
        // The innermost first: it is what others of its files are known by.
        let mut around: Vec<usize> = (0..self.known.len())
            .filter(|&index| self.known[index].id_maps.as_ref() == manner.id_maps)
            .filter(|&index| part.location.below(&self.known[index].location).is_some())
            .collect();
        around.sort_by_key(|&index| {
            std::cmp::Reverse(self.known[index].location.path.components().count())
        });
        let mut replaced = None;
        for index in around {
            let volume = &self.known[index];
            let Some(way) = part.location.below(&volume.location) else {
                continue;
            };
            if way.as_os_str().is_empty() {
                if volume.file != part.file {
                    // Removed on the host and made anew: another directory.
                    replaced = Some(index);
                    continue;
                }
                if writable && volume.read_only {
                    self.make_writable(index, name)?;
                }
                return Ok(self.known[index].path());
            }
            // Not by making all of it writable: the rest stays out of reach.
            if part.is_remote || (writable && volume.read_only) {
                continue;
            }
            let on_host = self.places[volume.place].path.join(volume.in_share());
            if find_in(&on_host, way) == Some(part.file) {
                return Ok(volume.path().join(way));
            }
        }
        if let Some(index) = replaced {
            self.known.remove(index);
        }
        self.enter(name, part, manner)
    }

    /// Volumes that lie inside `part`: the guest must see them there by the mount
    /// by which other containers do.
    fn known_inside(
        &mut self,
        name: &Path,
        part: &Part,
        manner: Manner<'_>,
        hidden: impl Fn(&Path) -> bool,
    ) -> Result<Vec<PlacedBelow>, Error> {
        let mut inside = Vec::new();
        if part.is_remote || !part.is_directory {
            return Ok(inside);
        }
        for index in 0..self.known.len() {
            let volume = &self.known[index];
            let Some(way) = volume.location.below(&part.location) else {
                continue;
            };
            if volume.id_maps.as_ref() != manner.id_maps {
                continue;
            }
            let at = part.at.join(way);
            let is_there = || find_below(&part.opened, way) == Some(volume.file);
            if way.as_os_str().is_empty() || hidden(&at) || !is_there() {
                continue;
            }
            if manner.access == Access::Writable && volume.read_only {
                self.make_writable(index, name)?;
            }
            inside.push(PlacedBelow {
                at,
                path: self.known[index].path(),
                read_only: part.read_only,
                is_mount: false,
            });
        }
        Ok(inside)
    }

    /// Brings a file or directory into the share, without what is mounted below it.
    ///
    /// Access is denied here and not in the guest only: a guest that was taken
    /// over would ask the file server directly.
    fn enter(&mut self, name: &Path, part: &Part, manner: Manner<'_>) -> Result<PathBuf, Error> {
        let Manner { access, id_maps } = manner;
        if let Some(maps) = id_maps {
            self.make_user_namespace(maps)?;
        }
        if self.has_otherwise(part, id_maps) {
            tracing::warn!(
                "the pod has {} with its ids mapped in two ways: files, locks and sockets of the one are not the other's",
                name.display()
            );
        }
        let volume = Volume {
            place: self.place_for(part),
            number: self.next,
            location: part.location.clone(),
            file: part.file,
            read_only: access != Access::Writable,
            id_maps: id_maps.cloned(),
        };
        let maps = id_maps.and_then(|maps| self.user_namespaces.get(maps));
        let maps = maps.map(OwnedFd::as_fd);
        let target = self.places[volume.place].path.join(volume.in_share());
        let made = if part.is_directory {
            fs::create_dir(&target)
        } else {
            fs::write(&target, "")
        };
        made.map_err(|source| Error::Io {
            operation: "make mount point",
            path: target.clone(),
            source,
        })?;
        if let Err(errno) = mounts::attach_copy(&part.opened, &target, false, access, maps) {
            let _ = if part.is_directory {
                fs::remove_dir(&target)
            } else {
                fs::remove_file(&target)
            };
            let (path, source) = (name.to_owned(), errno.into());
            return Err(match maps {
                Some(_) => Error::BindMapped { path, source },
                None => Error::Bind { path, source },
            });
        }
        self.next += 1;
        let path = volume.path();
        self.known.push(volume);
        Ok(path)
    }

    /// Whether a volume shows these files already, or some of them, with other owners.
    fn has_otherwise(&self, part: &Part, id_maps: Option<&IdMaps>) -> bool {
        self.known.iter().any(|known| {
            let overlaps = part.location.below(&known.location).is_some()
                || known.location.below(&part.location).is_some();
            overlaps && known.id_maps.as_ref() != id_maps
        })
    }

    fn make_user_namespace(&mut self, maps: &IdMaps) -> Result<(), Error> {
        if !self.user_namespaces.contains_key(maps) {
            let namespace = maps.namespace().map_err(Error::IdMaps)?;
            self.user_namespaces.insert(maps.clone(), namespace);
        }
        Ok(())
    }

    /// A container that may write has come. The mount stays the one that it is, or
    /// those that have it would no longer share files with the newcomer.
    fn make_writable(&mut self, index: usize, name: &Path) -> Result<(), Error> {
        let failed = |source| Error::MakeWritable {
            path: name.to_owned(),
            source,
        };
        let volume = &mut self.known[index];
        let path = volume.in_share();
        let place = &self.places[volume.place];
        if let Some(server) = &place.server {
            // Mounts are passed on to it when they are made; their flags are its own.
            let own = Path::new(SERVER_SHARE).join(&path);
            in_mounts_of(server, || clear_read_only(&own)).map_err(failed)?;
        }
        clear_read_only(&place.path.join(&path)).map_err(failed)?;
        volume.read_only = false;
        Ok(())
    }
}

/// Where the file server's own root has the share.
const SERVER_SHARE: &str = "/share";

/// What `way` leads to from a directory, on the same mount and by no link.
fn find_in(directory: &Path, way: &Path) -> Option<FileId> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let from = open(directory, flags, Mode::empty()).ok()?;
    find_below(&from, way)
}

fn find_below(directory: &OwnedFd, way: &Path) -> Option<FileId> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let found = openat2(directory, way, flags, Mode::empty(), resolve).ok()?;
    source::file_id(&found).ok()
}

fn clear_read_only(mount_point: &Path) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = open_tree(CWD, mount_point, flags)?;
    Ok(mount_attributes::make_writable(mount.as_fd())?)
}

/// Runs `work` on a thread that sees the mounts of the process of `pidfd`.
fn in_mounts_of(pidfd: &OwnedFd, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // Threads share their root, which the namespace sets (setns(2)).
            unshare(CloneFlags::CLONE_FS)?;
            setns(pidfd, CloneFlags::CLONE_NEWNS)?;
            work()
        });
        worker
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

#[cfg(test)]
mod tests;
