//! The container's mounts, in the order of the specification.

use std::ffi::CString;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::stat::fstat;
use nix::sys::statfs::{DEVPTS_SUPER_MAGIC, PROC_SUPER_MAGIC, TMPFS_MAGIC, fstatfs};
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};

use super::copy_up::copy_up;
use super::options::{self, FileSystem, Kind, Options};
use super::sources::Bind;
use super::{RootfsError, Tree};
use crate::kernel_calls::{
    MountAttributes, attach_mount, fsconfig_create, fsconfig_reconfigure, fsconfig_set, fsmount,
    fsopen, fspick, mount_attr, set_mount_attributes,
};
use crate::user_namespace::IdMaps;

/// Files of `/proc` that file systems like lxcfs replace; nothing else of it may be covered.
const REPLACEABLE_IN_PROC: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/net/dev",
];

impl FileSystem {
    fn name(self) -> &'static str {
        match self {
            Self::Proc => "proc",
            Self::Sysfs => "sysfs",
            Self::Tmpfs => "tmpfs",
            Self::Devpts => "devpts",
            Self::Mqueue => "mqueue",
            Self::Cgroup => "cgroup2",
        }
    }
}

/// A new file system that nothing can reach yet. A refusal carries the kernel's own words.
fn new_file_system(
    name: &str,
    parameters: &[(String, Option<String>)],
    attributes: u64,
) -> io::Result<OwnedFd> {
    let context = fsopen(&c_string(name)?)?;
    configure(&context, parameters)
        .and_then(|()| fsconfig_create(context.as_fd()))
        .map_err(|error| with_kernel_message(error, &context))?;
    fsmount(context.as_fd(), attributes)
}

fn configure(context: &OwnedFd, parameters: &[(String, Option<String>)]) -> io::Result<()> {
    parameters.iter().try_for_each(|(key, value)| {
        let value = value.as_deref().map(c_string).transpose()?;
        fsconfig_set(context.as_fd(), &c_string(key)?, value.as_deref())
    })
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(io::Error::from)
}

/// The kernel explains on the context's descriptor what was wrong with it, as
/// lines like `e tmpfs: Bad value for 'size'`.
fn with_kernel_message(error: io::Error, context: &OwnedFd) -> io::Error {
    let mut line = [0; 1024];
    let read = context
        .try_clone()
        .and_then(|context| std::fs::File::from(context).read(&mut line));
    match read {
        Ok(len) if len > 2 => {
            let text = String::from_utf8_lossy(&line[2..len]);
            io::Error::new(error.kind(), format!("{error}: {}", text.trim_end()))
        }
        _ => error,
    }
}

/// A procfs of the caller's PID namespace, attached nowhere: for the runtime's
/// own use, whatever the container has mounted over its own.
pub fn new_procfs() -> io::Result<OwnedFd> {
    new_file_system(
        "proc",
        &[],
        mount_attr::NOSUID | mount_attr::NODEV | mount_attr::NOEXEC,
    )
}

/// A read-only, empty directory.
pub fn new_empty_directory() -> io::Result<OwnedFd> {
    let parameter = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
    new_file_system(
        "tmpfs",
        &[
            // Its root is all it can hold.
            parameter("nr_inodes", "1"),
            parameter("mode", "755"),
        ],
        mount_attr::RDONLY | mount_attr::NOSUID | mount_attr::NODEV | mount_attr::NOEXEC,
    )
}

fn dev_failed(source: io::Error) -> RootfsError {
    RootfsError::Mount {
        what: "tmpfs".into(),
        destination: "/dev".into(),
        source,
    }
}

/// A `/dev` where the specification mounts none: the root file system itself
/// never has devices.
fn default_dev(owner: &[(String, Option<String>)]) -> Result<OwnedFd, RootfsError> {
    let parameter = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
    let mut parameters = vec![parameter("mode", "755"), parameter("size", "65536k")];
    parameters.extend_from_slice(owner);
    let attributes = mount_attr::NOSUID | mount_attr::STRICTATIME;
    new_file_system("tmpfs", &parameters, attributes).map_err(dev_failed)
}

