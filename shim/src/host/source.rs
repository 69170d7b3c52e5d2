//! A file or directory of the host that a container binds, looked at: where it
//! lies, and what is mounted below it.
//!
//! Looking may take for ever where the answer comes from a server that does not
//! give one (NFS, FUSE). So it is done apart, by [`Source::open`], which is to be
//! called with nothing held that others wait for; what is done with a source
//! later asks no server.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags, open, statx};
use thiserror::Error;

use super::directory::RUN_ROOT;
use super::mount_table::{self, MountEntry};
use super::share;
use super::volumes::Followee;

/// Why a mount source cannot be had.
#[derive(Debug, Error)]
pub enum Error {
    /// It is not there, or cannot be opened.
    #[error("open mount source {path}")]
    Open {
        /// As in the spec.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It cannot be shared with a VM.
    #[error(
        "mount source {path} is a {kind} of the host, which cannot reach into a VM: mount a file or a directory"
    )]
    Kind {
        /// As in the spec.
        path: PathBuf,
        /// As in "Unix socket".
        kind: &'static str,
    },
    /// Where it lies cannot be told.
    #[error("find the mount that source {path} lies on")]
    Mount {
        /// As in the spec.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its file system's server does not answer.
    #[error(
        "mount source {path} does not answer: check the server of the file system that it lies on (nfs, fuse, ...)"
    )]
    Silent {
        /// As in the spec.
        path: PathBuf,
    },
}

/// Which file: the same under whatever name and mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    device: (u32, u32),
    inode: u64,
}

/// Where a file lies, whichever mount shows it there: by this, two bind mounts of
/// one directory are known to be one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Location {
    /// `major:minor` of its file system.
    pub(super) file_system: String,
    /// From the root of its file system.
    pub(super) path: PathBuf,
}

impl Location {
    /// The way from `outer` to here, empty when they are one; `None` when this
    /// does not lie in it.
    pub(super) fn below(&self, outer: &Self) -> Option<&Path> {
        let inner = (self.file_system == outer.file_system).then_some(&self.path)?;
        inner.strip_prefix(&outer.path).ok()
    }
}

/// One mount of a source's tree, from where the source shows it.
#[derive(Debug)]
pub(super) struct Part {
    /// Relative to the source; empty for the source itself.
    pub(super) at: PathBuf,
    /// `O_PATH`.
    pub(super) opened: OwnedFd,
    /// What the host calls the mount (`stx_mnt_id` of statx(2)).
    pub(super) mount: u64,
    pub(super) file: FileId,
    pub(super) is_directory: bool,
    pub(super) location: Location,
    /// On the host, where it is mounted.
    pub(super) read_only: bool,
    /// Whether a server may let us wait for it.
    pub(super) is_remote: bool,
}

/// A mount source, open.
#[derive(Debug)]
pub struct Source {
    /// As in the spec.
    pub(super) path: PathBuf,
    /// By no link.
    pub(super) canonical: PathBuf,
    /// The source itself, and then what is mounted below it, outermost first.
    pub(super) parts: Vec<Part>,
}

impl Source {
    /// Opens what `path` names, a directory or regular file. May block for as
    /// long as the server of its file system does.
    ///
    /// # Errors
    /// When it is not there, or is of a kind that has no meaning in a VM.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source: io::Error| Error::Open {
            path: path.to_owned(),
            source,
        };
        let opened = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| failed(errno.into()))?;
        // What was opened, whatever the name leads to by now.
        let canonical =
            std::fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd())).map_err(failed)?;
        let seen = Seen::of(&opened).map_err(failed)?;
        if !matches!(seen.kind, FileType::Directory | FileType::RegularFile) {
            return Err(Error::Kind {
                path: path.to_owned(),
                kind: kind_name(seen.kind),
            });
        }
        let unknown = |source| Error::Mount {
            path: path.to_owned(),
            source,
        };
        let table = mount_table::read().map_err(unknown)?;
        let mount = table.iter().find(|mount| mount.id == seen.mount);
        let mount = mount.ok_or_else(|| unknown(io::ErrorKind::NotFound.into()))?;
        let top = part(PathBuf::new(), opened, &seen, mount, &canonical)
            .ok_or_else(|| unknown(io::ErrorKind::NotFound.into()))?;
        let mut parts = vec![top];
        if seen.kind == FileType::Directory {
            parts.extend(parts_below(&table, mount, &canonical).map_err(failed)?);
        }
        Ok(Self {
            path: path.to_owned(),
            canonical,
            parts,
        })
    }
}

