//! A uid and gid of its own for each pod, so that one pod's monitor has no
//! rights over another's, not even those of the same user.
//!
//! The slots are symbolic links named by their uid in `ROOT/uids/`, whose text
//! is the pod that has the slot: made with their text in one step, and by one
//! claimer only. A slot is freed by removing its link, which is done when the
//! pod's last process is gone and not before.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// The uids, and gids of the same numbers, of pods. Above every range that
/// systemd reserves for containers (it ends at 1879048191) and below its next
/// (2147352576, systemd's UIDS-GIDS.md); useradd's subordinate uids end at
/// 600100000 (`SUB_UID_MAX`).
pub const UIDS: Range<u32> = 2_000_000_000..2_000_065_536;

/// Why no uid can be had.
#[derive(Debug, Error)]
pub enum Error {
    /// All are taken.
    #[error("all {count} uids of pods are taken: look for stale files in {directory}")]
    Exhausted {
        /// How many there are.
        count: usize,
        /// Where they are listed.
        directory: PathBuf,
    },
    /// A slot's file cannot be made, read or removed.
    #[error("{operation} uid slot {path}")]
    Io {
        /// As in "claim".
        operation: &'static str,
        /// Its file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

fn slot(root: &Path, uid: u32) -> PathBuf {
    root.join("uids").join(uid.to_string())
}

/// Claims a free uid for `owner` (`NAMESPACE/POD`).
pub fn claim(root: &Path, owner: &str) -> Result<u32, Error> {
    let directory = root.join("uids");
    fs::create_dir_all(&directory).map_err(failed("make the directory of the", &directory))?;
    // Not the first free one: with a start of its own for each pod, a claim
    // rarely meets a taken slot, and a uid is rarely used again soon.
    let start = owner.bytes().fold(0_u32, |hash, byte| {
        hash.wrapping_mul(31).wrapping_add(byte.into())
    });
    let count = UIDS.end - UIDS.start;
    for offset in 0..count {
        let uid = UIDS.start + start.wrapping_add(offset) % count;
        let path = slot(root, uid);
        match symlink(owner, &path) {
            Ok(()) => return Ok(uid),
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(failed("claim", &path)(source)),
        }
    }
    Err(Error::Exhausted {
        count: UIDS.len(),
        directory,
    })
}

/// Frees every uid of `owner`. Only when no process has it any more.
/// Idempotent.
pub fn release(root: &Path, owner: &str) -> Result<(), Error> {
    let directory = root.join("uids");
    let slots = match fs::read_dir(&directory) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed("list", &directory))?,
    };
    for slot in slots.flatten() {
        let path = slot.path();
        // Gone meanwhile: another pod freed its own.
        if fs::read_link(&path).is_ok_and(|text| text == Path::new(owner)) {
            match fs::remove_file(&path) {
                Err(source) if source.kind() == io::ErrorKind::NotFound => {}
                other => other.map_err(failed("free", &path))?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn claim_for_many_pods_gives_each_its_own() {
        let root = tempfile::tempdir().expect("directory");
        let uids: BTreeSet<_> = (0..200)
            .map(|pod| claim(root.path(), &format!("default/{pod}")).expect("is free"))
            .collect();
        assert_eq!(uids.len(), 200);
        assert!(uids.iter().all(|uid| UIDS.contains(uid)));
    }

    #[test]
    fn release_by_another_leaves_the_slot() {
        let root = tempfile::tempdir().expect("directory");
        let uid = claim(root.path(), "default/a").expect("is free");
        let taken = || slot(root.path(), uid).is_symlink();
        release(root.path(), "default/b").expect("has nothing to do");
        assert!(taken());
        release(root.path(), "default/a").expect("frees");
        release(root.path(), "default/a").expect("frees what is free");
        assert!(!taken());
    }
}
