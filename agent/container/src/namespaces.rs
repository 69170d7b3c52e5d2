//! `linux.namespaces`: which are new, which are the pod's.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use crate::Unsupported;
use crate::kernel_calls::namespace_type;
use crate::rootfs::open_below_as;

/// What failed with a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    #[error("cannot open namespace {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not a namespace of type {expected}")]
    Type { path: PathBuf, expected: String },
    #[error("cannot join namespace {path}")]
    Join {
        path: PathBuf,
        #[source]
        source: Errno,
    },
    #[error("cannot make a time namespace")]
    Time(#[source] Errno),
    #[error("cannot set linux.timeOffsets to {offsets}")]
    TimeOffsets {
        offsets: String,
        #[source]
        source: io::Error,
    },
}

fn namespaces(spec: &Spec) -> &[LinuxNamespace] {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_deref())
        .unwrap_or_default()
}

fn flag(kind: LinuxNamespaceType) -> CloneFlags {
    match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Time => NEW_TIME,
    }
}

/// As `config.json` spells it.
fn name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "network",
        LinuxNamespaceType::Time => "time",
    }
}

fn path(namespace: &LinuxNamespace) -> Option<&Path> {
    let path = namespace.path().as_deref();
    path.filter(|path| !path.as_os_str().is_empty())
}

/// `CLONE_NEWTIME` of linux/sched.h, which nix does not name and only [`make_time`] makes.
pub const NEW_TIME: CloneFlags = CloneFlags::from_bits_retain(0x80);

/// What is to be new.
pub fn new_ones(spec: &Spec) -> CloneFlags {
    namespaces(spec)
        .iter()
        .filter(|namespace| path(namespace).is_none())
        .fold(CloneFlags::empty(), |flags, namespace| {
            flags | flag(namespace.typ())
        })
}

/// Refuses namespaces that the container would share with the agent, and types
/// that are not there yet.
pub fn check(spec: &Spec) -> Result<(), Unsupported> {
    let refuse = |kind: LinuxNamespaceType, reason: &str| {
        Err(Unsupported::new(
            format!("linux.namespaces: {}", name(kind)),
            reason,
        ))
    };
    let mut seen = CloneFlags::empty();
    for namespace in namespaces(spec) {
        let kind = namespace.typ();
        if seen.contains(flag(kind)) {
            return refuse(kind, "is named twice");
        }
        seen |= flag(kind);
        match kind {
            LinuxNamespaceType::Time if path(namespace).is_some() => {
                return refuse(
                    kind,
                    "a time namespace cannot be joined: set the same offsets",
                );
            }
            LinuxNamespaceType::Mount if path(namespace).is_some() => {
                return refuse(kind, "a mount namespace cannot be joined");
            }
            _ => {}
        }
    }
    for (kind, reason) in [
        (
            LinuxNamespaceType::Pid,
            "the agent's own is never shared: name a new one or the pod's",
        ),
        (
            LinuxNamespaceType::Mount,
            "a container needs a mount namespace of its own",
        ),
        (
            LinuxNamespaceType::Network,
            "the agent's own is never shared: name a new one or the pod's",
        ),
        (
            LinuxNamespaceType::Ipc,
            "the agent's own is never shared: name a new one or the pod's",
        ),
        (
            LinuxNamespaceType::Uts,
            "the agent's own is never shared: name a new one or the pod's",
        ),
    ] {
        if !seen.contains(flag(kind)) {
            return refuse(kind, reason);
        }
    }
    let own_user = new_ones(spec).contains(flag(LinuxNamespaceType::User));
    if own_user && !own_pid(spec) {
        // Its root has no privilege over what another made: not even ptrace.
        return refuse(
            LinuxNamespaceType::Pid,
            "cannot be shared by a container with a user namespace of its own: join the pod's",
        );
    }
    Ok(())
}

/// Whether the container's init is the first process of its PID namespace.
fn own_pid(spec: &Spec) -> bool {
    new_ones(spec).contains(flag(LinuxNamespaceType::Pid))
}

/// Makes the new time namespace that the caller's children will be in, with
/// `linux.timeOffsets`. Before the first of them: it cannot be changed later.
pub fn make_time(spec: &Spec) -> Result<(), NamespaceError> {
    unshare(flag(LinuxNamespaceType::Time)).map_err(NamespaceError::Time)?;
    let linux = spec.linux().as_ref();
    let offsets = linux.and_then(|linux| linux.time_offsets().as_ref());
    let mut lines = String::new();
    for (clock, offset) in offsets.into_iter().flatten() {
        let (secs, nanosecs) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        let _ = writeln!(lines, "{clock} {secs} {nanosecs}");
    }
    if lines.is_empty() {
        return Ok(());
    }
    fs::write("/proc/self/timens_offsets", &lines).map_err(|source| NamespaceError::TimeOffsets {
        offsets: lines.trim_end().replace('\n', ", "),
        source,
    })
}

