//! Attaching the root file system, filling it, and entering it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, chroot, fchdir, pivot_root};
use oci_spec::runtime::Spec;

use super::mounts::{self, Dev, Ready};
use super::{RootfsError, Sources, Tree, devices, masks, options};
use crate::kernel_calls::{MountAttributes, attach_mount, set_mount_attributes};
use crate::mountinfo::{self, Mount};

/// The root file system, attached in the container's mount namespace but not yet entered.
#[derive(Debug)]
pub struct Root {
    tree: Tree,
    sources: Sources,
}

fn enter_failed(step: &'static str) -> impl Fn(Errno) -> RootfsError {
    move |errno| RootfsError::Enter {
        step,
        source: errno.into(),
    }
}

impl Root {
    /// Attaches the root file system on top of `/`. The caller is in a mount
    /// namespace of its own; nothing that happens here reaches another.
    pub fn attach(sources: Sources) -> Result<Self, RootfsError> {
        let failed = enter_failed("separate the container's mounts from the guest's");
        let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).map_err(&failed)?;
        let directory =
            open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed)?;
        // The copy that was taken of the share may be shared; the container's is not.
        let private = MountAttributes {
            propagation: MsFlags::MS_PRIVATE.bits(),
            ..MountAttributes::default()
        };
        attach_mount(sources.root.as_fd(), directory.as_fd())
            .and_then(|()| set_mount_attributes(sources.root.as_fd(), private, true))
            .map_err(|source| RootfsError::Enter {
                step: "attach the root file system",
                source,
            })?;
        let tree = sources.root.try_clone().map(Tree::new);
        let tree = tree.map_err(|source| RootfsError::Enter {
            step: "duplicate a descriptor",
            source,
        })?;
        Ok(Self { tree, sources })
    }

    /// Makes every mount and device of the validated specification.
    pub fn fill(&self, spec: &Spec) -> Result<(), RootfsError> {
        let asked = spec.mounts().as_deref().unwrap_or_default();
        let dev = Dev::of(asked);
        if dev == Dev::Missing {
            mounts::mount_default_dev(&self.tree, self.sources.dev.as_ref())?;
        }
        let sources = &self.sources;
        let cgroup = (!mounts::own_cgroup_namespace(spec)).then_some(&sources.cgroup);
        let own_dev = asked.iter().rposition(mounts::is_dev);
        for (index, mount) in asked.iter().enumerate() {
            // Validated before anything was made.
            let Ok(options) = options::parse(index, mount) else {
                continue;
            };
            let dev = (own_dev == Some(index)).then_some(sources.dev.as_ref());
            let ready = Ready {
                bind: sources.binds[index].as_ref(),
                made: sources.made.get(&index).or(dev.flatten()),
                idmap: sources.idmaps[index].as_ref(),
                cgroup,
            };
            mounts::mount(&self.tree, mount, &options, ready)?;
        }
        if dev != Dev::Bound && sources.dev.is_none() {
            let dev = self.tree.make_directory(Path::new("/dev"));
            let dev = dev.map_err(|errno| RootfsError::Target {
                destination: "/dev".into(),
                source: errno.into(),
            })?;
            devices::make(&Tree::new(dev), spec)?;
        }
        Ok(())
    }

    /// The place where paths of the container are looked up.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Masks and write-protects what the specification names, the root at last.
    pub fn protect(&mut self, spec: &Spec) -> Result<(), RootfsError> {
        let nulls = &mut self.sources.nulls;
        if let Some(linux) = spec.linux() {
            for path in linux.readonly_paths().iter().flatten() {
                masks::make_readonly(&self.tree, Path::new(path))?;
            }
            for path in linux.masked_paths().iter().flatten() {
                let null = || nulls.pop().map_or_else(masks::open_null, Ok);
                masks::mask(&self.tree, Path::new(path), null)?;
            }
        }
        if spec
            .root()
            .as_ref()
            .and_then(oci_spec::runtime::Root::readonly)
            == Some(true)
        {
            masks::make_root_readonly(&self.tree)?;
        }
        Ok(())
    }

    /// Gives back the descriptor with which [`enter`] goes in; all others close.
    pub fn into_directory(self) -> OwnedFd {
        self.sources.root
    }
}

