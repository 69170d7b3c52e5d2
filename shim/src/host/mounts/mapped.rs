//! Root file systems whose files are shown with other owners.
//!
//! The kernel maps ids by mount, and only before a mount is attached. So the file
//! system is made in a mount namespace of a thread that ends with it, and taken from
//! there: whatever fails, nothing has to be unmounted.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::CWD;
use rustix::io::{Errno, Result};
use rustix::mount::{MountPropagationFlags, OpenTreeFlags, mount_change, open_tree};

use super::attach;
use crate::host::mount_attributes;

const COPY: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC);

/// What `make` mounts at `target`, with its ids mapped.
pub(super) fn whole(
    target: &Path,
    maps: BorrowedFd<'_>,
    make: impl FnOnce() -> Result<()> + Send,
) -> Result<OwnedFd> {
    let tree = taken_from(target, make)?;
    mount_attributes::map_ids(tree.as_fd(), maps)?;
    Ok(tree)
}

/// The overlay that `make` mounts at `target`, of lower layers with their ids mapped.
/// The upper one stays as it is: the snapshotter has made it for the mapped users.
pub(super) fn overlay(
    target: &Path,
    options: &[&str],
    maps: BorrowedFd<'_>,
    make: impl FnOnce() -> Result<()> + Send,
) -> Result<OwnedFd> {
    let layers = lower_layers(options);
    taken_from(target, || {
        // Each over itself, so that the options lead to them.
        for layer in &layers {
            let mapped = open_tree(CWD, layer, COPY)?;
            mount_attributes::map_ids(mapped.as_fd(), maps)?;
            attach(&mapped, layer)?;
        }
        make()
    })
}

fn taken_from(target: &Path, make: impl FnOnce() -> Result<()> + Send) -> Result<OwnedFd> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS)
                .map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
            mount_change("/", private)?;
            make()?;
            open_tree(CWD, target, COPY)
        });
        worker.join().unwrap_or(Err(Errno::IO))
    })
}

/// Of `lowerdir=`, in which a backslash is before a colon that is part of a name
/// (Linux, Documentation/filesystems/overlayfs.rst).
fn lower_layers(options: &[&str]) -> Vec<PathBuf> {
    let mut options = options.iter();
    let layers = options.find_map(|option| option.strip_prefix("lowerdir="));
    let mut found = Vec::new();
    let mut layer = String::new();
    let mut characters = layers.unwrap_or_default().chars();
    while let Some(character) = characters.next() {
        match character {
            ':' => found.push(std::mem::take(&mut layer)),
            '\\' => layer.extend(characters.next()),
            other => layer.push(other),
        }
    }
    found.push(layer);
    found.retain(|layer| !layer.is_empty());
    found.into_iter().map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_layers_are_apart_at_colons_that_are_not_escaped() {
        let layers = lower_layers(&["upperdir=/u", "lowerdir=/a/1:/b\\:c:/d\\\\e"]);
        assert_eq!(layers, ["/a/1", "/b:c", "/d\\e"].map(PathBuf::from));
        assert!(lower_layers(&["upperdir=/u"]).is_empty());
    }
}
