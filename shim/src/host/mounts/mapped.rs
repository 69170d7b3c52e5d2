//! Root file systems whose files are shown with other owners.
//!
//! The kernel maps ids by mount, and only before a mount is attached. So the file
//! system is made in a mount namespace of a thread that ends with it, and taken from
//! there: whatever fails, nothing has to be unmounted.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, Mode, OFlags, open};
use rustix::io::{Errno, Result};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount_change, move_mount, open_tree,
};

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
    taken_from(target, || {
        // Each over itself, so that the options lead to it.
        for layer in lower_layers(options) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let layer = open(&layer, flags, Mode::empty())?;
            let mapped = open_tree(&layer, "", COPY | OpenTreeFlags::AT_EMPTY_PATH)?;
            mount_attributes::map_ids(mapped.as_fd(), maps)?;
            // By what was opened: a link is no place for a mount.
            let flags =
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            move_mount(&mapped, "", &layer, "", flags)?;
        }
        make()
    })
}

fn taken_from(target: &Path, make: impl FnOnce() -> Result<()> + Send) -> Result<OwnedFd> {
    // What the host unmounts meanwhile goes here too, or its devices would stay in use.
    let following = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS)
                .map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
            mount_change("/", following)?;
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
    use crate::host::id_maps::IdMaps;
    use crate::host::mounts::attach;
    use crate::host::mounts::tests::{owner, private_mounts, tmpfs_at};

    #[test]
    fn whole_lets_go_of_what_the_host_unmounts_meanwhile() {
        let Some(base) = private_mounts() else { return };
        mount_change(base.path(), MountPropagationFlags::SHARED).expect("shares");
        let at = |name: &str| base.path().join(name);
        for name in ["other", "target"] {
            std::fs::create_dir(at(name)).expect("makes");
        }
        tmpfs_at(&at("other"));
        let (go, gone) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
        let other = at("other");
        let host = std::thread::spawn(move || {
            go.1.recv().expect("is told");
            rustix::mount::unmount(&other, rustix::mount::UnmountFlags::empty()).expect("unmounts");
            gone.0.send(()).expect("tells");
        });
        let maps = IdMaps::of_options("0:65536:10", "0:65536:10").expect("maps");
        let maps = maps.namespace().expect("namespace");
        let held = std::sync::Mutex::new((go.0, gone.1, String::new()));
        let make = || {
            let mut held = held.lock().expect("unpoisoned");
            held.0.send(()).expect("tells");
            held.1.recv().expect("is told");
            held.2 = std::fs::read_to_string("/proc/thread-self/mountinfo").expect("table");
            tmpfs_at(&at("target"));
            Ok(())
        };
        whole(&at("target"), maps.as_fd(), make).expect("mounts");
        host.join().expect("has unmounted");
        let seen = held.into_inner().expect("unpoisoned").2;
        assert!(!seen.contains("/other "), "{seen}");
        // Nothing of it came out.
        let table = std::fs::read_to_string("/proc/thread-self/mountinfo").expect("table");
        assert!(!table.contains("/target "), "{table}");
    }

    #[test]
    fn overlay_of_a_layer_by_a_link_maps_it() {
        let Some(base) = private_mounts() else { return };
        let at = |name: &str| base.path().join(name);
        for name in ["a", "b", "target"] {
            std::fs::create_dir(at(name)).expect("makes");
        }
        for file in ["a/of-a", "b/of-b"] {
            std::fs::write(at(file), "").expect("writes");
        }
        std::os::unix::fs::symlink("b", at("link")).expect("links");
        let maps = IdMaps::of_options("0:65536:10", "0:65536:10").expect("maps");
        let maps = maps.namespace().expect("namespace");
        let data = format!("lowerdir={}:{}", at("link").display(), at("a").display());
        let make = || {
            let data = std::ffi::CString::new(data.as_str()).expect("no NUL");
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("overlay", at("target"), "overlay", flags, Some(&*data))
        };
        let tree = overlay(&at("target"), &[&data], maps.as_fd(), make).expect("mounts");
        attach(&tree, &at("target")).expect("attaches");
        for file in ["of-a", "of-b"] {
            assert_eq!(owner(&at("target").join(file)), (65536, 65536), "{file}");
        }
    }

    #[test]
    fn lower_layers_are_apart_at_colons_that_are_not_escaped() {
        let layers = lower_layers(&["upperdir=/u", "lowerdir=/a/1:/b\\:c:/d\\\\e"]);
        assert_eq!(layers, ["/a/1", "/b:c", "/d\\e"].map(PathBuf::from));
        assert!(lower_layers(&["upperdir=/u"]).is_empty());
    }
}