/// Leaves the caller with a mount namespace of its own in which the guest's
/// mounts cannot be reached: those that a user namespace inherits cannot be let
/// go of one by one.
pub fn leave_mounts_of_guest() -> Result<(), RootfsError> {
    let failed = enter_failed("leave the guest's mounts");
    unshare(CloneFlags::CLONE_NEWNS).map_err(&failed)?;
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).map_err(&failed)?;
    detach_mounts_of_initramfs()
}

/// Makes the attached root file system the process's root and lets go of every
/// other mount, unless the caller's parent has ([`leave_mounts_of_guest`]).
pub fn enter(
    root: &OwnedFd,
    propagation: Option<(MsFlags, bool)>,
    guest_left: bool,
) -> Result<(), RootfsError> {
    let failed = enter_failed("enter the root file system");
    let old = open(
        "/",
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(&failed)?;
    fchdir(root).map_err(&failed)?;
    match pivot_root(".", ".") {
        Ok(()) => {
            // The old root now lies over the new one.
            fchdir(&old).map_err(&failed)?;
            umount2(".", MntFlags::MNT_DETACH)
                .map_err(enter_failed("let go of the guest's root file system"))?;
        }
        // The kernel cannot move the initramfs away: it stays, emptied of
        // mounts and covered. `..` and chroot do not lead below the cover;
        // unmounting the cover does, and takes CAP_SYS_ADMIN.
        Err(Errno::EINVAL) => {
            if !guest_left {
                detach_mounts_of_initramfs()?;
            }
            chroot(".").map_err(&failed)?;
        }
        Err(errno) => return Err(failed(errno)),
    }
    chdir("/").map_err(failed)?;
    if let Some((propagation, recursive)) = propagation {
        let attributes = MountAttributes {
            propagation: propagation.bits(),
            ..MountAttributes::default()
        };
        set_mount_attributes(root.as_fd(), attributes, recursive).map_err(|source| {
            RootfsError::Enter {
                step: "set the root file system's propagation",
                source,
            }
        })?;
    }
    Ok(())
}

/// Unmounts what lies directly below the initial root, trees as a whole.
fn detach_mounts_of_initramfs() -> Result<(), RootfsError> {
    let failed = |source: io::Error| RootfsError::Enter {
        step: "list the guest's mounts",
        source,
    };
    let mounts = mountinfo::read().map_err(failed)?;
    for mount in children_of_root(&mounts) {
        umount2(&mount.point, MntFlags::MNT_DETACH)
            .map_err(enter_failed("let go of the guest's mounts"))?;
    }
    Ok(())
}

/// Mounts below the initial root, last mounted first, but for those on `/`
/// itself: one of them is the container's root.
fn children_of_root(mounts: &[Mount]) -> impl Iterator<Item = &Mount> {
    // Only the initial root is its own parent.
    let initial = mounts.iter().find(|mount| mount.id == mount.parent);
    mounts.iter().rev().filter(move |mount| {
        mount.point != Path::new("/")
            && initial.is_some_and(|root| mount.parent == root.id && mount.id != root.id)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_of_root_leaves_the_stacked_root_and_its_mounts() {
        let mounts = mountinfo::parse(
            b"\
1 1 0:2 / / rw - rootfs rootfs rw
20 1 0:20 / /proc rw - proc proc rw
21 1 0:21 / /with\\040space rw - tmpfs t rw
22 21 0:22 / /with\\040space/below rw - tmpfs t rw
30 1 0:30 / / rw - virtiofs share rw
31 30 0:31 / /proc rw - proc proc rw
",
        );
        let points: Vec<_> = children_of_root(&mounts)
            .map(|mount| &mount.point)
            .collect();
        assert_eq!(points, [Path::new("/with space"), Path::new("/proc")]);
    }
}