/// A mount below a followed directory, as the host's table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mounted {
    /// Relative to the directory.
    pub(super) at: PathBuf,
    file_system: String,
    root: PathBuf,
    read_only: bool,
}

/// A mount that is to be passed on.
#[derive(Debug)]
pub(super) struct Newcomer {
    pub(super) id: u64,
    pub(super) mounted: Mounted,
    /// `O_PATH`.
    pub(super) opened: OwnedFd,
}

/// What is mounted below a followed directory now.
#[derive(Debug)]
pub struct News {
    /// All of them.
    pub(super) present: BTreeMap<u64, Mounted>,
    /// Those that are not known yet, outermost first.
    pub(super) newcomers: Vec<Newcomer>,
}

/// Looks at what is mounted below a directory now, as far as it can be passed on:
/// not what lies on the server of a network or user-space file system. May block for
/// as long as such a server does that is above the directory.
///
/// # Errors
/// When the kernel does not tell.
pub fn news_of(followee: &Followee) -> io::Result<News> {
    let table = mount_table::read()?;
    let mut news = News {
        present: BTreeMap::new(),
        newcomers: Vec::new(),
    };
    for child in followable(&table, followee.mount, &followee.directory) {
        let Ok(at) = child.point.strip_prefix(&followee.directory) else {
            continue;
        };
        let mounted = Mounted {
            at: at.to_owned(),
            file_system: child.device.clone(),
            root: child.root.clone(),
            read_only: child.read_only,
        };
        // Opened only if it must be: the host cannot unmount what is open.
        if followee.known.get(&child.id) != Some(&mounted) {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = open(&child.point, flags, Mode::empty());
            let Ok(opened) = opened else { continue };
            // Hidden by another mount, or not to be looked at: no part of it.
            if Seen::of(&opened).is_ok_and(|seen| seen.mount == child.id) {
                news.newcomers.push(Newcomer {
                    id: child.id,
                    mounted: mounted.clone(),
                    opened,
                });
            }
        }
        news.present.insert(child.id, mounted);
    }
    let depth = |newcomer: &Newcomer| newcomer.mounted.at.components().count();
    news.newcomers.sort_by_key(depth);
    Ok(news)
}

/// The mounts below a directory that nobody else answers for.
fn followable<'a>(table: &'a [MountEntry], mount: u64, directory: &Path) -> Vec<&'a MountEntry> {
    let mut found = Vec::new();
    let mut open_trees = vec![mount];
    while let Some(parent) = open_trees.pop() {
        let children = children(table, parent, directory);
        for child in children.filter(|child| !is_remote(&child.kind) && child.kind != "nsfs") {
            open_trees.push(child.id);
            found.push(child);
        }
    }
    found
}

/// What is mounted on the mount `parent` below a directory. A pod's share is never
/// part of a volume: it would be put into itself.
fn children<'a>(
    table: &'a [MountEntry],
    parent: u64,
    directory: &Path,
) -> impl Iterator<Item = &'a MountEntry> {
    table.iter().filter(move |child| {
        child.parent == parent
            && child.id != parent
            && child.point != directory
            && child.point.starts_with(directory)
            && child.source != share::SOURCE
            && !child.point.starts_with(RUN_ROOT)
    })
}

