//! What the container's mounts are copies of, taken before the mount namespace
//! is left.
//!
//! The file server announces the host's mounts (each root file system, each
//! volume) as mount points, which the kernel mounts when they are first walked
//! into: in the namespace of whoever walks, as a superblock of its own. Taken in
//! the agent's namespace, they are one superblock for the whole pod: containers
//! that share a volume see the same inodes, and the agent can sync what a
//! container wrote.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sys::stat::{SFlag, fstat};
use oci_spec::runtime::Spec;

use super::mounts::{Dev, map_ids, new_dev};
use super::options::{self, Idmap, Kind};
use super::{RootfsError, Tree, devices, masks, tree::open_below};
use crate::kernel_calls::clone_mount;
use crate::user_namespace::{self, IdMaps};

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
    /// For each of `mounts[]`, the user namespace whose maps it has.
    pub idmaps: Vec<Option<OwnedFd>>,
    /// The container's cgroup, for a `/sys/fs/cgroup` without a cgroup namespace.
    pub cgroup: OwnedFd,
    /// File systems of a container in a user namespace, by their place in `mounts[]`.
    pub made: HashMap<usize, OwnedFd>,
    /// The `/dev` of such a container, with its devices.
    pub dev: Option<OwnedFd>,
    /// The guest's `/dev/null` for each of such a container's masked files.
    pub nulls: Vec<OwnedFd>,
}

impl Sources {
    /// Takes everything the validated `spec` names. In the agent's mount namespace.
    pub fn open(
        spec: &Spec,
        share_dir: &Path,
        pod_dir: &Path,
        cgroup: &OwnedFd,
        procfs: &OwnedFd,
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
        let (mut binds, mut idmaps) = (Vec::new(), Vec::new());
        for (index, mount) in spec.mounts().iter().flatten().enumerate() {
            let failed = |source| RootfsError::Source {
                path: mount.source().clone().unwrap_or_default(),
                destination: mount.destination().clone(),
                source,
            };
            // Validated before anything was made.
            let Ok(options) = options::parse(index, mount) else {
                continue;
            };
            let idmap = options::id_maps(&options, mount, spec)
                .map(|maps| maps.namespace(procfs))
                .transpose()
                .map_err(failed)?;
            let bind = match options.kind {
                Kind::Bind { recursive } => {
                    let path = mount.source().clone().unwrap_or_default();
                    let bind =
                        open_bind(&[share_dir, pod_dir], &path, recursive).map_err(failed)?;
                    if let Some(namespace) = &idmap {
                        let recursive = options.idmap == Some(Idmap::Recursive);
                        map_ids(bind.mount.as_fd(), namespace.as_fd(), recursive)
                            .map_err(failed)?;
                    }
                    Some(bind)
                }
                Kind::New(_) | Kind::Remount => None,
            };
            binds.push(bind);
            idmaps.push(idmap);
        }
        let mut sources = Self {
            root,
            binds,
            idmaps,
            cgroup,
            made: HashMap::new(),
            dev: None,
            nulls: Vec::new(),
        };
        if let Some(maps) = user_namespace::of_spec(spec) {
            sources.prepare_for(maps, spec)?;
        }
        Ok(sources)
    }

    /// Takes what a container in a user namespace could not make or reach itself.
    fn prepare_for(&mut self, maps: IdMaps<'_>, spec: &Spec) -> Result<(), RootfsError> {
        let mounts = spec.mounts().as_deref().unwrap_or_default();
        if Dev::of(mounts) != Dev::Bound {
            let dev = new_dev(mounts, maps)?;
            let tree = dev.try_clone().map(Tree::new);
            let tree = tree.map_err(|source| RootfsError::Enter {
                step: "duplicate a descriptor",
                source,
            })?;
            devices::make(&tree, spec)?;
            self.dev = Some(dev);
        }
        let masked = spec.linux().as_ref();
        let masked = masked.and_then(|linux| linux.masked_paths().as_ref());
        for _ in masked.into_iter().flatten() {
            self.nulls.push(masks::open_null()?);
        }
        Ok(())
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