/// Refuses offsets that no clock or no namespace is there for.
pub fn check_time_offsets(spec: &Spec) -> Result<(), Unsupported> {
    let linux = spec.linux().as_ref();
    let offsets = linux.and_then(|linux| linux.time_offsets().as_ref());
    for (clock, offset) in offsets.into_iter().flatten() {
        let field = format!("linux.timeOffsets.{clock}");
        if !["monotonic", "boottime"].contains(&clock.as_str()) {
            return Err(Unsupported::new(field, "is no clock of a time namespace"));
        }
        if !new_ones(spec).contains(flag(LinuxNamespaceType::Time)) {
            let reason = "needs a namespace of type time in linux.namespaces";
            return Err(Unsupported::new(field, reason));
        }
        // NSEC_PER_SEC, by proc_timens_set_offset
        if offset.nanosecs().unwrap_or(0) > 999_999_999 {
            return Err(Unsupported::new(field, "nanosecs is more than 999999999"));
        }
    }
    Ok(())
}

/// A namespace that is named by a path.
#[derive(Debug)]
struct Named {
    path: PathBuf,
    kind: LinuxNamespaceType,
    descriptor: OwnedFd,
}

impl Named {
    fn join(&self) -> Result<(), NamespaceError> {
        setns(&self.descriptor, flag(self.kind)).map_err(|source| NamespaceError::Join {
            path: self.path.clone(),
            source,
        })
    }
}

/// A user namespace that is joined by path, and a PID namespace if that is joined too.
#[derive(Debug)]
pub struct Owner(Vec<Named>);

impl Owner {
    /// Joins them. The caller then has every privilege over what the user namespace
    /// owns, and none over anything else; the PID namespace takes its children.
    pub fn enter(&self) -> Result<(), NamespaceError> {
        self.0.iter().try_for_each(Named::join)
    }
}

/// Joins every namespace that is named by a path below `pod_dir`, but for the user
/// namespace, in which the caller would lose its privileges. With that goes the PID
/// namespace: what enters the one has children in the other.
pub fn join(spec: &Spec, pod_dir: &Path) -> Result<Option<Owner>, NamespaceError> {
    let mut named = Vec::new();
    for namespace in namespaces(spec) {
        if let Some(path) = path(namespace) {
            named.push(Named {
                path: path.to_owned(),
                kind: namespace.typ(),
                descriptor: open(path, flag(namespace.typ()), pod_dir)?,
            });
        }
    }
    let is_user = |one: &Named| one.kind == LinuxNamespaceType::User;
    let has_owner = named.iter().any(is_user);
    let (mut last, first): (Vec<_>, Vec<_>) = named
        .into_iter()
        .partition(|one| is_user(one) || (has_owner && one.kind == LinuxNamespaceType::Pid));
    first.iter().try_for_each(Named::join)?;
    last.sort_by_key(|one| !is_user(one));
    Ok(has_owner.then_some(Owner(last)))
}

/// Joins the namespaces of a container by its init, as they are when it is
/// called; the PID namespace takes the caller's later children alone. A kind
/// that the container shares with the agent is joined again, to no effect; but
/// for the user namespace, to which the kernel does not let anybody return. The
/// caller's root and working directory become the container's.
pub fn join_those_of(init: &OwnedFd, own_user_namespace: bool) -> Result<(), Errno> {
    let user = own_user_namespace.then_some(LinuxNamespaceType::User);
    let kinds = [
        LinuxNamespaceType::Time,
        LinuxNamespaceType::Cgroup,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Network,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Mount,
    ];
    let kinds = kinds.into_iter().chain(user).map(flag);
    setns(init, kinds.fold(CloneFlags::empty(), CloneFlags::union))
}

fn open(path: &Path, expected: CloneFlags, pod_dir: &Path) -> Result<OwnedFd, NamespaceError> {
    let descriptor =
        open_below_as(&[pod_dir], path, OFlag::O_RDONLY | OFlag::O_NONBLOCK).map_err(|source| {
            NamespaceError::Open {
                path: path.to_owned(),
                source,
            }
        })?;
    match namespace_type(descriptor.as_fd()) {
        Ok(kind) if kind == expected => Ok(descriptor),
        _ => Err(NamespaceError::Type {
            path: path.to_owned(),
            expected: format!("{expected:?}"),
        }),
    }
}
