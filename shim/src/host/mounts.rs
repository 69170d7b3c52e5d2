//! Mounting a container's root file system as containerd describes it.
//!
//! Whatever is mounted here is nodev, nosuid and noexec on the host: the guest
//! gives these things their meaning, the host none. It has these flags before
//! it is attached, since a flag set later would not reach the file server's
//! copy of the mount.

mod mapped;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, open};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, move_mount, open_tree, unmount,
};
use thiserror::Error;

use super::id_maps::IdMaps;
use super::{mount_attributes, overlay_options};

/// One mount of `CreateTaskRequest.rootfs`, in containerd's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// `overlay`, `bind`, `ext4`, `xfs`, `btrfs`.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Below the root file system; refused unless empty or `/`.
    pub target: String,
    /// `mount(8)` style options.
    pub options: Vec<String>,
}

/// What may be written to of a tree that is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// All of it, as on the host.
    Writable,
    /// What is mounted below it, as on the host (`ro`).
    ReadOnly,
    /// None of it (`rro`).
    ReadOnlyThroughout,
}

/// Where a root file system comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootFs {
    /// To be mounted by us, in this order, one over the other.
    Mounts(Vec<Mount>),
    /// Mounted already (no mounts in the request): the absolute `root.path`,
    /// or `root.path` below the bundle.
    Premounted(PathBuf),
}

