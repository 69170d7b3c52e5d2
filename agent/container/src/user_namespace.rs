//! `linux.uidMappings` and `linux.gidMappings`: a user namespace of the container's own.
//!
//! The *host* of a mapping is the guest, whose ids are those of the pod's files
//! and so of the host that these come from.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Gid, Pid, Uid, pipe2, setgroups, setresgid, setresuid};
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType, Process, Spec};

use crate::Unsupported;
use crate::kernel_calls::{Cloned, clone_child};

/// The kernel takes a map in one write of less than a page (`user_namespaces(7)`).
const MAX_MAP_BYTES: usize = 4095;

/// Both maps of a container with a user namespace.
#[derive(Debug, Clone, Copy)]
pub struct IdMaps<'a> {
    uids: &'a [LinuxIdMapping],
    gids: &'a [LinuxIdMapping],
}

fn mappings(all: Option<&Vec<LinuxIdMapping>>) -> &[LinuxIdMapping] {
    all.map(Vec::as_slice).unwrap_or_default()
}

/// The maps, if the container has a user namespace of its own.
pub fn of(linux: Option<&Linux>) -> Option<IdMaps<'_>> {
    let linux = linux?;
    let namespaces = linux.namespaces().iter().flatten();
    let mut kinds = namespaces.map(oci_spec::runtime::LinuxNamespace::typ);
    kinds
        .any(|kind| kind == LinuxNamespaceType::User)
        .then(|| IdMaps {
            uids: mappings(linux.uid_mappings().as_ref()),
            gids: mappings(linux.gid_mappings().as_ref()),
        })
}

/// Of `spec`, as [`of`].
pub fn of_spec(spec: &Spec) -> Option<IdMaps<'_>> {
    of(spec.linux().as_ref())
}

impl<'a> IdMaps<'a> {
    /// Of a mount's own mappings.
    pub fn new(uids: &'a [LinuxIdMapping], gids: &'a [LinuxIdMapping]) -> Self {
        Self { uids, gids }
    }

    /// What a user of the container is in the guest.
    pub fn guest_uid(&self, uid: u32) -> Option<u32> {
        outside(self.uids, uid)
    }

    /// What a group of the container is in the guest.
    pub fn guest_gid(&self, gid: u32) -> Option<u32> {
        outside(self.gids, gid)
    }

    /// Refuses maps that the kernel would not take; `place` is where they are.
    pub fn check(&self, place: &str) -> Result<(), Unsupported> {
        for (field, map) in [("uidMappings", self.uids), ("gidMappings", self.gids)] {
            let refuse = |reason: String| Err(Unsupported::new(format!("{place}.{field}"), reason));
            if map.is_empty() {
                return refuse("is missing or empty: nobody would be mapped".into());
            }
            let overflows = |one: &LinuxIdMapping| {
                one.size() == 0
                    || one.host_id().checked_add(one.size() - 1).is_none()
                    || one.container_id().checked_add(one.size() - 1).is_none()
            };
            if let Some(index) = map.iter().position(overflows) {
                return refuse(format!("[{index}] maps nothing or more ids than there are"));
            }
            if text(map).len() > MAX_MAP_BYTES {
                return refuse(format!("is longer than {MAX_MAP_BYTES} bytes"));
            }
        }
        Ok(())
    }

    /// Refuses a user that has no id in the guest.
    pub fn check_user(&self, process: &Process) -> Result<(), Unsupported> {
        let user = process.user();
        let refuse = |field: &str, id: u32, map: &str| {
            Err(Unsupported::new(
                format!("process.user.{field}"),
                format!("{id} is not mapped by linux.{map}"),
            ))
        };
        if self.guest_uid(user.uid()).is_none() {
            return refuse("uid", user.uid(), "uidMappings");
        }
        if self.guest_gid(user.gid()).is_none() {
            return refuse("gid", user.gid(), "gidMappings");
        }
        let mut groups = user.additional_gids().iter().flatten();
        match groups.find(|gid| self.guest_gid(**gid).is_none()) {
            Some(gid) => refuse("additionalGids", *gid, "gidMappings"),
            None => Ok(()),
        }
    }

    /// Gives the user namespace of process `pid` its maps. The caller has every
    /// privilege in the parent namespace, and `procfs` shows its PID namespace.
    pub fn write(&self, procfs: &OwnedFd, pid: i32) -> io::Result<()> {
        for (file, map) in [("uid_map", self.uids), ("gid_map", self.gids)] {
            let path = Path::new(&pid.to_string()).join(file);
            let opened = openat(
                procfs,
                &path,
                OFlag::O_WRONLY | OFlag::O_CLOEXEC,
                Mode::empty(),
            )?;
            File::from(opened).write_all(text(map).as_bytes())?;
        }
        Ok(())
    }