/// Attaches a `/dev` that was made before, or a default one.
pub fn mount_default_dev(tree: &Tree, made: Option<&OwnedFd>) -> Result<(), RootfsError> {
    let new;
    let mount = if let Some(made) = made {
        made
    } else {
        new = default_dev(&[])?;
        &new
    };
    let target = find_target(tree, Path::new("/dev"), true)?;
    attach_mount(mount.as_fd(), target.as_fd()).map_err(dev_failed)
}

/// The `/dev` of a container in a user namespace of its own, for [`Dev::Own`]
/// and [`Dev::Missing`]: a tmpfs of the guest's privileges, without which no
/// device in it could be opened, that belongs to the container's root.
pub fn new_dev(mounts: &[Mount], maps: IdMaps<'_>) -> Result<OwnedFd, RootfsError> {
    let mapped = |id: Option<u32>| {
        id.map(|id| Some(id.to_string()))
            .ok_or_else(|| dev_failed(io::Error::other("its owner is not mapped")))
    };
    let owner = [
        ("uid".to_owned(), mapped(maps.guest_uid(0))?),
        ("gid".to_owned(), mapped(maps.guest_gid(0))?),
    ];
    let Some(index) = mounts.iter().rposition(is_dev) else {
        return default_dev(&owner);
    };
    let mount = &mounts[index];
    // Validated before anything was made.
    let options =
        options::parse(index, mount).map_err(|error| dev_failed(io::Error::other(error)))?;
    let mut parameters = owner.to_vec();
    for (key, value) in parameters_of(FileSystem::Tmpfs, mount, &options) {
        let id = value.as_deref().and_then(|value| value.parse().ok());
        let value = match (key.as_str(), id) {
            ("uid", Some(id)) => mapped(maps.guest_uid(id))?,
            ("gid", Some(id)) => mapped(maps.guest_gid(id))?,
            _ => value,
        };
        parameters.push((key, value));
    }
    new_file_system("tmpfs", &parameters, options.attributes.set).map_err(dev_failed)
}

/// Makes what of `mounts[]` belongs to a namespace of the caller's, attached
/// nowhere, and hands it on with its index.
pub fn made_outside<E: From<RootfsError>>(
    spec: &Spec,
    mut hand_on: impl FnMut(usize, &OwnedFd) -> Result<(), E>,
) -> Result<(), E> {
    let own_cgroup_namespace = own_cgroup_namespace(spec);
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let Ok(options) = options::parse(index, mount) else {
            continue;
        };
        let file_system = match options.kind {
            Kind::New(FileSystem::Cgroup) if !own_cgroup_namespace => continue,
            Kind::New(
                kind @ (FileSystem::Proc
                | FileSystem::Sysfs
                | FileSystem::Mqueue
                | FileSystem::Cgroup),
            ) => kind,
            _ => continue,
        };
        let parameters = parameters_of(file_system, mount, &options);
        let new = new_file_system(file_system.name(), &parameters, options.attributes.set);
        let new = new.map_err(|source| RootfsError::Mount {
            what: file_system.name().to_owned(),
            destination: mount.destination().clone(),
            source,
        })?;
        hand_on(index, &new)?;
    }
    Ok(())
}

/// Whether the container has a cgroup namespace of its own.
pub fn own_cgroup_namespace(spec: &Spec) -> bool {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref())
        .into_iter()
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Cgroup)
}

/// Whether `mount` puts something at `/dev`, and what.
pub fn is_dev(mount: &Mount) -> bool {
    // Component by component, so that "/dev/" and "//dev" count as well.
    mount.destination() == Path::new("/dev")
}

/// What `/dev` is, by the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dev {
    /// No mount: a tmpfs is needed.
    Missing,
    /// A file system of the container's own.
    Own,
    /// A part of the pod's files, which is left as it is.
    Bound,
}

impl Dev {
    pub fn of(mounts: &[Mount]) -> Self {
        let last = mounts.iter().rposition(is_dev);
        match last.map(|index| options::parse(index, &mounts[index])) {
            None => Self::Missing,
            Some(Ok(Options {
                kind: Kind::Bind { .. },
                ..
            })) => Self::Bound,
            Some(_) => Self::Own,
        }
    }
}

