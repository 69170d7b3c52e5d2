//! Stand-ins: the live host process behind each pid that a client sees.
//!
//! Clients open its `/proc` entries: the network namespace to configure, the
//! root to copy files to and from. So it lives in the pod's network namespace
//! with the container's root file system as its root, and holds nothing else:
//! no capability, no descriptor, no uid of the host's. In `ps` it shows as
//! `bulkhead-stand-in CONTAINER [EXEC]`.

mod program;

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use thiserror::Error;

use super::children;
use super::jail::{self, Capabilities, Jail, Network, Pids, Root};

pub(super) use program::open as program;

/// Why a stand-in cannot be started.
#[derive(Debug, Error)]
pub enum Error {
    /// Its program cannot be put into memory.
    #[error("make the stand-in's program in memory (is sysctl vm.memfd_noexec 2 or above?)")]
    Program(#[source] io::Error),
    /// It cannot be started.
    #[error(transparent)]
    Jail(#[from] jail::Error),
}

/// What a stand-in stands for, and where it lives.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The container.
    pub container_id: &'a str,
    /// The exec; `None` for the container's init.
    pub exec_id: Option<&'a str>,
    /// The container's root file system, mounted on the host.
    pub rootfs: &'a Path,
    /// The pod's network namespace.
    pub network: BorrowedFd<'a>,
    /// The pod's cgroup.
    pub cgroup: BorrowedFd<'a>,
    /// The pod's uid and gid.
    pub uid: u32,
}

/// One live stand-in. Dropped, it is killed and collected.
#[derive(Debug)]
pub struct StandIn {
    container_id: String,
    exec_id: String,
    pid: u32,
    pidfd: OwnedFd,
}

impl StandIn {
    /// Starts it.
    pub(super) fn start(place: &Place<'_>) -> Result<Self, Error> {
        let program = program().map_err(|source| Error::Program(source.into()))?;
        let mut arguments = vec![
            OsStr::new("bulkhead-stand-in"),
            OsStr::new(place.container_id),
        ];
        arguments.extend(place.exec_id.map(OsStr::new));
        let jailed = jail::launch(&Jail {
            name: "the stand-in",
            program: program.as_fd(),
            arguments: &arguments,
            descriptors: &[],
            root: Root::Directory(place.rootfs),
            network: Network::Namespace(place.network),
            // Its pid is what the clients see.
            pids: Pids::Host,
            uid: place.uid,
            gid: place.uid,
            capabilities: Capabilities::NONE,
            open_files: 0,
            cgroup: place.cgroup,
        })?;
        Ok(Self {
            container_id: place.container_id.to_owned(),
            exec_id: place.exec_id.unwrap_or_default().to_owned(),
            pid: jailed.pid,
            pidfd: jailed.pidfd,
        })
    }

    /// Its pid in the host's PID namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Readable when it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The container that it stands for a process of.
    pub fn container_id(&self) -> &str {
        &self.container_id
    }

    /// The exec; empty for init.
    pub fn exec_id(&self) -> &str {
        &self.exec_id
    }

    /// Kills it and collects it. Idempotent.
    pub(super) fn end(&self) {
        children::kill_and_reap(self.pid, self.pidfd.as_fd());
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::PathBuf;

    use super::*;
    use crate::host::cgroup::tests::hierarchy;
    use crate::host::mounts::RootFs;
    use crate::host::mounts::tests::private_mounts;
    use crate::host::netns;
    use crate::host::share::Share;

    struct Cgroup(PathBuf);

    impl Drop for Cgroup {
        fn drop(&mut self) {
            fs::remove_dir(&self.0).expect("no process is left in the cgroup");
        }
    }

    #[test]
    fn start_shows_the_containers_root_and_the_pods_network_and_nothing_else() {
        let Some(hierarchy) = hierarchy() else { return };
        let Some(base) = private_mounts() else { return };
        let name = format!("bulkhead-test-stand-in-{}", std::process::id());
        let cgroup = Cgroup(hierarchy.join(name));
        fs::create_dir(&cgroup.0).expect("makes");
        let cgroup_fd = File::open(&cgroup.0).expect("opens");
        let network = netns::create(&base.path().join("netns")).expect("makes");
        let rootfs = base.path().join("rootfs");
        fs::create_dir(&rootfs).expect("makes");
        fs::write(rootfs.join("mine"), "x").expect("writes");
        let share = Share::create(&base.path().join("share")).expect("creates");
        share
            .add_container("c1", &RootFs::Premounted(rootfs.clone()))
            .expect("adds");

        let stand_in = StandIn::start(&Place {
            container_id: "c1",
            exec_id: Some("e1"),
            rootfs: &share.rootfs("c1"),
            network: network.as_fd(),
            cgroup: cgroup_fd.as_fd(),
            uid: 2_000_000_011,
        })
        .expect("starts");
        let proc = PathBuf::from(format!("/proc/{}", stand_in.pid()));
        let read = |name: &str| fs::read_to_string(proc.join(name)).expect("reads");
        let names: Vec<_> = fs::read_dir(proc.join("root"))
            .expect("lists")
            .map(|entry| entry.expect("entry").file_name())
            .collect();
        assert_eq!(names, ["mine"]);
        fs::write(proc.join("root/copied"), "x").expect("a copy goes in");
        assert!(rootfs.join("copied").exists(), "and arrives");
        assert_eq!(read("mountinfo").lines().count(), 1, "no other mount");
        let inode = |path: PathBuf| rustix::fs::stat(path).expect("is there").st_ino;
        let theirs = rustix::fs::fstat(&network).expect("is open").st_ino;
        assert_eq!(inode(proc.join("ns/net")), theirs);
        assert_eq!(
            inode(proc.join("ns/pid")),
            inode("/proc/self/ns/pid".into())
        );
        let status = read("status");
        assert!(status.contains("CapPrm:\t0000000000000000"), "{status}");
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        assert_eq!(fs::read_dir(proc.join("fd")).expect("lists").count(), 0);
        assert_eq!(read("cmdline"), "bulkhead-stand-in\0c1\0e1\0");

        drop(stand_in);
        assert!(!proc.exists(), "it is killed and collected");
        netns::remove(&base.path().join("netns")).expect("removes");
    }
}
