//! Bringing the guest's CPUs on- and offline.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use thiserror::Error;

/// The kernel's CPUs (Documentation/core-api/cpu_hotplug.rst).
const CPUS: &str = "/sys/devices/system/cpu";

/// Held while CPUs come and go: the last to ask has its way.
static CHANGING: Mutex<()> = Mutex::new(());

/// Why the guest has not the CPUs that were asked for.
#[derive(Debug, Error)]
pub enum CpusError {
    /// None, or more than there can be.
    #[error("{count} CPUs asked for: the guest can have 1 to {possible}")]
    Count {
        /// As asked.
        count: u32,
        /// How many there can be.
        possible: u32,
    },
    /// One that the kernel does not start or stop.
    #[error("{verb} CPU {cpu}")]
    Change {
        /// As in "start".
        verb: &'static str,
        /// Its number.
        cpu: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel's list of them.
    #[error("read {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Brings the first `count` CPUs online and the others offline. Of those that must be
/// started, the monitor has made the vCPUs before.
///
/// # Errors
/// At the first CPU that does not change; those before it have.
pub fn set(count: u32) -> Result<(), CpusError> {
    // Nothing is left half done by a panic that the next call does not mend.
    let _one_at_a_time = CHANGING.lock();
    set_in(Path::new(CPUS), count)
}

fn set_in(cpus: &Path, count: u32) -> Result<(), CpusError> {
    let possible = last_of(cpus, "present")?.saturating_add(1);
    if count == 0 || count > possible {
        return Err(CpusError::Count { count, possible });
    }
    // The first is always online, and has no switch.
    for cpu in 1..count {
        switch(cpus, cpu, true)?;
    }
    for cpu in (count.max(1)..possible).rev() {
        switch(cpus, cpu, false)?;
    }
    Ok(())
}

/// Does nothing to one that is as wanted.
fn switch(cpus: &Path, cpu: u32, online: bool) -> Result<(), CpusError> {
    let path = cpus.join(format!("cpu{cpu}/online"));
    let failed = |source| CpusError::Change {
        verb: if online { "start" } else { "stop" },
        cpu,
        source,
    };
    let wanted = if online { "1" } else { "0" };
    if fs::read_to_string(&path).map_err(failed)?.trim() == wanted {
        return Ok(());
    }
    fs::write(&path, wanted).map_err(failed)
}

/// The last number of a list such as "0-3".
fn last_of(cpus: &Path, list: &str) -> Result<u32, CpusError> {
    let path = cpus.join(list);
    let read = |source| CpusError::Read {
        path: path.clone(),
        source,
    };
    let text = fs::read_to_string(&path).map_err(read)?;
    let last = text.trim().rsplit([',', '-']).next();
    let last = last.and_then(|last| last.parse().ok());
    last.ok_or_else(|| read(io::ErrorKind::InvalidData.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four CPUs, of which the first alone is online.
    fn machine() -> tempfile::TempDir {
        let cpus = tempfile::tempdir().expect("makes a directory");
        fs::write(cpus.path().join("present"), "0-3\n").expect("writes");
        for cpu in 0..4 {
            let directory = cpus.path().join(format!("cpu{cpu}"));
            fs::create_dir(&directory).expect("makes a directory");
            if cpu > 0 {
                fs::write(directory.join("online"), "0\n").expect("writes");
            }
        }
        cpus
    }

    fn online(cpus: &Path) -> Vec<String> {
        let state = |cpu| fs::read_to_string(cpus.join(format!("cpu{cpu}/online")));
        (1..4)
            .map(|cpu| state(cpu).expect("reads").trim().to_owned())
            .collect()
    }

    #[test]
    fn set_brings_the_first_online_and_the_others_offline() {
        let machine = machine();
        set_in(machine.path(), 3).expect("starts them");
        assert_eq!(online(machine.path()), ["1", "1", "0"]);
        set_in(machine.path(), 1).expect("stops them");
        assert_eq!(online(machine.path()), ["0", "0", "0"]);
        set_in(machine.path(), 4).expect("starts them");
        assert_eq!(online(machine.path()), ["1", "1", "1"]);
    }

    #[test]
    fn set_none_or_more_than_there_are_is_refused() {
        let machine = machine();
        for count in [0, 5, u32::MAX] {
            let refused = set_in(machine.path(), count).expect_err("is refused");
            assert!(matches!(refused, CpusError::Count { possible: 4, .. }));
        }
        assert_eq!(online(machine.path()), ["0", "0", "0"]);
    }

    #[test]
    fn set_names_the_cpu_that_does_not_change() {
        let machine = machine();
        fs::remove_file(machine.path().join("cpu2/online")).expect("removes");
        let refused = set_in(machine.path(), 4).expect_err("cannot");
        assert_eq!(refused.to_string(), "start CPU 2");
    }
}
