//! Upstream `virtiofsd` in its jail: the pod's share, and no guest memory.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use super::{Error, Place, dev_null, kill, log_pipe, prepare};
use crate::host::jail::{self, Capabilities, Capability, Jail, Network, Pids, Root};

const NAME: &str = "the file server (virtiofsd)";
/// Where it finds its listening socket.
const LISTENER_FD: i32 = 3;
/// It holds one descriptor for each inode that the guest has cached.
const OPEN_FILES: u64 = 1_000_000;

/// What it needs to act for the guest's users, and, until it has gone into the
/// share, `chroot` and to empty its own bounding set.
const CAPABILITIES: Capabilities = Capabilities::of(&[
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::SysChroot,
    Capability::Setpcap,
]);

const ARGUMENTS: &[&str] = &[
    "virtiofsd",
    "--fd=3",
    "--shared-dir=/share",
    // The jail is ours; chroot is what is left to do in it.
    "--sandbox=chroot",
    // By handle a broken server could open any inode of the file system that
    // a volume lies on.
    "--inode-file-handles=never",
    "--modcaps=-mknod",
    // One request that hangs must not stop the others.
    "--thread-pool-size=8",
    // Each mount in the share has its own inode numbers.
    "--announce-submounts",
    "--xattr",
    "--posix-acl=auto",
    "--cache=auto",
    // The jail has set it.
    "--rlimit-nofile=0",
    "--seccomp=kill",
    "--log-level=warn",
];

/// The running `virtiofsd`. Dropped, it is killed and collected.
#[derive(Debug)]
pub struct FileServer {
    pid: u32,
    pidfd: OwnedFd,
    /// Its log, line by line, non-blocking; ends with it. Taken by who reads
    /// it.
    pub log: Option<OwnedFd>,
}

impl FileServer {
    /// Starts it and returns the connected vhost-user socket, the only one that
    /// it will ever accept.
    pub(super) fn start(
        place: Place<'_>,
        program: BorrowedFd<'_>,
    ) -> Result<(Self, OwnedFd), Error> {
        let (listener, connected) = socket(place)?;
        let (log, log_write) = log_pipe(NAME)?;
        let null = dev_null(NAME)?;
        let arguments: Vec<&OsStr> = ARGUMENTS.iter().map(OsStr::new).collect();
        let jailed = jail::launch(&Jail {
            name: NAME,
            program,
            arguments: &arguments,
            descriptors: &[
                (null.as_fd(), 0),
                (log_write.as_fd(), 1),
                (log_write.as_fd(), 2),
                (listener.as_fd(), LISTENER_FD),
            ],
            root: Root::Server { share: place.share },
            network: Network::None,
            pids: Pids::Own,
            // It acts with the uids of the guest's users, as the owner of
            // their files.
            uid: 0,
            gid: 0,
            capabilities: CAPABILITIES,
            open_files: OPEN_FILES.min(jail::most_open_files()),
            cgroup: place.cgroup,
        })?;
        let server = Self {
            pid: jailed.pid,
            pidfd: jailed.pidfd,
            log: Some(log),
        };
        Ok((server, connected.into()))
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Readable when it has ended: it ends by itself once the monitor has
    /// disconnected, and at any other time the pod is lost.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills the server and collects it. Idempotent.
    pub fn kill(&self) -> Result<(), Error> {
        kill(NAME, self.pid, self.pidfd.as_fd())
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::error!("{error}");
        }
    }
}

/// A listening socket with the one connection that the server will accept
/// already in its queue, and that connection. Its name is gone again, so that
/// nobody else can connect.
fn socket(place: Place<'_>) -> Result<(UnixListener, UnixStream), Error> {
    use rustix::fs::{AtFlags, Mode, OFlags, open, unlinkat};
    use std::os::fd::AsRawFd;
    const FILE: &str = "virtiofsd.sock";

    let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    let directory = open(place.directory, flags, Mode::empty())
        .map_err(prepare("open the pod's directory", NAME))?;
    // An address holds 107 bytes, fewer than a pod's directory may need.
    let name = PathBuf::from(format!("/proc/self/fd/{}/{FILE}", directory.as_raw_fd()));
    // Left by an attempt that was killed.
    let _ = unlinkat(&directory, FILE, AtFlags::empty());
    let listener = UnixListener::bind(&name).map_err(prepare("make a socket", NAME))?;
    let connected = UnixStream::connect(&name).map_err(prepare("connect a socket", NAME));
    unlinkat(&directory, FILE, AtFlags::empty())
        .map_err(prepare("remove a socket's name", NAME))?;
    Ok((listener, connected?))
}
