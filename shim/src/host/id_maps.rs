//! Id-mapped mounts: files of the host with other owners for the guest.
//!
//! A pod with a user namespace sees the host's user 0 as its own user 0, whose id
//! outside the namespace is another. The mapping is a property of the host's mount
//! in the share (`mount_setattr(2)`, `MOUNT_ATTR_IDMAP`), so that a guest that was
//! taken over cannot leave it out.
#![expect(
    unsafe_code,
    reason = "what a process may do between clone and its end"
)]

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use oci_spec::runtime::LinuxIdMapping;
use rustix::pipe::{PipeFlags, pipe_with};

use super::children;
use super::jail::{Jailed, clone_child};

/// `user_namespaces(7)`: a map is written at once, and is less than a page.
const MAX_MAP_BYTES: usize = 4095;

/// Consecutive ids: what the files have, what they are shown as, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Range {
    inside: u32,
    outside: u32,
    count: u32,
}

/// The ids of users and groups, each mapped.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct IdMaps {
    uids: Vec<Range>,
    gids: Vec<Range>,
}

impl IdMaps {
    /// From OCI mappings (runtime-spec, config-linux.md, "User namespace mappings").
    /// `None` when one of the two maps nobody, or more than the kernel takes.
    pub fn of_mappings(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Option<Self> {
        let ranges = |mappings: &[LinuxIdMapping]| {
            let range = |mapping: &LinuxIdMapping| Range {
                inside: mapping.container_id(),
                outside: mapping.host_id(),
                count: mapping.size(),
            };
            mappings.iter().map(range).collect()
        };
        Self::checked(ranges(uids), ranges(gids))
    }

    /// From the options of containerd's mounts: `INSIDE:OUTSIDE:COUNT`, several
    /// with commas between them.
    pub fn of_options(uids: &str, gids: &str) -> Option<Self> {
        Self::checked(parse(uids)?, parse(gids)?)
    }

    /// Whether user and group 0 are mapped, who set a container up.
    pub fn has_root(&self) -> bool {
        let has = |ranges: &[Range]| ranges.iter().any(|range| range.inside == 0);
        has(&self.uids) && has(&self.gids)
    }

    /// As `/proc/PID/uid_map` takes it.
    pub fn uid_map(&self) -> String {
        text(&self.uids)
    }

    /// As `/proc/PID/gid_map` takes it.
    pub fn gid_map(&self) -> String {
        text(&self.gids)
    }

    fn checked(uids: Vec<Range>, gids: Vec<Range>) -> Option<Self> {
        (are_a_map(&uids) && are_a_map(&gids)).then_some(Self { uids, gids })
    }

    /// A user namespace of the host's with these maps, which no process is in.
    ///
    /// # Errors
    /// When the host allows no more of them (`user.max_user_namespaces`), or the
    /// ranges overlap.
    pub(super) fn namespace(&self) -> io::Result<OwnedFd> {
        let (end, ours) = pipe_with(PipeFlags::CLOEXEC)?;
        let holder = children::spawn(|| spawn_holder(&end, &ours))?;
        let made = self.write_to(holder.pid);
        children::kill_and_reap(holder.pid, holder.pidfd.as_fd());
        made
    }

    fn write_to(&self, pid: u32) -> io::Result<OwnedFd> {
        fs::write(format!("/proc/{pid}/uid_map"), self.uid_map())?;
        fs::write(format!("/proc/{pid}/gid_map"), self.gid_map())?;
        Ok(fs::File::open(format!("/proc/{pid}/ns/user"))?.into())
    }
}

fn parse(option: &str) -> Option<Vec<Range>> {
    let range = |text: &str| {
        let mut numbers = text.split(':').map(|number| number.parse().ok());
        let range = Range {
            inside: numbers.next()??,
            outside: numbers.next()??,
            count: numbers.next()??,
        };
        numbers.next().is_none().then_some(range)
    };
    option.split(',').map(range).collect()
}

fn are_a_map(ranges: &[Range]) -> bool {
    let fits = |range: &Range| {
        let last = range.count.checked_sub(1);
        let in_bounds = |first: u32| last.is_some_and(|last| first.checked_add(last).is_some());
        in_bounds(range.inside) && in_bounds(range.outside)
    };
    !ranges.is_empty() && ranges.iter().all(fits) && text(ranges).len() <= MAX_MAP_BYTES
}

fn text(ranges: &[Range]) -> String {
    ranges.iter().fold(String::new(), |mut text, range| {
        let _ = writeln!(text, "{} {} {}", range.inside, range.outside, range.count);
        text
    })
}

/// A child in a user namespace of its own that waits to be killed, or for the pipe's
/// end at the end of this process.
fn spawn_holder(end: &OwnedFd, ours: &OwnedFd) -> io::Result<Jailed> {
    let (end, ours) = (end.as_raw_fd(), ours.as_raw_fd());
    // SAFETY: the child makes system calls on two descriptors that it has, and ends.
    if let Some(holder) = unsafe { clone_child(libc::CLONE_NEWUSER, None) }? {
        return Ok(holder);
    }
    // SAFETY: the byte is on this stack; the descriptors are the child's copies.
    unsafe {
        libc::close(ours);
        let mut byte = 0_u8;
        libc::read(end, (&raw mut byte).cast(), 1);
        libc::_exit(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn of_options_takes_what_containerd_writes() {
        let maps = IdMaps::of_options("0:65536:65536", "0:1000:1,1:100000:65535").expect("maps");
        assert_eq!(text(&maps.uids), "0 65536 65536\n");
        assert_eq!(text(&maps.gids), "0 1000 1\n1 100000 65535\n");
        for bad in [
            "",
            "0:1",
            "0:1:2:3",
            "0:1:0",
            "a:b:c",
            "0:4294967295:2",
            "0:1:2,",
        ] {
            assert_eq!(IdMaps::of_options(bad, "0:1:1"), None, "{bad}");
            assert_eq!(IdMaps::of_options("0:1:1", bad), None, "{bad}");
        }
    }

    #[test]
    fn of_mappings_is_the_same_map() {
        let mappings: Vec<LinuxIdMapping> = serde_json::from_value(serde_json::json!([
            {"containerID": 0, "hostID": 65536, "size": 65536}
        ]))
        .expect("mappings");
        let maps = IdMaps::of_mappings(&mappings, &mappings);
        assert_eq!(maps, IdMaps::of_options("0:65536:65536", "0:65536:65536"));
        assert_eq!(IdMaps::of_mappings(&mappings, &[]), None);
    }

    #[test]
    fn namespace_has_the_maps_and_leaves_no_process() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let maps = IdMaps::of_options("0:65536:10", "0:70000:10").expect("maps");
        let namespace = maps.namespace().expect("makes a namespace");
        let opened = rustix::fs::fstat(&namespace).expect("stats");
        let own = fs::metadata("/proc/self/ns/user").expect("stats");
        assert_ne!(opened.st_ino, std::os::unix::fs::MetadataExt::ino(&own));
        let overlapping = IdMaps::of_options("0:65536:10,5:80000:10", "0:70000:10").expect("maps");
        overlapping.namespace().expect_err("the kernel refuses it");
    }

    proptest! {
        #[test]
        fn of_options_any_text_never_panics(uids: String, gids: String) {
            let _ = IdMaps::of_options(&uids, &gids);
        }
    }
}
