//! What the containers of the pod share: the share's mount, `/dev/shm`, and
//! namespaces, which are never the agent's own.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use agent_container::mountinfo::{self, Mount};
use agent_protocol::{POD_DIR, REMOTE_DIR, SHARE_DIR, api::CreatePodRequest};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::syncfs,
};
use thiserror::Error;

use crate::namespaces;

const DEFAULT_SHM_BYTES: u64 = 64 * 1024 * 1024;
/// How long the server of a remote volume may take to write what it was given.
const REMOTE_SYNC_TIMEOUT: Duration = Duration::from_secs(5);
/// `HOST_NAME_MAX` of Linux.
const MAX_HOSTNAME_BYTES: usize = 64;

/// What failed while the pod was prepared or left.
#[derive(Debug, Error)]
pub enum PodError {
    /// The request cannot be a pod.
    #[error("hostname of {bytes} bytes: at most {MAX_HOSTNAME_BYTES}")]
    Hostname {
        /// Its length.
        bytes: usize,
    },
    /// The share or the pod's tmpfs.
    #[error("cannot mount {what} at {target}")]
    Mount {
        /// Tag or type.
        what: String,
        /// Where.
        target: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A namespace.
    #[error("cannot make the pod's {what}")]
    Namespace {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A container's files could not be written back to the host.
    #[error("cannot write {path} back to the host")]
    WriteBack {
        /// The root file system.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Prepares the pod. Blocks on mounts; call it where that is allowed.
///
/// # Errors
/// What the kernel refused. The VM is then of no use: the host ends it.
pub fn create(request: &CreatePodRequest) -> Result<(), PodError> {
    let bytes = request.hostname.len();
    if bytes > MAX_HOSTNAME_BYTES {
        return Err(PodError::Hostname { bytes });
    }
    mount_at(
        &request.share_tag,
        "virtiofs",
        Path::new(SHARE_DIR),
        MsFlags::MS_NODEV,
        "",
    )?;
    for (number, tag) in request.remote_share_tags.iter().enumerate() {
        let target = Path::new(REMOTE_DIR).join(number.to_string());
        mount_at(tag, "virtiofs", &target, MsFlags::MS_NODEV, "")?;
    }
    let shm_bytes = match request.shm_size_bytes {
        0 => DEFAULT_SHM_BYTES,
        bytes => bytes,
    };
    mount_at(
        "shm",
        "tmpfs",
        &Path::new(POD_DIR).join("shm"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        &format!("mode=1777,size={shm_bytes}"),
    )?;
    namespaces::create(request.hostname.clone(), request.user_namespace.as_ref())
}

fn mount_at(
    source: &str,
    fstype: &str,
    target: &Path,
    flags: MsFlags,
    options: &str,
) -> Result<(), PodError> {
    let failed = |source_error: io::Error| PodError::Mount {
        what: format!("{fstype} {source}"),
        target: target.into(),
        source: source_error,
    };
    fs::create_dir_all(target).map_err(failed)?;
    mount(Some(source), target, Some(fstype), flags, Some(options))
        .map_err(|errno| failed(errno.into()))
}

/// Writes a container's files back to the host, its root file system and what it
/// got by bind mounts, also what was only written through mmap, and lets go of
/// the root file system, so that the host can unmount it. Other volumes of the
/// pod are left alone: their writers may be busy, and not this container's.
///
/// The share announces the host's mounts as mounts of their own, each with a
/// superblock of its own to sync.
///
/// # Errors
/// When the host did not take the data: the caller must know that it is lost.
pub fn write_back(rootfs: &Path, bind_sources: &[PathBuf]) -> Result<(), PodError> {
    sync_container(rootfs, bind_sources)?;
    // What was never looked at was never mounted: EINVAL is as good.
    if let Err(errno) = umount2(rootfs, MntFlags::empty())
        && errno != Errno::EINVAL
    {
        tracing::warn!(%errno, rootfs = %rootfs.display(), "left mounted");
    }
    // Cached dentries hold inodes of the file server: FORGET them.
    fs::write("/proc/sys/vm/drop_caches", "2").map_err(|source| PodError::WriteBack {
        path: rootfs.into(),
        source,
    })
}

/// Writes a container's files back to the host, as [`write_back`], and keeps them.
///
/// # Errors
/// As [`write_back`].
pub fn sync_container(rootfs: &Path, bind_sources: &[PathBuf]) -> Result<(), PodError> {
    let places = bind_sources.iter().map(PathBuf::as_path);
    let places: Vec<_> = places.chain([rootfs]).collect();
    for mounted in mounts_of(&mounts_below(Path::new(SHARE_DIR))?, &places) {
        sync_mount(&mounted)?;
    }
    let remote = mounts_below(Path::new(REMOTE_DIR))?;
    sync_remote(mounts_of(&remote, &places).into_iter().collect());
    Ok(())
}

/// Has the servers of network and user-space file systems write what is theirs, as
/// far as they answer in time: nothing else must wait for them.
fn sync_remote(mounts: Vec<PathBuf>) {
    if mounts.is_empty() {
        return;
    }
    let (tell, told) = mpsc::channel();
    let syncing = thread::Builder::new()
        .name("sync".to_owned())
        .spawn(move || {
            for mounted in mounts {
                if let Err(error) = sync_mount(&mounted) {
                    tracing::error!(%error, "left unsynced");
                }
            }
            let _ = tell.send(());
        });
    match syncing.map(|_| told.recv_timeout(REMOTE_SYNC_TIMEOUT)) {
        Ok(Ok(())) => {}
        Ok(Err(_)) => tracing::error!(
            "a volume's server does not answer: what was written there through mmap may be lost"
        ),
        Err(error) => tracing::error!(%error, "cannot sync remote volumes"),
    }
}

/// Unmounts all of the share, innermost first, as far as that goes: the guest
/// is about to end.
pub fn leave() {
    let mounts = mounts_below(Path::new(SHARE_DIR)).unwrap_or_else(|error| {
        tracing::error!(%error, "left mounted");
        Vec::new()
    });
    sync_remote(mounts_below(Path::new(REMOTE_DIR)).unwrap_or_default());
    for mounted in mounts.iter().rev() {
        if let Err(error) = sync_mount(mounted) {
            tracing::error!(%error, "left unsynced");
        }
        if let Err(errno) = umount2(mounted, MntFlags::empty()) {
            tracing::warn!(%errno, mount = %mounted.display(), "left mounted");
        }
    }
}

fn sync_mount(mounted: &Path) -> Result<(), PodError> {
    let failed = |source| PodError::WriteBack {
        path: mounted.into(),
        source,
    };
    let root = File::open(mounted).map_err(failed)?;
    syncfs(&root).map_err(|errno| failed(errno.into()))
}

/// The mounts that hold one of the places, and those that lie below one: each
/// once. A place may be a file, or something that cannot be opened for a sync, like
/// a socket; the root of a mount can.
fn mounts_of(mounts: &[PathBuf], places: &[&Path]) -> BTreeSet<PathBuf> {
    let holding = |place: &&Path| {
        let holding = mounts.iter().filter(|mount| place.starts_with(mount));
        holding.max_by_key(|mount| mount.components().count())
    };
    let below = |mount: &&PathBuf| places.iter().any(|place| mount.starts_with(place));
    let holding = places.iter().filter_map(holding);
    holding
        .chain(mounts.iter().filter(below))
        .cloned()
        .collect()
}

/// The agent's mounts at or below a directory, outermost first.
fn mounts_below(directory: &Path) -> Result<Vec<PathBuf>, PodError> {
    let mounts = mountinfo::read().map_err(|source| PodError::WriteBack {
        path: directory.into(),
        source,
    })?;
    Ok(points_below(mounts, directory))
}

fn points_below(mounts: Vec<Mount>, directory: &Path) -> Vec<PathBuf> {
    let points = mounts.into_iter().map(|mount| mount.point);
    points
        .filter(|point| point.starts_with(directory))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_below_takes_the_directory_and_what_is_in_it() {
        let table = b"22 1 0:20 / / rw - tmpfs root rw\n\
                     30 22 0:31 / /run/bulkhead/share rw - virtiofs share rw\n\
                     31 30 0:32 / /run/bulkhead/share/volumes/0 rw - virtiofs share rw\n\
                     32 22 0:33 / /run/bulkhead/shared rw - tmpfs other rw\n";
        let below = points_below(mountinfo::parse(table), Path::new("/run/bulkhead/share"));
        let wanted = ["/run/bulkhead/share", "/run/bulkhead/share/volumes/0"];
        assert_eq!(below, wanted.map(PathBuf::from));
    }

    #[test]
    fn mounts_of_a_container_are_not_those_of_others() {
        let mounts = [
            "/share",
            "/share/containers/a/rootfs",
            "/share/containers/b/rootfs",
            "/share/volumes/0",
            "/share/volumes/0/below",
            "/share/volumes/1",
            "/share/volumes/10",
        ]
        .map(PathBuf::from);
        let places = [
            "/share/containers/a/rootfs",
            "/share/volumes/0",
            "/share/volumes/1/some/directory",
            "/pod/shm",
        ]
        .map(Path::new);
        let wanted = [
            "/share/containers/a/rootfs",
            "/share/volumes/0",
            "/share/volumes/0/below",
            "/share/volumes/1",
        ];
        let found = mounts_of(&mounts, &places);
        assert_eq!(found, wanted.map(PathBuf::from).into());
    }

    #[test]
    fn mounts_of_a_file_in_the_share_itself_is_the_share() {
        let mounts = ["/share", "/share/volumes/0"].map(PathBuf::from);
        let found = mounts_of(&mounts, &[Path::new("/share/volumes/2")]);
        assert_eq!(found, [PathBuf::from("/share")].into());
    }
}