fn find_target(
    tree: &Tree,
    destination: &Path,
    is_directory: bool,
) -> Result<OwnedFd, RootfsError> {
    let target = if is_directory {
        tree.make_directory(destination)
    } else {
        tree.make_file(destination)
    };
    target.map_err(|errno| RootfsError::Target {
        destination: destination.to_owned(),
        source: errno.into(),
    })
}

/// A container that could cover parts of its procfs could make the runtime's
/// own writes there go elsewhere.
fn check_not_inside_proc(target: BorrowedFd<'_>, destination: &Path) -> Result<(), RootfsError> {
    let inside = fstatfs(target).is_ok_and(|fs| fs.filesystem_type() == PROC_SUPER_MAGIC);
    let replaceable = REPLACEABLE_IN_PROC
        .iter()
        .any(|path| destination == Path::new(path));
    if inside && !replaceable {
        return Err(RootfsError::InsideProc {
            destination: destination.to_owned(),
        });
    }
    Ok(())
}

/// What a mount needs that was made before.
#[derive(Debug, Default, Clone, Copy)]
pub struct Ready<'a> {
    /// The copy of a bind mount's source.
    pub bind: Option<&'a Bind>,
    /// The file system itself, with its parameters.
    pub made: Option<&'a OwnedFd>,
    /// The user namespace whose maps the mount has.
    pub idmap: Option<&'a OwnedFd>,
    /// The container's cgroup, where that is all that is to be seen.
    pub cgroup: Option<&'a OwnedFd>,
}

/// Makes one mount of the specification.
pub fn mount(
    tree: &Tree,
    mount: &Mount,
    options: &Options,
    ready: Ready<'_>,
) -> Result<(), RootfsError> {
    if options.kind == Kind::Remount {
        return remount(tree, mount, options);
    }
    let bind = ready.bind;
    let destination = mount.destination();
    let what = match options.kind {
        Kind::Bind { .. } => mount.source().clone().unwrap_or_default(),
        Kind::New(file_system) => PathBuf::from(file_system.name()),
        Kind::Remount => PathBuf::new(),
    };
    let failed = |source| RootfsError::Mount {
        what: what.display().to_string(),
        destination: destination.clone(),
        source,
    };
    let is_directory = bind.is_none_or(|bind| bind.is_directory);
    let before = mode_of(tree, destination);
    let target = find_target(tree, destination, is_directory)?;
    check_not_inside_proc(target.as_fd(), destination)?;

    let new;
    let mounted = match (options.kind, bind, ready.cgroup) {
        (Kind::Bind { .. }, Some(bind), _) => {
            change(bind.mount.as_fd(), options.attributes, false).map_err(failed)?;
            bind.mount.as_fd()
        }
        (Kind::New(_), ..) if ready.made.is_some() => {
            let Some(made) = ready.made else {
                return Err(failed(io::ErrorKind::NotFound.into()));
            };
            made.as_fd()
        }
        // Without a cgroup namespace of its own, the whole hierarchy would be
        // the file system's root: only the container's part of it is shown.
        (Kind::New(FileSystem::Cgroup), _, Some(cgroup)) => {
            change(cgroup.as_fd(), options.attributes, false).map_err(failed)?;
            cgroup.as_fd()
        }
        (Kind::New(file_system), ..) => {
            let mut parameters = parameters_of(file_system, mount, options);
            // As in other OCI runtimes: a tmpfs over a directory has its mode.
            if let Some(mode) = before
                && file_system == FileSystem::Tmpfs
                && parameters.iter().all(|(key, _)| key != "mode")
            {
                parameters.push(("mode".to_owned(), Some(format!("{mode:o}"))));
            }
            // A copy is written before it can be read-only.
            let attributes = if options.copy_up {
                0
            } else {
                options.attributes.set
            };
            new = new_file_system(file_system.name(), &parameters, attributes).map_err(failed)?;
            new.as_fd()
        }
        (Kind::Bind { .. }, None, _) | (Kind::Remount, ..) => {
            return Err(failed(io::ErrorKind::NotFound.into()));
        }
    };
    if bind.is_none()
        && let Some(idmap) = ready.idmap
    {
        map_ids(mounted, idmap.as_fd(), false).map_err(failed)?;
    }
    if options.copy_up {
        copy_up(target.as_fd(), mounted).map_err(failed)?;
        change(mounted, options.attributes, false).map_err(failed)?;
    }
    change(mounted, options.recursive_attributes, true).map_err(failed)?;
    attach_mount(mounted, target.as_fd()).map_err(failed)?;
    propagate(mounted, options).map_err(failed)
}

