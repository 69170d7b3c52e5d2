//! The creator's side of creation.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxResources, Spec};

use crate::cgroup::{Cgroup, CgroupError};
use crate::container::Container;
use crate::control::Request;
use crate::launch::{ContainerStdio, LaunchError, document, launch};
use crate::process::Process;
use crate::rootfs::own_cgroup_namespace;
use crate::spec_support::{self, Unsupported};
use crate::user_namespace;

/// What [`create`] needs.
#[derive(Debug)]
pub struct CreateOptions<'a> {
    /// The container's identity; names its cgroup unless the specification does.
    pub id: &'a str,
    /// Where the container's bundle is on the host, for `startContainer` hooks.
    pub bundle: &'a Path,
    /// The configuration, as [`crate::parse`] returns it.
    pub spec: &'a Spec,
    /// The init's standard streams. The creator's copies are closed when
    /// [`create`] returns.
    pub stdio: ContainerStdio,
    /// `root.path` lies below this, the source of every bind mount below this or
    /// `pod_dir`; on the way from here there is no symbolic link.
    pub share_dir: &'a Path,
    /// Namespaces that are joined by path lie below this.
    pub pod_dir: &'a Path,
    /// The containers' parent cgroup (cgroup v2): it exists, has no process in
    /// it, and everything below it is this crate's.
    pub cgroup_root: &'a Path,
}

/// Why a container was not created. Whatever had been made is gone again.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The specification asks for what is not supported.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The identity cannot name a cgroup.
    #[error("{id:?} cannot name a container's cgroup")]
    Id {
        /// The identity.
        id: String,
    },
    /// `process.terminal` says one thing, the streams another.
    #[error("process.terminal is {terminal}, which the container's standard streams are not")]
    Stdio {
        /// What the specification says.
        terminal: bool,
    },
    /// The container's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Its init was not made.
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

/// Creates a container up to the point where its init waits to be started:
/// namespaces, mounts, cgroup and limits are there, and the program was found.
///
/// Blocks on file systems and on the helper: not for an async executor's thread.
/// The helper and the init become children of the calling process, which must
/// reap them; nothing here waits for them.
///
/// # Errors
/// Of which [`CreateError::Unsupported`], [`CreateError::Id`],
/// [`CreateError::Stdio`] and [`CgroupError::Exists`] are the caller's. Whatever
/// the error, no process, mount or cgroup is left.
pub fn create(options: CreateOptions<'_>) -> Result<Container, CreateError> {
    let spec = options.spec;
    spec_support::validate(spec)?;
    let asked = spec.process().as_ref();
    let terminal = asked.and_then(oci_spec::runtime::Process::terminal) == Some(true);
    if terminal != options.stdio.is_terminal() {
        return Err(CreateError::Stdio { terminal });
    }
    let resources = resources(spec);
    let path = cgroup_path(options.id, spec)?;
    let cgroup = Cgroup::create(options.cgroup_root, &path, resources)?;
    let result = delegate(&cgroup, spec).and_then(|()| {
        let launched = launch_init(&options, &cgroup)?;
        cgroup.limit_processes(resources)?;
        Ok(launched)
    });
    // The container alone holds its streams now: their end is its end.
    drop(options);
    match result {
        Ok((init, reported)) => {
            let mut warnings = spec_support::warnings(spec);
            warnings.extend(reported);
            Ok(Container::new(cgroup, init, warnings, spec))
        }
        Err(error) => {
            // The first error is the one to tell.
            let _ = cgroup.remove();
            Err(error)
        }
    }
}

/// A container's root in a user namespace may divide its own cgroup, if it sees
/// no other.
fn delegate(cgroup: &Cgroup, spec: &Spec) -> Result<(), CreateError> {
    let Some(maps) = user_namespace::of_spec(spec).filter(|_| own_cgroup_namespace(spec)) else {
        return Ok(());
    };
    match (maps.guest_uid(0), maps.guest_gid(0)) {
        (Some(uid), Some(gid)) => Ok(cgroup.delegate(uid, gid)?),
        _ => Ok(()),
    }
}

fn resources(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref()?.resources().as_ref()
}

/// Relative to the containers' parent.
fn cgroup_path(id: &str, spec: &Spec) -> Result<PathBuf, CreateError> {
    let asked = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.cgroups_path().as_ref())
        .filter(|path| !path.as_os_str().is_empty());
    if let Some(path) = asked {
        return Ok(path.clone());
    }
    if id.is_empty() || id == "." || id == ".." || id.contains(['/', '\0']) {
        return Err(CreateError::Id { id: id.to_owned() });
    }
    Ok(id.into())
}

fn launch_init(
    options: &CreateOptions<'_>,
    cgroup: &Cgroup,
) -> Result<(Process, Vec<String>), CreateError> {
    let specification = document(options.spec)?;
    let directory = cgroup.open()?;
    let request = Request::Create {
        id: options.id.to_owned(),
        bundle: options.bundle.to_owned(),
        share_dir: options.share_dir.to_owned(),
        pod_dir: options.pod_dir.to_owned(),
        terminal: options.stdio.is_terminal(),
    };
    let descriptors = [specification.as_fd(), directory.as_fd()];
    // Validated before anything was made.
    let process = options.spec.process().clone().unwrap_or_default();
    Ok(launch(&request, &descriptors, &options.stdio, &process)?)
}