    /// A new user namespace with these maps that no process is in.
    pub fn namespace(&self, procfs: &OwnedFd) -> io::Result<OwnedFd> {
        let (end, hold) = pipe2(OFlag::O_CLOEXEC)?;
        match clone_child(CloneFlags::CLONE_NEWUSER)? {
            Cloned::Child => {
                drop(hold);
                // Until the parent has what it wants, or is gone.
                let _ = File::from(end).read(&mut [0]);
                std::process::exit(0);
            }
            Cloned::Parent { pid, .. } => {
                let opened = self.write(procfs, pid).and_then(|()| {
                    let path = Path::new(&pid.to_string()).join("ns/user");
                    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
                    Ok(openat(procfs, &path, flags, Mode::empty())?)
                });
                drop(hold);
                wait_for(pid)?;
                opened
            }
        }
    }
}

/// Reaps a child of the caller's; returns its exit code, -1 for a signal.
pub fn wait_for(pid: i32) -> io::Result<i32> {
    use nix::sys::wait::WaitStatus;
    loop {
        match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code),
            Ok(WaitStatus::Signaled(..)) => return Ok(-1),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Becomes user and group 0 of the namespace that the caller has come into, with
/// all capabilities in it: what it makes has an owner there.
pub fn become_root() -> Result<(), Errno> {
    setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}

fn outside(map: &[LinuxIdMapping], id: u32) -> Option<u32> {
    map.iter().find_map(|one| {
        let offset = id.checked_sub(one.container_id())?;
        (offset < one.size()).then(|| one.host_id() + offset)
    })
}

fn text(map: &[LinuxIdMapping]) -> String {
    use std::fmt::Write as _;
    map.iter().fold(String::new(), |mut text, one| {
        let (inside, outside, size) = (one.container_id(), one.host_id(), one.size());
        let _ = writeln!(text, "{inside} {outside} {size}");
        text
    })
}

/// Refuses maps without a user namespace, and a user namespace without maps
/// for its root and for the container's user.
pub fn check(spec: &Spec) -> Result<(), Unsupported> {
    let linux = spec.linux().as_ref();
    let Some(maps) = of(linux) else {
        let asked = |map: Option<&Vec<LinuxIdMapping>>| !mappings(map).is_empty();
        return match linux {
            Some(linux) if asked(linux.uid_mappings().as_ref()) => Err(needs_namespace("uid")),
            Some(linux) if asked(linux.gid_mappings().as_ref()) => Err(needs_namespace("gid")),
            _ => Ok(()),
        };
    };
    maps.check("linux")?;
    for (field, mapped) in [
        ("uidMappings", maps.guest_uid(0)),
        ("gidMappings", maps.guest_gid(0)),
    ] {
        if mapped.is_none() {
            let reason = "container id 0, which sets the container up, is not mapped";
            return Err(Unsupported::new(format!("linux.{field}"), reason));
        }
    }
    match spec.process() {
        Some(process) => maps.check_user(process),
        None => Ok(()),
    }
}

fn needs_namespace(kind: &str) -> Unsupported {
    Unsupported::new(
        format!("linux.{kind}Mappings"),
        "needs a namespace of type user in linux.namespaces",
    )
}

/// Gives descriptors to a user of the guest's, as far as they can have an owner.
pub fn give(streams: &[OwnedFd], uid: u32) -> Result<(), Errno> {
    use nix::sys::stat::fstat;
    use nix::unistd::fchown;
    for stream in streams {
        // Not the guest's /dev/null, which is everybody's.
        if fstat(stream)?.st_rdev != 0 {
            continue;
        }
        match fchown(stream.as_fd(), Some(Uid::from_raw(uid)), None) {
            Ok(()) | Err(Errno::EINVAL | Errno::EPERM | Errno::EROFS) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn map() -> Vec<LinuxIdMapping> {
        serde_json::from_value(json!([
            {"containerID": 0, "hostID": 1000, "size": 1},
            {"containerID": 1, "hostID": 100_000, "size": 65535},
        ]))
        .unwrap()
    }

    #[test]
    fn outside_maps_each_range_and_nothing_else() {
        let map = map();
        assert_eq!(outside(&map, 0), Some(1000));
        assert_eq!(outside(&map, 1), Some(100_000));
        assert_eq!(outside(&map, 65535), Some(165_534));
        assert_eq!(outside(&map, 65536), None);
    }

    #[test]
    fn text_is_in_the_kernels_order() {
        assert_eq!(text(&map()), "0 1000 1\n1 100000 65535\n");
    }

    #[test]
    fn check_maps_that_the_kernel_would_not_take_are_refused() {
        let refused = |map: serde_json::Value| {
            let map: Vec<LinuxIdMapping> = serde_json::from_value(map).unwrap();
            let good = self::map();
            IdMaps::new(&good, &map).check("linux").unwrap_err().field
        };
        for bad in [
            json!([]),
            json!([{"containerID": 0, "hostID": 0, "size": 0}]),
            json!([{"containerID": 0, "hostID": 4_294_967_295_u32, "size": 2}]),
        ] {
            assert_eq!(refused(bad), "linux.gidMappings");
        }
    }
}