/// Why a mount was refused or failed.
#[derive(Debug, Error)]
pub enum Error {
    /// A type that Bulkhead does not mount.
    #[error(
        "root file system of type {kind:?} is not supported: need overlay, bind, ext4, xfs or btrfs (choose another snapshotter)"
    )]
    Kind {
        /// As in the request.
        kind: String,
    },
    /// An option that Bulkhead does not honour.
    #[error("root file system mount option {option:?} is not supported: {advice}")]
    Option {
        /// As in the request.
        option: String,
        /// What to do instead.
        advice: &'static str,
    },
    /// A mount below the root file system.
    #[error("root file system mount with target {target:?} is not supported: only the root itself")]
    Target {
        /// As in the request.
        target: String,
    },
    /// A source that is not what its type needs.
    #[error("root file system source {path} is not {expected}")]
    Source {
        /// As in the request.
        path: PathBuf,
        /// As in "a directory".
        expected: &'static str,
    },
    /// Overlay options that the kernel cannot take.
    #[error(
        "overlay options of {bytes} bytes: the kernel takes {MAX_OPTIONS_BYTES}, and its layers have too little of their paths in common to shorten them; use an image with fewer layers"
    )]
    TooLong {
        /// Their length after shortening.
        bytes: usize,
    },
    /// No user namespace to map ids by.
    #[error("make the user namespace that maps ids (check sysctl user.max_user_namespaces)")]
    IdMaps(#[source] io::Error),
    /// The source cannot be opened, or nothing can be mounted.
    #[error("{operation} {source_path} at {target}")]
    Io {
        /// As in "mount overlay".
        operation: &'static str,
        /// What.
        source_path: PathBuf,
        /// Where.
        target: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The most that the kernel takes.
const MAX_OPTIONS_BYTES: usize = overlay_options::MAX_BYTES;

const MOUNT_MAPPED: &str =
    "mount with mapped ids (does the snapshotter's file system support id-mapped mounts?)";

const HARMLESS: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// Mounts a root file system at `target`, an empty directory. On an error
/// nothing stays mounted.
pub(super) fn mount_rootfs(rootfs: &RootFs, target: &Path) -> Result<(), Error> {
    let result = match rootfs {
        RootFs::Premounted(directory) => bind(directory, target, true, Access::Writable, None),
        RootFs::Mounts(mounts) => mounts.iter().try_for_each(|mount| mount_one(mount, target)),
    };
    result.inspect_err(|_| {
        let _ = unmount_all(target);
    })
}

fn mount_one(mount: &Mount, target: &Path) -> Result<(), Error> {
    if !matches!(mount.target.as_str(), "" | "/") {
        return Err(Error::Target {
            target: mount.target.clone(),
        });
    }
    let options = Options::parse(&mount.options)?;
    let maps = options.id_maps()?;
    let alone = options
        .data
        .iter()
        .find(|data| data.starts_with("lowerdir+="));
    if let (Some(option), true) = (alone, maps.is_some()) {
        return Err(Error::Option {
            option: (*option).to_owned(),
            advice: "with mapped ids, name all layers in lowerdir=",
        });
    }
    let maps = maps.as_ref().map(OwnedFd::as_fd);
    match mount.kind.as_str() {
        "bind" | "rbind" => {
            let recursive = mount.kind == "rbind" || options.recursive;
            let access = if options.flags.contains(MountFlags::RDONLY) {
                Access::ReadOnlyThroughout
            } else {
                Access::Writable
            };
            if let Some(option) = options.data.first() {
                return Err(Error::Option {
                    option: (*option).to_owned(),
                    advice: "a bind mount takes none of its own",
                });
            }
            bind(Path::new(&mount.source), target, recursive, access, maps)
        }
        "overlay" => mount_overlay(&options, target, maps),
        "ext4" | "xfs" | "btrfs" => mount_device(mount, &options, target, maps),
        kind => Err(Error::Kind {
            kind: kind.to_owned(),
        }),
    }
}

/// `mount(8)` style options, apart: flags of the kernel, and the rest.
#[derive(Debug)]
struct Options<'a> {
    flags: MountFlags,
    recursive: bool,
    uids: Option<&'a str>,
    gids: Option<&'a str>,
    data: Vec<&'a str>,
}

impl<'a> Options<'a> {
    fn parse(options: &'a [String]) -> Result<Self, Error> {
        let mut parsed = Self {
            flags: HARMLESS,
            recursive: false,
            uids: None,
            gids: None,
            data: Vec::new(),
        };
        for option in options {
            parsed.add(option)?;
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &'a str) -> Result<(), Error> {
        let refuse = |advice| {
            Err(Error::Option {
                option: option.to_owned(),
                advice,
            })
        };
        match option {
            // Stricter on our side of the share, whatever is asked.
            "defaults" | "async" | "bind" | "suid" | "dev" | "exec" | "nosuid" | "nodev"
            | "noexec" => {}
            "rbind" => self.recursive = true,
            "ro" => self.flags |= MountFlags::RDONLY,
            "rw" => self.flags -= MountFlags::RDONLY,
            "sync" => self.flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => self.flags |= MountFlags::DIRSYNC,
            "noatime" => self.flags |= MountFlags::NOATIME,
            "nodiratime" => self.flags |= MountFlags::NODIRATIME,
            "relatime" => self.flags |= MountFlags::RELATIME,
            "strictatime" => self.flags |= MountFlags::STRICTATIME,
            "loop" => {
                return refuse(
                    "give the loop device itself as the source, or use the overlayfs snapshotter",
                );
            }
            _ if option.starts_with("uidmap=") => self.uids = option.strip_prefix("uidmap="),
            _ if option.starts_with("gidmap=") => self.gids = option.strip_prefix("gidmap="),
            _ if option.starts_with("X-containerd.") => {
                return refuse("containerd must handle it before the shim");
            }
            _ if option.contains('\0') => return refuse("it contains a NUL byte"),
            _ => self.data.push(option),
        }
        Ok(())
    }

    /// The user namespace that maps the file system's ids, if it is to be mapped.
    fn id_maps(&self) -> Result<Option<OwnedFd>, Error> {
        let (uids, gids) = match (self.uids, self.gids) {
            (None, None) => return Ok(None),
            (uids, gids) => (uids.unwrap_or_default(), gids.unwrap_or_default()),
        };
        let maps = IdMaps::of_options(uids, gids).ok_or_else(|| Error::Option {
            option: format!("uidmap={uids},gidmap={gids}"),
            advice: "need both, each INSIDE:OUTSIDE:COUNT",
        })?;
        maps.namespace().map(Some).map_err(Error::IdMaps)
    }
}

/// Attaches a copy of `source`'s tree at `target`, with its ids mapped by a user
/// namespace if there is one.
pub(super) fn bind(
    source: &Path,
    target: &Path,
    recursive: bool,
    access: Access,
    id_maps: Option<BorrowedFd<'_>>,
) -> Result<(), Error> {
    let failed = |operation| {
        move |source_error: Errno| Error::Io {
            operation,
            source_path: source.to_owned(),
            target: target.to_owned(),
            source: source_error.into(),
        }
    };
    let directory = match open(
        source,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Err(Errno::NOTDIR) => {
            return Err(Error::Source {
                path: source.to_owned(),
                expected: "a directory",
            });
        }
        other => other.map_err(failed("open"))?,
    };
    attach_copy(&directory, target, recursive, access, id_maps).map_err(failed("bind"))
}

/// Attaches a copy of what `opened` refers to, directory or file, at `target`; the ids
/// of its own mount, not of those below, are mapped by a user namespace if there is one.
pub(super) fn attach_copy(
    opened: &OwnedFd,
    target: &Path,
    recursive: bool,
    access: Access,
    id_maps: Option<BorrowedFd<'_>>,
) -> rustix::io::Result<()> {
    let tree = detached_copy(opened, recursive, access, id_maps)?;
    attach(&tree, target)
}

fn attach(tree: &OwnedFd, target: &Path) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(tree, "", CWD, target, flags)
}

/// Attaches a copy of what `opened` refers to, without what is mounted below, over
/// what `target` refers to, its ids mapped by a user namespace if there is one. Returns
/// the mount.
pub(super) fn attach_copy_at(
    opened: &OwnedFd,
    target: &OwnedFd,
    access: Access,
    id_maps: Option<BorrowedFd<'_>>,
) -> rustix::io::Result<OwnedFd> {
    let tree = detached_copy(opened, false, access, id_maps)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&tree, "", target, "", flags)?;
    Ok(tree)
}

