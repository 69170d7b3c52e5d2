//! What the containers of the pod share: the share's mount, `/dev/shm`, and the
//! network, IPC and UTS namespaces, which are never the agent's own.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
};

use agent_protocol::{POD_DIR, SHARE_DIR, api::CreatePodRequest};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::{sethostname, syncfs},
};
use thiserror::Error;

use crate::kernel_calls::set_interface_up;

const DEFAULT_SHM_BYTES: u64 = 64 * 1024 * 1024;
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
    create_namespaces(request.hostname.clone())
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

/// Makes the namespaces in a thread of their own, whose end leaves only the
/// bind mounts that hold them.
fn create_namespaces(hostname: String) -> Result<(), PodError> {
    let directory = Path::new(POD_DIR).join("ns");
    thread::Builder::new()
        .name("namespaces".to_owned())
        .spawn(move || {
            let failed = |what| move |source: io::Error| PodError::Namespace { what, source };
            fs::create_dir_all(&directory).map_err(failed("namespace directory"))?;
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
                .map_err(|errno| failed("namespaces")(errno.into()))?;
            if !hostname.is_empty() {
                sethostname(&hostname).map_err(|errno| failed("hostname")(errno.into()))?;
            }
            set_interface_up("lo").map_err(failed("loopback interface"))?;
            for name in ["net", "ipc", "uts"] {
                let held = directory.join(name);
                File::create(&held).map_err(failed("namespace file"))?;
                let of_thread = Path::new("/proc/thread-self/ns").join(name);
                mount(
                    Some(&of_thread),
                    &held,
                    None::<&str>,
                    MsFlags::MS_BIND,
                    None::<&str>,
                )
                .map_err(|errno| failed("namespace mount")(errno.into()))?;
            }
            Ok(())
        })
        .and_then(|thread| {
            thread
                .join()
                .map_err(|_| io::Error::other("the thread panicked"))
        })
        .map_err(|source| PodError::Namespace {
            what: "namespaces",
            source,
        })?
}

/// Writes a container's files and the pod's volumes back to the host, also what
/// was only written through mmap, and lets go of the container's root file
/// system, so that the host can unmount it.
///
/// The share announces the host's mounts as mounts of their own, each with a
/// superblock of its own to sync.
///
/// # Errors
/// When the host did not take the data: the caller must know that it is lost.
pub fn write_back(rootfs: &Path) -> Result<(), PodError> {
    let volumes = Path::new(SHARE_DIR).join("volumes");
    sync_mount(rootfs)?;
    for mounted in mounts_below(&volumes) {
        sync_mount(&mounted)?;
    }
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

/// Unmounts all of the share, innermost first, as far as that goes: the guest
/// is about to end.
pub fn leave() {
    for mounted in mounts_below(Path::new(SHARE_DIR)).iter().rev() {
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

/// The agent's mounts at or below a directory, outermost first. Paths of the
/// share need no unescaping: the host names them.
fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    parse_mounts_below(&table, directory)
}

/// Mount points are the fifth field of `proc_pid_mountinfo(5)`.
fn parse_mounts_below(table: &str, directory: &Path) -> Vec<PathBuf> {
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points
        .map(PathBuf::from)
        .filter(|point| point.starts_with(directory))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_mounts_below_takes_the_directory_and_what_is_in_it() {
        let table = "22 1 0:20 / / rw - tmpfs root rw\n\
                     30 22 0:31 / /run/bulkhead/share rw - virtiofs share rw\n\
                     31 30 0:32 / /run/bulkhead/share/volumes/0 rw - virtiofs share rw\n\
                     32 22 0:33 / /run/bulkhead/shared rw - tmpfs other rw\n";
        let below = parse_mounts_below(table, Path::new("/run/bulkhead/share"));
        let wanted = ["/run/bulkhead/share", "/run/bulkhead/share/volumes/0"];
        assert_eq!(below, wanted.map(PathBuf::from));
    }
}
