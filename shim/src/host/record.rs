//! The pod's record: what `delete` needs when the shim is gone.
//!
//! Each thing is written down before it is made, so that a kill at any moment
//! leaves nothing that the record does not name; what it names may not be
//! there, and removing it succeeds all the same.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::Hook;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Version of the record's form. A reader refuses any other.
pub const VERSION: u32 = 1;

/// Why the record cannot be written or read.
#[derive(Debug, Error)]
pub enum Error {
    /// It cannot be written or read.
    #[error("{operation} the pod's record {path}")]
    Io {
        /// As in "write".
        operation: &'static str,
        /// Its file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is not a record.
    #[error("the pod's record {path} cannot be understood")]
    Malformed {
        /// Its file.
        path: PathBuf,
        /// Where it is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// Another release wrote it.
    #[error(
        "the pod's record {path} has version {version}, this shim knows {VERSION}: clean up with the release that made the pod"
    )]
    Version {
        /// Its file.
        path: PathBuf,
        /// As written.
        version: u32,
    },
}

/// What a pod has on the host beyond its directory, share and uid, which are
/// found by the pod's name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// The shim.
    pub shim: Option<Process>,
    /// The pod's cgroup.
    pub cgroup: Option<Cgroup>,
    /// Whether the network namespace in the pod's directory is ours.
    pub network_namespace: bool,
    /// The monitor.
    pub monitor: Option<Process>,
    /// The file server.
    pub file_server: Option<Process>,
    /// The containers by their id.
    pub containers: BTreeMap<String, Container>,
}

/// A pod's cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Its directory.
    pub path: PathBuf,
    /// The directories that we make, outermost first.
    pub made: Vec<PathBuf>,
}

/// A container of the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its spec's version, for the hooks.
    pub oci_version: String,
    /// Its spec's annotations, for the hooks.
    pub annotations: BTreeMap<String, String>,
    /// Its `poststop` hooks.
    pub poststop: Vec<Hook>,
    /// Whether `poststop` has to run: the first hook has been started, and
    /// `poststop` has not run.
    pub poststop_due: bool,
    /// The stand-ins by exec id; empty for init.
    pub stand_ins: BTreeMap<String, Process>,
    /// How its init ended.
    pub exit: Option<ExitRecord>,
}

/// How a container's init ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// 0 to 255; 128 + N for death by signal N.
    pub status: u32,
    /// Nanoseconds since the epoch.
    pub exited_at_ns: i64,
}

/// A process that no other can be mistaken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// On the host.
    pub pid: u32,
    /// Clock ticks after boot (`/proc/PID/stat`, field 22); 0 when it was gone
    /// before it could be asked.
    pub start_ticks: u64,
}

impl Process {
    /// The process that has this pid now.
    pub fn of(pid: u32) -> Self {
        Self {
            pid,
            start_ticks: start_ticks(pid).unwrap_or(0),
        }
    }

    /// Its pidfd, if it is still this process.
    pub fn open(self) -> Option<std::os::fd::OwnedFd> {
        let pid = Pid::from_raw(self.pid.cast_signed())?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Asked after the pidfd is there: from here on it cannot become
        // another's.
        (start_ticks(self.pid) == Some(self.start_ticks)).then_some(pidfd)
    }

    /// Kills it if it is still this process, and waits until it has ended,
    /// `patience` at most. Who its parent is, collects it.
    pub fn kill(self, patience: Duration) {
        let Some(pidfd) = self.open() else { return };
        // ESRCH: it ended in between.
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        let patience = Timespec::try_from(patience).unwrap_or_default();
        let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience));
    }
}

/// Field 22 of `/proc/PID/stat` (`proc_pid_stat(5)`), counted from behind the
/// command's name, which may hold anything, also `) `.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.iter().rposition(|byte| *byte == b')')? + 2;
    let rest = std::str::from_utf8(stat.get(after_name..)?).ok()?;
    rest.split(' ').nth(22 - 3)?.parse().ok()
}

impl Record {
    /// Of a new pod.
    pub fn new() -> Self {
        Self {
            version: VERSION,
            ..Self::default()
        }
    }

    /// Writes it in one step: a reader finds the former or this. It need not
    /// survive the host, whose `/run` does not either.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let failed = |source| Error::Io {
            operation: "write",
            path: path.to_owned(),
            source,
        };
        let text = serde_json::to_vec_pretty(self).map_err(|error| failed(error.into()))?;
        let new = path.with_extension("json.new");
        fs::write(&new, text).map_err(failed)?;
        fs::rename(&new, path).map_err(failed)
    }

    /// Reads it; `None` when there is none.
    pub fn read(path: &Path) -> Result<Option<Self>, Error> {
        let text = match fs::read(path) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|source| Error::Io {
                operation: "read",
                path: path.to_owned(),
                source,
            })?,
        };
        let record: Self = serde_json::from_slice(&text).map_err(|source| Error::Malformed {
            path: path.to_owned(),
            source,
        })?;
        if record.version != VERSION {
            return Err(Error::Version {
                path: path.to_owned(),
                version: record.version,
            });
        }
        Ok(Some(record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_of_a_reused_pid_is_none() {
        let own = Process::of(std::process::id());
        assert!(own.start_ticks > 0);
        assert!(own.open().is_some());
        let former = Process {
            start_ticks: own.start_ticks - 1,
            ..own
        };
        assert!(former.open().is_none());
        former.kill(Duration::ZERO);
    }

    #[test]
    fn read_of_what_was_written_is_the_same() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("pod.json");
        assert_eq!(Record::read(&path).expect("is not there"), None);
        let mut record = Record::new();
        record.cgroup = Some(Cgroup {
            path: PathBuf::from("/a"),
            made: vec![PathBuf::from("/a")],
        });
        record.write(&path).expect("writes");
        assert_eq!(Record::read(&path).expect("reads"), Some(record.clone()));
        record.version = 2;
        record.write(&path).expect("writes");
        assert!(matches!(
            Record::read(&path),
            Err(Error::Version { version: 2, .. })
        ));
    }
}
