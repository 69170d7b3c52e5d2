//! The container's mounts, in the order of the specification.

use std::ffi::CString;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use oci_spec::runtime::Mount;

use super::options::{self, FileSystem, Kind, Options};
use super::sources::Bind;
use super::{RootfsError, Tree};
use crate::kernel_calls::{
    MountAttributes, attach_mount, fsconfig_create, fsconfig_set, fsmount, fsopen, mount_attr,
    set_mount_attributes,
};

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
    let configured = (|| {
        for (key, value) in parameters {
            let value = value.as_deref().map(c_string).transpose()?;
            fsconfig_set(context.as_fd(), &c_string(key)?, value.as_deref())?;
        }
        fsconfig_create(context.as_fd())
    })();
    configured.map_err(|error| with_kernel_message(error, &context))?;
    fsmount(context.as_fd(), attributes)
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

/// The container's `/dev` where the specification mounts none: the root file
/// system itself never has devices.
pub fn mount_default_dev(tree: &Tree) -> Result<(), RootfsError> {
    let destination = Path::new("/dev");
    let parameter = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
    let mount = new_file_system(
        "tmpfs",
        &[parameter("mode", "755"), parameter("size", "65536k")],
        mount_attr::NOSUID | mount_attr::STRICTATIME,
    );
    let failed = |source| RootfsError::Mount {
        what: "tmpfs".into(),
        destination: destination.into(),
        source,
    };
    let target = find_target(tree, destination, true)?;
    attach_mount(mount.map_err(failed)?.as_fd(), target.as_fd()).map_err(failed)
}

/// Whether `mount` puts something at `/dev`, and what.
fn is_dev(mount: &Mount) -> bool {
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
        let last = mounts.iter().enumerate().rev().find(|(_, m)| is_dev(m));
        match last.map(|(index, mount)| options::parse(index, mount)) {
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

/// Makes one mount of the specification.
pub fn mount(
    tree: &Tree,
    mount: &Mount,
    options: &Options,
    bind: Option<&Bind>,
    cgroup: Option<&OwnedFd>,
) -> Result<(), RootfsError> {
    let destination = mount.destination();
    let what = match options.kind {
        Kind::Bind { .. } => mount.source().clone().unwrap_or_default(),
        Kind::New(file_system) => PathBuf::from(file_system.name()),
    };
    let failed = |source| RootfsError::Mount {
        what: what.display().to_string(),
        destination: destination.clone(),
        source,
    };
    let is_directory = bind.is_none_or(|bind| bind.is_directory);
    let target = find_target(tree, destination, is_directory)?;
    check_not_inside_proc(target.as_fd(), destination)?;

    let new;
    let mounted = match (options.kind, bind, cgroup) {
        (Kind::Bind { .. }, Some(bind), _) => {
            change(bind.mount.as_fd(), options.attributes, false).map_err(failed)?;
            bind.mount.as_fd()
        }
        // Without a cgroup namespace of its own, the whole hierarchy would be
        // the file system's root: only the container's part of it is shown.
        (Kind::New(FileSystem::Cgroup), _, Some(cgroup)) => {
            change(cgroup.as_fd(), options.attributes, false).map_err(failed)?;
            cgroup.as_fd()
        }
        (Kind::New(file_system), ..) => {
            let parameters = parameters(file_system, mount, options);
            new = new_file_system(file_system.name(), &parameters, options.attributes.set)
                .map_err(failed)?;
            new.as_fd()
        }
        (Kind::Bind { .. }, None, _) => return Err(failed(io::ErrorKind::NotFound.into())),
    };
    change(mounted, options.recursive_attributes, true).map_err(failed)?;
    attach_mount(mounted, target.as_fd()).map_err(failed)?;
    for (propagation, recursive) in &options.propagation {
        let attributes = MountAttributes {
            propagation: propagation.bits(),
            ..MountAttributes::default()
        };
        change(mounted, attributes, *recursive).map_err(failed)?;
    }
    Ok(())
}

fn parameters(
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

fn change(mount: BorrowedFd<'_>, attributes: MountAttributes, recursive: bool) -> io::Result<()> {
    if attributes == MountAttributes::default() {
        return Ok(());
    }
    set_mount_attributes(mount, attributes, recursive)
}
