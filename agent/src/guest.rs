//! What PID 1 prepares before it listens: the guest's own mounts, cgroups and
//! limits.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::resource::{Resource, setrlimit},
    unistd::{chdir, chroot},
};
use thiserror::Error;

use crate::guest_memory;

/// Parent cgroup of every container.
pub const CONTAINERS_CGROUP: &str = "/sys/fs/cgroup/pod";
/// The agent's own cgroup, outside the containers' limits.
const AGENT_CGROUP: &str = "/sys/fs/cgroup/agent";
/// Processes and threads that containers cannot take from the kernel and the
/// agent. A kernel of few vCPUs has about a hundred; the agent has a handful, one
/// more for each call that blocks, and a helper for each creation.
const RESERVE_TASKS: u64 = 512;
/// `fs.nr_open` as the kernel has it: what it lets a limit be raised to.
const MAX_OPEN_FILES: u64 = 1024 * 1024;
/// What containers may be limited in.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

/// What failed while the guest was prepared.
#[derive(Debug, Error)]
pub enum GuestError {
    /// A mount of the guest's own.
    #[error("cannot mount {fstype} at {target}")]
    Mount {
        /// File system type.
        fstype: &'static str,
        /// Where.
        target: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of the kernel's, or a directory.
    #[error("cannot prepare {path}")]
    Prepare {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The limit on open files.
    #[error("cannot set the limit on open files to {MAX_OPEN_FILES}")]
    OpenFiles(#[source] io::Error),
}

struct Mount {
    fstype: &'static str,
    target: &'static str,
    flags: MsFlags,
    options: &'static str,
}

const fn quiet() -> MsFlags {
    MsFlags::MS_NOSUID
        .union(MsFlags::MS_NODEV)
        .union(MsFlags::MS_NOEXEC)
}

const MOUNTS: [Mount; 8] = [
    Mount {
        fstype: "proc",
        target: "/proc",
        flags: quiet(),
        options: "",
    },
    Mount {
        fstype: "sysfs",
        target: "/sys",
        flags: quiet(),
        options: "",
    },
    Mount {
        fstype: "devtmpfs",
        target: "/dev",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "mode=0755",
    },
    Mount {
        fstype: "devpts",
        target: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "newinstance,ptmxmode=0666,mode=0620",
    },
    Mount {
        fstype: "tmpfs",
        target: "/run",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        options: "mode=0755,size=16m",
    },
    Mount {
        fstype: "cgroup2",
        target: "/sys/fs/cgroup",
        flags: quiet(),
        options: "nsdelegate,memory_recursiveprot",
    },
    Mount {
        fstype: "bpf",
        target: "/sys/fs/bpf",
        flags: quiet(),
        options: "mode=0700",
    },
    Mount {
        fstype: "securityfs",
        target: "/sys/kernel/security",
        flags: quiet(),
        options: "",
    },
];

/// Leaves the initramfs for a tmpfs on top of it: a container can only pivot
/// away from a root that is mounted on another. The agent's own binary stays
/// in the initramfs, out of every container's sight, and is executed again
/// through `/proc/self/exe`.
///
/// # Errors
/// When the kernel refuses a step.
pub fn leave_initramfs() -> Result<(), GuestError> {
    let target = "/run";
    let failed = |source| GuestError::Mount {
        fstype: "tmpfs",
        target,
        source,
    };
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("root"),
        target,
        Some("tmpfs"),
        flags,
        Some("mode=0755,size=1m"),
    )
    .map_err(|errno| failed(errno.into()))?;
    chdir(target).map_err(|errno| failed(errno.into()))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|errno| failed(errno.into()))?;
    chroot(".").map_err(|errno| failed(errno.into()))?;
    chdir("/").map_err(|errno| failed(errno.into()))
}

/// Mounts the guest's own file systems, so that `/proc`, `/dev` and `/run`
/// exist. Nothing may be opened before.
///
/// # Errors
/// The first mount that the kernel refuses.
pub fn mount_own_file_systems() -> Result<(), GuestError> {
    for Mount {
        fstype,
        target,
        flags,
        options,
    } in MOUNTS
    {
        let failed = |source| GuestError::Mount {
            fstype,
            target,
            source,
        };
        fs::create_dir_all(target).map_err(failed)?;
        mount(Some(fstype), target, Some(fstype), flags, Some(options))
            .map_err(|errno| failed(errno.into()))?;
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, link).map_err(|source| GuestError::Prepare {
            path: link.into(),
            source,
        })?;
    }
    Ok(())
}

/// Puts the agent beside the containers' cgroup, keeps it out of reach of the
/// OOM killer, and bounds what all containers together may take.
///
/// # Errors
/// When the kernel lacks a controller that containers need.
pub fn prepare_cgroups() -> Result<(), GuestError> {
    let root = Path::new("/sys/fs/cgroup");
    for directory in [CONTAINERS_CGROUP, AGENT_CGROUP] {
        fs::create_dir(directory).map_err(|source| GuestError::Prepare {
            path: directory.into(),
            source,
        })?;
    }
    write(Path::new(AGENT_CGROUP).join("cgroup.procs"), "1")?;
    let enable = CONTROLLERS.map(|name| format!("+{name}")).join(" ");
    write(root.join("cgroup.subtree_control"), &enable)?;
    let containers = Path::new(CONTAINERS_CGROUP);
    write(containers.join("cgroup.subtree_control"), &enable)?;
    guest_memory::fit()?;
    // Or a fork bomb leaves the agent no thread to serve a call with.
    write(
        containers.join("pids.max"),
        &containers_tasks()?.to_string(),
    )?;
    write("/proc/self/oom_score_adj", "-1000")
}

/// Raises the agent's limit on open files, which the kernel starts PID 1 with
/// at 1024: each container costs it several. Containers whose specification
/// sets no `RLIMIT_NOFILE` inherit it.
///
/// # Errors
/// When the kernel's `fs.nr_open` is lower.
pub fn raise_open_files() -> Result<(), GuestError> {
    setrlimit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES, MAX_OPEN_FILES)
        .map_err(|errno| GuestError::OpenFiles(errno.into()))
}

fn containers_tasks() -> Result<u64, GuestError> {
    let threads = number_in("/proc/sys/kernel/threads-max")?;
    let pids = number_in("/proc/sys/kernel/pid_max")?;
    Ok(tasks_beside_reserve(threads.min(pids)))
}

/// In a guest so small that the reserve is most of it, half is kept.
fn tasks_beside_reserve(tasks: u64) -> u64 {
    tasks.saturating_sub(RESERVE_TASKS).max(tasks / 2)
}

fn number_in(path: &'static str) -> Result<u64, GuestError> {
    let failed = |source| GuestError::Prepare {
        path: path.into(),
        source,
    };
    let text = fs::read_to_string(path).map_err(failed)?;
    text.trim()
        .parse()
        .map_err(|_| failed(io::ErrorKind::InvalidData.into()))
}

fn write(path: impl AsRef<Path>, text: &str) -> Result<(), GuestError> {
    fs::write(&path, text).map_err(|source| GuestError::Prepare {
        path: path.as_ref().into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_beside_reserve_leaves_512_or_half() {
        assert_eq!(tasks_beside_reserve(32768), 32768 - 512);
        assert_eq!(tasks_beside_reserve(800), 400);
    }

    #[test]
    fn containers_tasks_of_this_kernel_are_fewer_than_it_has() {
        let tasks = containers_tasks().expect("limits");
        assert!(tasks < number_in("/proc/sys/kernel/threads-max").expect("limit"));
    }
}
