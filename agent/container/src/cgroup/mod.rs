//! The container's cgroup (version 2): made, limited, watched, killed, removed.

mod block_io;
mod device_program;
mod device_rules;
mod figures;
mod limits;
mod update;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::LinuxResources;

use crate::kernel_calls;
pub use device_rules::allows_every_device;
pub use figures::{DeviceFigures, Figures, HugePages, Keyed, Pressure, Waiting, oom_kills};
pub use limits::check as check_resources;

/// How long killed processes may take to end. A process in an uninterruptible
/// wait (a hung file server) takes longer; delete can then be tried again.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long processes may take to be frozen.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);

/// Names the files that go with a cgroup to the user that it is delegated to.
const DELEGATE: &str = "/sys/kernel/cgroup/delegate";

/// What failed with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// It exists already.
    #[error("cgroup {path} exists already")]
    Exists {
        /// Its directory.
        path: PathBuf,
    },
    /// It cannot be made.
    #[error("cannot create cgroup {path}")]
    Create {
        /// Its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// One of its files cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A limit, or another setting, is not taken.
    #[error("cannot write {value:?} to {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What was to be written.
        value: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `linux.resources.memory.checkBeforeUpdate`: a lower limit would kill.
    #[error(
        "linux.resources.memory.limit: {limit} is less than the {used} bytes in use, which checkBeforeUpdate forbids"
    )]
    InUse {
        /// As asked for.
        limit: u64,
        /// Bytes.
        used: u64,
    },
    /// It cannot be handed to the root of the container's user namespace.
    #[error("cannot hand {path} to the container's root")]
    Delegate {
        /// Its directory, or a file of it.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The device rules cannot be enforced, so nothing may run.
    #[error("cannot enforce the device rules of cgroup {path}")]
    Devices {
        /// Its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its processes do not end.
    #[error("processes of cgroup {path} are still alive {} s after they were killed", KILL_TIMEOUT.as_secs())]
    Busy {
        /// Its directory.
        path: PathBuf,
    },
    /// Its processes do not stop, for instance in a wait for a hung file server.
    #[error("processes of cgroup {path} did not freeze within {} s", FREEZE_TIMEOUT.as_secs())]
    NotFrozen {
        /// Its directory.
        path: PathBuf,
    },
    /// It cannot be removed.
    #[error("cannot remove cgroup {path}")]
    Remove {
        /// Its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    root: PathBuf,
    path: PathBuf,
    /// Held by whoever freezes or thaws it.
    freezing: Mutex<()>,
    /// The program that decides about devices, once it is attached.
    devices: Mutex<Option<OwnedFd>>,
}

impl Cgroup {
    /// Makes `relative` below `root`, enables controllers on the way, attaches
    /// the device program and sets every limit but the one on processes (see
    /// [`Self::limit_processes`]). Whatever fails, nothing is left.
    pub fn create(
        root: &Path,
        relative: &Path,
        resources: Option<&LinuxResources>,
    ) -> Result<Self, CgroupError> {
        let cgroup = Self::new(root, relative);
        let result = cgroup.create_directories(relative).and_then(|()| {
            cgroup.limit_devices(resources)?;
            for setting in limits::settings(resources) {
                cgroup.apply(&setting)?;
            }
            Ok(())
        });
        match result {
            Ok(()) => Ok(cgroup),
            // Somebody else's: not ours to remove.
            Err(error @ CgroupError::Exists { .. }) => {
                cgroup.remove_empty_parents();
                Err(error)
            }
            Err(error) => {
                // The first error is the one to tell.
                let _ = fs::remove_dir(&cgroup.path);
                cgroup.remove_empty_parents();
                Err(error)
            }
        }
    }

    fn new(root: &Path, relative: &Path) -> Self {
        Self {
            root: root.to_owned(),
            path: root.join(relative),
            freezing: Mutex::default(),
            devices: Mutex::default(),
        }
    }

    fn limit_devices(&self, resources: Option<&LinuxResources>) -> Result<(), CgroupError> {
        let none = LinuxResources::default();
        let program = device_rules::load(&self.path, resources.unwrap_or(&none))?;
        device_rules::attach(&self.path, &program, None)?;
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        *devices = Some(program);
        Ok(())
    }

    fn create_directories(&self, relative: &Path) -> Result<(), CgroupError> {
        let mut path = self.root.clone();
        for name in relative {
            enable_controllers(&path)?;
            path.push(name);
            match fs::create_dir(&path) {
                Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                    if path == self.path {
                        return Err(CgroupError::Exists { path });
                    }
                }
                Err(source) => return Err(CgroupError::Create { path, source }),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn apply(&self, setting: &limits::Setting) -> Result<(), CgroupError> {
        match write_file(&self.path.join(&setting.file), &setting.value) {
            Err(CgroupError::Write { source, .. })
                if setting.vacuous_without_file && source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            result => result,
        }
    }

    /// Lets a user of the guest make cgroups below it and move processes between
    /// them, but change no limit: the kernel lists the files for that.
    pub fn delegate(&self, uid: u32, gid: u32) -> Result<(), CgroupError> {
        let give = |path: PathBuf| match chown(&path, Some(uid), Some(gid)) {
            // Of a controller that is not here.
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(|source| CgroupError::Delegate { path, source }),
        };
        give(self.path.clone())?;
        let files = fs::read_to_string(DELEGATE).map_err(|source| CgroupError::Read {
            path: DELEGATE.into(),
            source,
        })?;
        files
            .lines()
            .try_for_each(|file| give(self.path.join(file)))
    }

    /// Sets the limit on processes. Apart from the others, since the helper and
    /// the init are both in the cgroup for a moment, and the limit may be 1.
    pub fn limit_processes(&self, resources: Option<&LinuxResources>) -> Result<(), CgroupError> {
        match limits::process_setting(resources) {
            Some(setting) => self.apply(&setting),
            None => Ok(()),
        }
    }

    /// Its directory, to be passed to the helper.
    pub fn open(&self) -> Result<OwnedFd, CgroupError> {
        File::open(&self.path)
            .map(OwnedFd::from)
            .map_err(|source| CgroupError::Read {
                path: self.path.clone(),
                source,
            })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `cgroup.procs` of a cgroup, open for writing.
    pub fn open_procs(directory: &Path) -> Result<OwnedFd, CgroupError> {
        let path = directory.join("cgroup.procs");
        match OpenOptions::new().write(true).open(&path) {
            Ok(file) => Ok(file.into()),
            Err(source) => Err(CgroupError::Read { path, source }),
        }
    }

    /// The cgroup, this or one below, that a process is in.
    pub fn find_process(&self, pid: i32) -> Result<Option<PathBuf>, CgroupError> {
        let mut found = None;
        visit(&self.path, &mut |directory| {
            if read_pids(&directory.join("cgroup.procs"))?.contains(&pid) {
                found = Some(directory.to_owned());
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Stops every process and returns when the last one has; what cannot be
    /// stopped in time makes all go on again.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        let _one_at_a_time = self.freezing.lock();
        self.set_frozen(true)?;
        match self.wait_for("frozen 1", Instant::now() + FREEZE_TIMEOUT) {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.set_frozen(false)?;
                Err(CgroupError::NotFrozen {
                    path: self.path.clone(),
                })
            }
            Err(error) => {
                // The first error is the one to tell.
                let _ = self.set_frozen(false);
                Err(error)
            }
        }
    }

    /// Lets every process go on.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        let _one_at_a_time = self.freezing.lock();
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<(), CgroupError> {
        let value = if frozen { "1" } else { "0" };
        write_file(&self.path.join("cgroup.freeze"), value)
    }

    /// Whether it is frozen or about to be.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        let path = self.path.join("cgroup.freeze");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim() == "1"),
            Err(source) if gone(&source) => Ok(false),
            Err(source) => Err(CgroupError::Read { path, source }),
        }
    }

    /// Every process in it and below, in the caller's PID namespace. Empty when it is gone.
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = Vec::new();
        visit(&self.path, &mut |directory| {
            pids.extend(read_pids(&directory.join("cgroup.procs"))?);
            Ok(())
        })?;
        Ok(pids)
    }

    /// Sends a signal to every process. Processes that are forked meanwhile may
    /// be missed, except by `SIGKILL`, which the kernel delivers as one step.
    pub fn signal(&self, signal: i32) -> Result<(), CgroupError> {
        if signal == libc::SIGKILL {
            return match write_file(&self.path.join("cgroup.kill"), "1") {
                Err(CgroupError::Write { source, .. }) if gone(&source) => Ok(()),
                result => result,
            };
        }
        for pid in self.pids()? {
            let Ok(pidfd) = kernel_calls::pidfd_open(pid) else {
                continue; // Ended since.
            };
            // The pid may have ended, and been given again, before pidfd_open:
            // what is still listed now is what the descriptor refers to.
            if self.pids()?.contains(&pid) {
                // It may have ended since: as good.
                let _ = kernel_calls::pidfd_send_signal(pidfd.as_fd(), signal);
            }
        }
        Ok(())
    }

    /// Kills every process, waits for the last one's end and removes the
    /// cgroup, those that the container made in it, and the parents below the
    /// root that are empty then. Idempotent.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + KILL_TIMEOUT;
        loop {
            self.signal(libc::SIGKILL)?;
            self.wait_until_empty(deadline)?;
            match visit(&self.path, &mut remove_directory) {
                // An exec that was being made has joined since, to die with its namespace.
                Err(CgroupError::Remove { source, .. })
                    if source.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {}
                removed => {
                    self.remove_empty_parents();
                    return removed;
                }
            }
        }
    }

    fn remove_empty_parents(&self) {
        let mut parent = self.path.parent();
        while let Some(path) = parent.filter(|path| *path != self.root) {
            // Fails while another container's cgroup is in it.
            if fs::remove_dir(path).is_err_and(|error| !gone(&error)) {
                break;
            }
            parent = path.parent();
        }
    }

    fn wait_until_empty(&self, deadline: Instant) -> Result<(), CgroupError> {
        if self.wait_for("populated 0", deadline)? {
            return Ok(());
        }
        Err(CgroupError::Busy {
            path: self.path.clone(),
        })
    }

    /// Waits for a line of `cgroup.events`; `false` when it did not come. A
    /// cgroup that is gone has every line.
    fn wait_for(&self, line: &str, deadline: Instant) -> Result<bool, CgroupError> {
        let path = self.path.join("cgroup.events");
        let failed = |source| CgroupError::Read {
            path: path.clone(),
            source,
        };
        let mut file = match File::open(&path) {
            Err(source) if gone(&source) => return Ok(true),
            file => file.map_err(failed)?,
        };
        loop {
            let mut events = String::new();
            // Reading also takes the notification, so that poll waits for the next.
            match file
                .rewind()
                .and_then(|()| file.read_to_string(&mut events))
            {
                Err(source) if gone(&source) => return Ok(true),
                result => result.map_err(failed)?,
            };
            if events.lines().any(|one| one == line) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            wait_for_event(file.as_fd(), left).map_err(failed)?;
        }
    }
}

fn remove_directory(path: &Path) -> Result<(), CgroupError> {
    match fs::remove_dir(path) {
        Err(source) if !gone(&source) => Err(CgroupError::Remove {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Calls `visitor` for each cgroup from the leaves up.
fn visit(
    directory: &Path,
    visitor: &mut dyn FnMut(&Path) -> Result<(), CgroupError>,
) -> Result<(), CgroupError> {
    let failed = |source| CgroupError::Read {
        path: directory.to_owned(),
        source,
    };
    let entries = match fs::read_dir(directory) {
        Err(source) if gone(&source) => return Ok(()),
        entries => entries.map_err(failed)?,
    };
    for entry in entries {
        let entry = entry.map_err(failed)?;
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => visit(&entry.path(), visitor)?,
            Ok(_) => {}
            Err(source) if gone(&source) => {}
            Err(source) => return Err(failed(source)),
        }
    }
    visitor(directory)
}

fn wait_for_event(file: BorrowedFd<'_>, timeout: Duration) -> io::Result<()> {
    // Rounded up, so that the last wait is not a busy one.
    let timeout =
        PollTimeout::try_from(timeout + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(file, PollFlags::POLLPRI)], timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Removed, with its processes: ENODEV is what open files of a removed cgroup answer.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn read_pids(path: &Path) -> Result<Vec<i32>, CgroupError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
        // EOPNOTSUPP: a threaded cgroup, whose processes its domain lists.
        Err(source) if gone(&source) || source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            Ok(Vec::new())
        }
        Err(source) => Err(CgroupError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Writes a cgroup's file in one go, never creating one.
fn write_file(path: &Path, value: &str) -> Result<(), CgroupError> {
    OpenOptions::new()
        .write(true)
        .truncate(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|source| CgroupError::Write {
            path: path.to_owned(),
            value: value.to_owned(),
            source,
        })
}

/// Hands every controller that there is to the children of `path`. One that
/// cannot be handed down shows as the missing file of a limit that needs it.
fn enable_controllers(path: &Path) -> Result<(), CgroupError> {
    let controllers = path.join("cgroup.controllers");
    let available = fs::read_to_string(&controllers).map_err(|source| CgroupError::Read {
        path: controllers,
        source,
    })?;
    for controller in available.split_whitespace() {
        let _ = write_file(
            &path.join("cgroup.subtree_control"),
            &format!("+{controller}"),
        );
    }
    Ok(())
}