impl Source {
    /// Whether what is mounted below it can be followed: it is a directory that lies
    /// on no server.
    pub(super) fn is_followable(&self) -> bool {
        let top = self.parts.first();
        top.is_some_and(|top| top.is_directory && !top.is_remote)
    }

    /// What is passed on from the start when it is followed, outermost first.
    pub(super) fn newcomers(&self) -> io::Result<Vec<Newcomer>> {
        let parts = self.parts.iter().filter(|part| self.follows(part));
        let newcomer = |part: &Part| {
            Ok(Newcomer {
                id: part.mount,
                mounted: Mounted {
                    at: part.at.clone(),
                    file_system: part.location.file_system.clone(),
                    root: part.location.path.clone(),
                    read_only: part.read_only,
                },
                opened: part.opened.try_clone()?,
            })
        };
        parts.map(newcomer).collect()
    }

    /// Whether a part of it is passed on when it is followed.
    pub(super) fn follows(&self, part: &Part) -> bool {
        let is_above = |other: &&Part| part.at.starts_with(&other.at);
        let mut above = self.parts.iter().filter(is_above);
        !part.at.as_os_str().is_empty() && above.all(|other| !other.is_remote)
    }
}

impl Source {
    /// The file systems of it that have a server which may leave us waiting.
    pub fn remote_file_systems(&self) -> impl Iterator<Item = &str> {
        let remote = self.parts.iter().filter(|part| part.is_remote);
        remote.map(|part| part.location.file_system.as_str())
    }
}

/// What the kernel knows of an open file without asking anybody.
struct Seen {
    file: FileId,
    kind: FileType,
    mount: u64,
}

impl Seen {
    fn of(opened: &OwnedFd) -> io::Result<Self> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let seen = statx(opened, "", flags, wanted)?;
        Ok(Self {
            file: FileId {
                device: (seen.stx_dev_major, seen.stx_dev_minor),
                inode: seen.stx_ino,
            },
            kind: FileType::from_raw_mode(seen.stx_mode.into()),
            mount: seen.stx_mnt_id,
        })
    }
}

/// Which file a descriptor refers to.
pub(super) fn file_id(opened: &OwnedFd) -> io::Result<FileId> {
    Ok(Seen::of(opened)?.file)
}

fn part(
    at: PathBuf,
    opened: OwnedFd,
    seen: &Seen,
    mount: &MountEntry,
    canonical: &Path,
) -> Option<Part> {
    let in_mount = canonical.strip_prefix(&mount.point).ok()?;
    Some(Part {
        at,
        opened,
        mount: mount.id,
        file: seen.file,
        is_directory: seen.kind == FileType::Directory,
        location: Location {
            file_system: mount.device.clone(),
            path: mount.root.join(in_mount),
        },
        read_only: mount.read_only,
        is_remote: is_remote(&mount.kind),
    })
}

/// What is mounted below `directory`, which lies on `mount`: outermost first.
/// What is hidden by another mount is no part of it.
fn parts_below(
    table: &[MountEntry],
    mount: &MountEntry,
    directory: &Path,
) -> io::Result<Vec<Part>> {
    let mut parts = Vec::new();
    let mut open_trees = vec![mount.id];
    while let Some(parent) = open_trees.pop() {
        for child in children(table, parent, directory) {
            open_trees.push(child.id);
            let Ok(at) = child.point.strip_prefix(directory) else {
                continue;
            };
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let Ok(opened) = open(&child.point, flags, Mode::empty()) else {
                // Below another mount, where its name means nothing.
                continue;
            };
            let seen = Seen::of(&opened)?;
            if seen.mount == child.id {
                parts.extend(part(at.to_owned(), opened, &seen, child, &child.point));
            }
        }
    }
    parts.sort_by_key(|part| part.at.components().count());
    Ok(parts)
}