fn detached_copy(
    opened: &OwnedFd,
    recursive: bool,
    access: Access,
    id_maps: Option<BorrowedFd<'_>>,
) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(opened, "", flags)?;
    mount_attributes::disarm(tree.as_fd(), access)?;
    if let Some(maps) = id_maps {
        mount_attributes::map_ids(tree.as_fd(), maps)?;
    }
    Ok(tree)
}

fn mount_device(
    described: &Mount,
    options: &Options<'_>,
    target: &Path,
    maps: Option<BorrowedFd<'_>>,
) -> Result<(), Error> {
    let source = Path::new(&described.source);
    let failed = |operation| {
        move |error: Errno| Error::Io {
            operation,
            source_path: source.to_owned(),
            target: target.to_owned(),
            source: error.into(),
        }
    };
    let device = open(source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .and_then(|device| fstat(&device))
        .map_err(failed("open"))?;
    if FileType::from_raw_mode(device.st_mode) != FileType::BlockDevice {
        return Err(Error::Source {
            path: source.to_owned(),
            expected: "a block device",
        });
    }
    let data = options.data.join(",");
    let make = || mount_with(source, target, &described.kind, options.flags, &data);
    match maps {
        None => make().map_err(failed("mount the file system on")),
        Some(maps) => mapped::whole(target, maps, make)
            .and_then(|tree| attach(&tree, target))
            .map_err(failed(MOUNT_MAPPED)),
    }
}

fn mount_overlay(
    options: &Options<'_>,
    target: &Path,
    maps: Option<BorrowedFd<'_>>,
) -> Result<(), Error> {
    let failed = |operation| {
        move |error: Errno| Error::Io {
            operation,
            source_path: PathBuf::from("overlay"),
            target: target.to_owned(),
            source: error.into(),
        }
    };
    let overlay = Path::new("overlay");
    let fitted = overlay_options::fit(&options.data).map_err(|bytes| Error::TooLong { bytes })?;
    let (flags, data) = (options.flags, fitted.data);
    let make = || mount_with(overlay, target, "overlay", flags, &data);
    let make = || match fitted.directory {
        Some(directory) => in_directory(&directory, make),
        None => make(),
    };
    match maps {
        None => make().map_err(failed("mount")),
        Some(maps) => mapped::overlay(target, &options.data, maps, make)
            .and_then(|tree| attach(&tree, target))
            .map_err(failed(MOUNT_MAPPED)),
    }
}

fn mount_with(
    source: &Path,
    target: &Path,
    kind: &str,
    flags: MountFlags,
    data: &str,
) -> rustix::io::Result<()> {
    // Options hold no NUL: Options::add has checked each.
    let data = std::ffi::CString::new(data).map_err(|_| Errno::INVAL)?;
    mount(source, target, kind, flags, Some(data.as_c_str()))
}

/// Runs `work` on a thread whose working directory is `directory`, which the
/// other threads of this process do not notice.
fn in_directory(
    directory: &Path,
    work: impl FnOnce() -> rustix::io::Result<()> + Send,
) -> rustix::io::Result<()> {
    let errno = |error: nix::Error| Errno::from_raw_os_error(error as i32);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS).map_err(errno)?;
            rustix::process::chdir(directory)?;
            work()
        });
        worker.join().unwrap_or(Err(Errno::IO))
    })
}