fn propagate(mount: BorrowedFd<'_>, options: &Options) -> io::Result<()> {
    for (propagation, recursive) in &options.propagation {
        let attributes = MountAttributes {
            propagation: propagation.bits(),
            ..MountAttributes::default()
        };
        change(mount, attributes, *recursive)?;
    }
    Ok(())
}

/// Of what is a directory before a mount point is made.
fn mode_of(tree: &Tree, destination: &Path) -> Option<u32> {
    let status = fstat(tree.find(destination).ok()?).ok()?;
    (status.st_mode & libc::S_IFMT == libc::S_IFDIR).then_some(status.st_mode & 0o7777)
}

/// Changes what an earlier mount has put at the destination: of its attributes
/// those that are named, and the parameters of a file system of the container's own.
fn remount(tree: &Tree, mount: &Mount, options: &Options) -> Result<(), RootfsError> {
    let destination = mount.destination();
    let failed = |source: io::Error| RootfsError::Remount {
        destination: destination.clone(),
        source: match source.raw_os_error() {
            Some(libc::EINVAL) => io::Error::other(format!("{source}: is it a mount point?")),
            _ => source,
        },
    };
    let target = tree.find(destination);
    let target = target.map_err(|errno| failed(errno.into()))?;
    // Fails where nothing is mounted.
    set_mount_attributes(target.as_fd(), options.attributes, false).map_err(failed)?;
    change(target.as_fd(), options.recursive_attributes, true).map_err(failed)?;
    propagate(target.as_fd(), options).map_err(failed)?;
    if options.parameters.is_empty() {
        return Ok(());
    }
    // The others are the pod's or the guest's as well.
    let own = [TMPFS_MAGIC, PROC_SUPER_MAGIC, DEVPTS_SUPER_MAGIC];
    if !fstatfs(&target).is_ok_and(|fs| own.contains(&fs.filesystem_type())) {
        let reason = "its parameters are not the container's alone";
        return Err(failed(io::Error::other(reason)));
    }
    let reconfigure = || {
        let context = fspick(target.as_fd())?;
        configure(&context, &options.parameters)
            .and_then(|()| fsconfig_reconfigure(context.as_fd()))
            .map_err(|error| with_kernel_message(error, &context))
    };
    reconfigure().map_err(failed)
}

fn parameters_of(
    file_system: FileSystem,
    mount: &Mount,
    options: &Options,
) -> Vec<(String, Option<String>)> {
    let mut parameters = options.parameters.clone();
    // Every devpts is a new instance; older documents still ask for it.
    if file_system == FileSystem::Devpts {
        parameters.retain(|(key, _)| key != "newinstance");
    }
    // What /proc/mounts shows in its first column.
    if let Some(source) = mount.source().as_deref().and_then(Path::to_str)
        && !source.is_empty()
    {
        parameters.insert(0, ("source".to_owned(), Some(source.to_owned())));
    }
    parameters
}

/// Shows the ids of a mount that is attached nowhere as `namespace` maps them.
pub fn map_ids(
    mount: BorrowedFd<'_>,
    namespace: BorrowedFd<'_>,
    recursive: bool,
) -> io::Result<()> {
    let attributes = MountAttributes {
        set: mount_attr::IDMAP,
        userns_fd: u64::from(namespace.as_raw_fd().unsigned_abs()),
        ..MountAttributes::default()
    };
    set_mount_attributes(mount, attributes, recursive).map_err(|error| {
        if error.raw_os_error() == Some(libc::EINVAL) {
            io::Error::other("its file system, or the server of its files, cannot map ids (idmap)")
        } else {
            error
        }
    })
}

fn change(mount: BorrowedFd<'_>, attributes: MountAttributes, recursive: bool) -> io::Result<()> {
    if attributes == MountAttributes::default() {
        return Ok(());
    }
    set_mount_attributes(mount, attributes, recursive)
}