/// Whether a file system's answers come from a server, on the network or in
/// user space, that may not give them.
fn is_remote(kind: &str) -> bool {
    const REMOTE: [&str; 14] = [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "fuse",
        "fuseblk",
        "glusterfs",
        "lustre",
        "nfs",
        "nfs4",
        "smb3",
        "virtiofs",
    ];
    REMOTE.contains(&kind) || kind.starts_with("fuse.")
}

fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::Socket => "Unix socket",
        FileType::BlockDevice => "block device",
        FileType::CharacterDevice => "character device",
        FileType::Fifo => "named pipe",
        _ => "special file",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::mounts::tests::{bind_mount, private_mounts, tmpfs_at};
    use std::fs;
    use std::os::unix::net::UnixListener;

    #[test]
    fn open_of_each_kind_takes_files_and_directories_only() {
        let directory = tempfile::tempdir().expect("directory");
        let at = |name: &str| directory.path().join(name);
        fs::write(at("file"), "").expect("writes");
        std::os::unix::fs::symlink("file", at("link")).expect("links");
        let _socket = UnixListener::bind(at("socket")).expect("binds");
        let opened = |name: &str| Source::open(&at(name)).expect("opens").parts.remove(0);
        assert!(!opened("file").is_directory);
        assert_eq!(opened("link").location, opened("file").location);
        let refused = |path: &Path| Source::open(path).expect_err("is refused").to_string();
        assert!(refused(&at("socket")).contains("Unix socket"));
        assert!(refused(Path::new("/dev/null")).contains("character device"));
        assert!(refused(&at("gone")).contains("gone"));
    }

    #[test]
    fn open_by_another_mount_is_the_same_location() {
        let Some(base) = private_mounts() else { return };
        let at = |name: &str| base.path().join(name);
        fs::create_dir_all(at("volume/sub")).expect("makes");
        fs::create_dir(at("elsewhere")).expect("makes");
        bind_mount(&at("volume/sub"), &at("elsewhere"));
        let top = |name: &str| Source::open(&at(name)).expect("opens").parts.remove(0);
        let (volume, sub, elsewhere) = (top("volume"), top("volume/sub"), top("elsewhere"));
        assert_eq!(sub.location, elsewhere.location);
        assert_eq!(sub.file, elsewhere.file);
        assert_eq!(
            elsewhere.location.below(&volume.location),
            Some(Path::new("sub"))
        );
        assert_eq!(volume.location.below(&sub.location), None);
    }

    #[test]
    fn open_shows_what_is_mounted_below_and_not_what_is_hidden() {
        let Some(base) = private_mounts() else { return };
        let at = |name: &str| base.path().join(name);
        fs::create_dir_all(at("volume/a")).expect("makes");
        tmpfs_at(&at("volume/a"));
        fs::create_dir_all(at("volume/a/b")).expect("makes");
        tmpfs_at(&at("volume/a/b"));
        fs::create_dir_all(at("volume/c")).expect("makes");
        tmpfs_at(&at("volume/c"));
        let places = |name: &str| {
            let source = Source::open(&at(name)).expect("opens");
            let places = source.parts.iter().map(|part| part.at.clone());
            places.collect::<Vec<_>>()
        };
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(places("volume"), paths(&["", "a", "c", "a/b"]));
        assert_eq!(places("volume/a"), paths(&["", "b"]));
        // Covers both of its predecessors.
        tmpfs_at(&at("volume/a"));
        assert_eq!(places("volume"), paths(&["", "c", "a"]));
        tmpfs_at(&at("volume"));
        assert_eq!(places("volume"), paths(&[""]));
    }

    #[test]
    fn is_remote_knows_servers() {
        for kind in ["nfs4", "fuse", "fuse.sshfs", "9p", "cifs"] {
            assert!(is_remote(kind), "{kind}");
        }
        for kind in ["ext4", "tmpfs", "overlay", "fusectl"] {
            assert!(!is_remote(kind), "{kind}");
        }
    }
}