/// Unmounts all that is stacked at `target`, with what is mounted below it.
/// Succeeds when nothing is.
///
/// Only `target` itself is named, never a path inside it: the guest may be
/// renaming directories there at this moment. What is busy is detached, to go
/// when its last user does.
pub(super) fn unmount_all(target: &Path) -> rustix::io::Result<()> {
    loop {
        match unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point, or not there.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(Errno::BUSY) => {
                tracing::debug!(target = %target.display(), "mount is in use: detaching it");
                unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::fs;

    /// Puts this test's thread into a mount namespace of its own, with a tmpfs
    /// that can hold the layers of an overlay.
    pub(in crate::host) fn private_mounts() -> Option<tempfile::TempDir> {
        if !rustix::process::geteuid().is_root() || unshare(CloneFlags::CLONE_NEWNS).is_err() {
            eprintln!("SKIP: needs root and mount namespaces");
            return None;
        }
        let private = rustix::mount::MountPropagationFlags::PRIVATE
            | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).expect("makes mounts private");
        let directory = tempfile::tempdir().expect("directory");
        mount(
            "tmpfs",
            directory.path(),
            "tmpfs",
            MountFlags::empty(),
            None,
        )
        .expect("tmpfs");
        Some(directory)
    }

    /// Mounts a directory at another.
    pub(in crate::host) fn bind_mount(source: &Path, target: &Path) {
        rustix::mount::mount_bind(source, target).expect("binds");
    }

    /// Mounts a tmpfs.
    pub(in crate::host) fn tmpfs_at(target: &Path) {
        mount("tmpfs", target, "tmpfs", MountFlags::empty(), None).expect("tmpfs");
    }

    fn overlay(options: &[String]) -> RootFs {
        RootFs::Mounts(vec![Mount {
            kind: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: options.to_vec(),
        }])
    }

    fn make(base: &Path, name: &str) -> PathBuf {
        let path = base.join(name);
        fs::create_dir_all(&path).expect("makes");
        path
    }

    /// Uid and gid of a file.
    pub(in crate::host) fn owner(path: &Path) -> (u32, u32) {
        use std::os::unix::fs::MetadataExt;
        let metadata = fs::metadata(path).expect("stats");
        (metadata.uid(), metadata.gid())
    }

    const MAPS: [&str; 2] = ["uidmap=0:65536:65536", "gidmap=0:70000:10"];

    #[test]
    fn mount_rootfs_with_mapped_ids_shows_lower_layers_to_other_owners() {
        let Some(base) = private_mounts() else { return };
        let base = base.path();
        let layers = ["layers/with-a:colon", "layers/2"].map(|name| {
            let layer = make(base, name);
            fs::write(layer.join(name.rsplit('/').next().expect("a name")), "x").expect("writes");
            layer.to_str().expect("text").replace(':', "\\:")
        });
        let (upper, work) = (make(base, "layers/upper"), make(base, "layers/work"));
        std::os::unix::fs::chown(&upper, Some(65536), Some(70000)).expect("chowns");
        let mut options = vec![
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}", layers.join(":")),
        ];
        options.extend(MAPS.map(str::to_owned));
        let target = make(base, "target");
        mount_rootfs(&overlay(&options), &target).expect("mounts");
        for name in ["", "with-a:colon", "2"] {
            assert_eq!(owner(&target.join(name)), (65536, 70000), "{name}");
        }
        // Copied up with the owner that it is shown with.
        fs::write(target.join("2"), "changed").expect("writes");
        assert_eq!(owner(&upper.join("2")), (65536, 70000));
        // The layers themselves are as they were, with nothing mounted over them.
        assert_eq!(owner(&base.join("layers/2/2")), (0, 0));
        unmount_all(&target).expect("unmounts");
        let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("table");
        assert!(!table.contains("/layers/"), "{table}");
    }

    #[test]
    fn mount_rootfs_that_binds_with_mapped_ids_shows_it_to_other_owners() {
        let Some(base) = private_mounts() else { return };
        let source = make(base.path(), "source");
        let target = make(base.path(), "target");
        let mut mount = Mount {
            kind: "bind".to_owned(),
            source: source.to_str().expect("text").to_owned(),
            target: String::new(),
            options: MAPS.map(str::to_owned).to_vec(),
        };
        mount_rootfs(&RootFs::Mounts(vec![mount.clone()]), &target).expect("mounts");
        assert_eq!(owner(&target), (65536, 70000));
        unmount_all(&target).expect("unmounts");
        mount.options.pop();
        let refused = mount_rootfs(&RootFs::Mounts(vec![mount]), &target).expect_err("half a map");
        assert!(refused.to_string().contains("need both"), "{refused}");
    }

    #[test]
    fn mount_rootfs_of_120_layers_with_long_names_shows_each() {
        let Some(base) = private_mounts() else { return };
        let base = base.path();
        let layers: Vec<String> = (0..120)
            .map(|n| {
                let layer = make(base, &format!("snapshots-with-a-long-name/{n}/fs"));
                fs::write(layer.join(format!("file{n}")), "x").expect("writes");
                layer.to_str().expect("text").to_owned()
            })
            .collect();
        let (upper, work) = (make(base, "upper"), make(base, "work"));
        let options = [
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}", layers.join(":")),
        ];
        assert!(options.concat().len() > MAX_OPTIONS_BYTES);
        let target = make(base, "target");
        let before = std::env::current_dir().expect("cwd");
        mount_rootfs(&overlay(&options), &target).expect("mounts");
        assert_eq!(std::env::current_dir().expect("cwd"), before);
        assert_eq!(fs::read_dir(&target).expect("lists").count(), 120);
        fs::write(target.join("new"), "x").expect("writes");
        assert!(upper.join("new").exists());
        unmount_all(&target).expect("unmounts");
        unmount_all(&target).expect("unmounts what is not mounted");
        assert_eq!(fs::read_dir(&target).expect("lists").count(), 0);
    }

    #[test]
    fn mount_rootfs_premounted_takes_submounts_along_without_devices() {
        let Some(base) = private_mounts() else { return };
        let base = base.path();
        let (source, target) = (make(base, "source"), make(base, "target"));
        let inner = make(&source, "inner");
        mount("tmpfs", &inner, "tmpfs", MountFlags::empty(), None).expect("tmpfs");
        fs::write(inner.join("file"), "x").expect("writes");
        mount_rootfs(&RootFs::Premounted(source), &target).expect("mounts");
        assert!(target.join("inner/file").exists());
        let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("table");
        let copies: Vec<_> = table
            .lines()
            .filter(|line| line.contains(target.to_str().expect("text")))
            .collect();
        assert_eq!(copies.len(), 2, "{copies:?}");
        assert!(
            copies
                .iter()
                .all(|line| line.contains("nosuid,nodev,noexec")),
            "{copies:?}"
        );
        unmount_all(&target).expect("unmounts");
        assert_eq!(fs::read_dir(&target).expect("lists").count(), 0);
    }

    #[test]
    fn mount_rootfs_with_what_is_not_supported_names_it() {
        let refused = |kind: &str, option: &str| {
            let mount = Mount {
                kind: kind.to_owned(),
                source: "/nonexistent".to_owned(),
                target: String::new(),
                options: vec![option.to_owned()],
            };
            let rootfs = RootFs::Mounts(vec![mount]);
            mount_rootfs(&rootfs, Path::new("/nonexistent"))
                .expect_err("is refused")
                .to_string()
        };
        assert!(refused("erofs", "ro").contains("\"erofs\""));
        assert!(refused("ext4", "loop").contains("\"loop\""));
        assert!(refused("overlay", "uidmap=0:1:2").contains("uidmap=0:1:2,gidmap="));
        let mut mapped = MAPS.map(str::to_owned).to_vec();
        mapped.push("lowerdir+=/a".to_owned());
        let error = mount_rootfs(&overlay(&mapped), Path::new("/nowhere")).expect_err("is refused");
        assert!(error.to_string().contains("lowerdir+=/a"), "{error}");
        assert!(refused("bind", "size=1").contains("\"size=1\""));
    }
}
