//! What the containers may take of the guest's memory, which may grow and shrink.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Mutex;

use crate::guest::{CONTAINERS_CGROUP, GuestError};

/// Memory that containers cannot take from the kernel and the agent.
const RESERVE_BYTES: u64 = 32 * 1024 * 1024;

/// Held while the bound is set, so that the last to read the memory is the last to
/// write.
static FITTING: Mutex<()> = Mutex::new(());

/// Bounds what all containers together may take by the memory that there is now,
/// which is returned in bytes. When that has become less than they have taken and
/// cannot give back, they keep it: none is killed because the guest shrinks.
///
/// # Errors
/// When the kernel's files cannot be read or written.
pub fn fit() -> Result<u64, GuestError> {
    // Nothing is left half done by a panic.
    let _one_at_a_time = FITTING.lock();
    let total = memory_total_bytes()?;
    let containers = Path::new(CONTAINERS_CGROUP);
    let kept = kept_bytes(&read(&containers.join("memory.stat"))?);
    let limit = total.saturating_sub(RESERVE_BYTES).max(kept);
    let path = containers.join("memory.max");
    fs::write(&path, limit.to_string()).map_err(|source| GuestError::Prepare { path, source })?;
    Ok(total)
}

/// What of `memory.stat` the kernel cannot reclaim without swap (cgroup-v2.rst,
/// "memory.stat").
fn kept_bytes(stat: &str) -> u64 {
    let figures = stat.lines().filter_map(|line| line.split_once(' '));
    let kept = figures.filter(|(name, _)| ["anon", "shmem", "kernel", "sock"].contains(name));
    let kept = kept.filter_map(|(_, bytes)| bytes.trim().parse().ok());
    kept.fold(0, u64::saturating_add)
}

fn memory_total_bytes() -> Result<u64, GuestError> {
    let path = Path::new("/proc/meminfo");
    parse_memory_total(&read(path)?).ok_or_else(|| GuestError::Prepare {
        path: path.to_owned(),
        source: io::ErrorKind::InvalidData.into(),
    })
}

fn parse_memory_total(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn read(path: &Path) -> Result<String, GuestError> {
    fs::read_to_string(path).map_err(|source| GuestError::Prepare {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_memory_total_line_of_meminfo_is_bytes() {
        let text = "MemTotal:         500456 kB\nMemFree:          471300 kB\n";
        assert_eq!(parse_memory_total(text), Some(500_456 * 1024));
    }

    #[test]
    fn parse_memory_total_without_the_line_is_none() {
        assert_eq!(parse_memory_total("MemFree: 1 kB\n"), None);
    }

    #[test]
    fn kept_bytes_are_not_those_of_files() {
        let stat = "anon 4096\nfile 1048576\nkernel 8192\nshmem 16384\nkernel_stack 512\n";
        assert_eq!(kept_bytes(stat), 4096 + 8192 + 16384);
        assert_eq!(kept_bytes(""), 0);
    }
}
