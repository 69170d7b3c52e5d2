//! What the container's mounts are copies of, taken before the mount namespace
//! is left.
//!
//! The file server announces the host's mounts (each root file system, each
//! volume) as mount points, which the kernel mounts when they are first walked
//! into: in the namespace of whoever walks, as a superblock of its own. Taken in
//! the agent's namespace, they are one superblock for the whole pod: containers
//! that share a volume see the same inodes, and the agent can sync what a
//! container wrote.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sys::stat::{SFlag, fstat};
use oci_spec::runtime::Spec;

use super::options::{self, Kind};
use super::{RootfsError, tree::open_below};
use crate::kernel_calls::clone_mount;

/// A detached copy of a bind mount's source.
#[derive(Debug)]
pub struct Bind {
    pub mount: OwnedFd,
    pub is_directory: bool,
}

/// Detached mounts, in no namespace yet.
#[derive(Debug)]
pub struct Sources {
    pub root: OwnedFd,
    /// For each of `mounts[]`; `None` where it is not a bind mount.
    pub binds: Vec<Option<Bind>>,
    /// The container's cgroup, for a `/sys/fs/cgroup` without a cgroup namespace.
    pub cgroup: OwnedFd,
}

impl Sources {
    /// Takes everything the validated `spec` names. In the agent's mount namespace.
    pub fn open(
        spec: &Spec,
        share_dir: &Path,
        pod_dir: &Path,
        cgroup: &OwnedFd,
    ) -> Result<Self, RootfsError> {
        let root_path = spec.root().as_ref().map(|root| root.path().clone());
        let root_path = root_path.unwrap_or_default();
        let root = open_below(&[share_dir], &root_path)
            .and_then(|directory| clone_mount(directory.as_fd(), true))
            .map_err(|source| RootfsError::Root {
                path: root_path,
                source,
            })?;
        let cgroup = clone_mount(cgroup.as_fd(), false).map_err(|source| RootfsError::Source {
            path: "its cgroup".into(),
            destination: "/sys/fs/cgroup".into(),
            source,
        })?;
        let mut binds = Vec::new();
        for (index, mount) in spec.mounts().iter().flatten().enumerate() {
            binds.push(
                match options::parse(index, mount).map(|options| options.kind) {
                    Ok(Kind::Bind { recursive }) => {
                        let path = mount.source().clone().unwrap_or_default();
                        let bind = open_bind(&[share_dir, pod_dir], &path, recursive);
                        Some(bind.map_err(|source| RootfsError::Source {
                            path,
                            destination: mount.destination().clone(),
                            source,
                        })?)
                    }
                    _ => None,
                },
            );
        }
        Ok(Self {
            root,
            binds,
            cgroup,
        })
    }
}

fn open_bind(directories: &[&Path], path: &Path, recursive: bool) -> std::io::Result<Bind> {
    let source = open_below(directories, path)?;
    let kind = SFlag::from_bits_truncate(fstat(&source)?.st_mode) & SFlag::S_IFMT;
    Ok(Bind {
        mount: clone_mount(source.as_fd(), recursive)?,
        is_directory: kind == SFlag::S_IFDIR,
    })
}
