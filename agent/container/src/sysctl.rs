//! `linux.sysctl`: only what belongs to a namespace of the container's or the pod's.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Component, Path};

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};

use crate::Unsupported;
use crate::kernel_calls::as_effective_user;

/// A setting that the kernel did not take.
#[derive(Debug, thiserror::Error)]
#[error("cannot set sysctl {key} to {value:?}")]
pub struct SysctlError {
    key: String,
    value: String,
    #[source]
    source: io::Error,
}

/// Settings of the IPC namespace outside `fs.mqueue`.
const IPC: [&str; 8] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
];

/// Path below `/proc/sys`. As in sysctl(8), the first separator tells which one
/// is meant: `net.ipv4.conf.eth0/1.forwarding` and `net/ipv4/conf/eth0.1/forwarding` are the same.
fn path_of(key: &str) -> String {
    if key
        .find(['.', '/'])
        .is_some_and(|at| key[at..].starts_with('/'))
    {
        return key.to_owned();
    }
    key.chars()
        .map(|c| match c {
            '.' => '/',
            '/' => '.',
            other => other,
        })
        .collect()
}

fn is_of_ipc(path: &str) -> bool {
    path.starts_with("fs/mqueue/") || IPC.contains(&path)
}

/// Refuses a setting that would be the whole guest's.
///
/// # Errors
/// By its name.
pub fn check(key: &str) -> Result<(), Unsupported> {
    let path = path_of(key);
    let plain = Path::new(&path)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    let namespaced = path.starts_with("net/") || path == "kernel/domainname" || is_of_ipc(&path);
    if plain && namespaced {
        return Ok(());
    }
    let reason = if path == "kernel/hostname" {
        "is set by the field hostname"
    } else {
        "does not belong to a network, IPC or UTS namespace"
    };
    Err(Unsupported::new(format!("linux.sysctl.{key}"), reason))
}

/// Sets one value, in the calling thread's namespaces, through a procfs of the runtime's
/// own. The caller's user is root, with all privileges.
///
/// # Errors
/// What the kernel did not take.
pub fn set(procfs: &OwnedFd, key: &str, value: &str) -> Result<(), SysctlError> {
    let path = path_of(key);
    let file = Path::new("sys").join(&path);
    let write = || {
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let opened = openat(procfs, &file, flags, Mode::empty())?;
        File::from(opened).write_all(value.as_bytes())
    };
    let written = if is_of_ipc(&path) {
        // No privilege counts but being the root of the namespace's owner, to whom the
        // kernel shows the file to belong (ipc_permissions, mq_permissions).
        fstatat(procfs, &file, AtFlags::empty())
            .map_err(io::Error::from)
            .and_then(|status| as_effective_user(status.st_uid, write))
    } else {
        write()
    };
    written.map_err(|source| SysctlError {
        key: key.to_owned(),
        value: value.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_of_either_separator_finds_the_same_file() {
        assert_eq!(path_of("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(
            path_of("net.ipv4.conf.eth0/1.forwarding"),
            path_of("net/ipv4/conf/eth0.1/forwarding")
        );
    }

    #[test]
    fn check_only_settings_of_a_namespace_pass() {
        for key in [
            "net.ipv4.ip_unprivileged_port_start",
            "net/ipv4/conf/eth0.1/forwarding",
            "fs.mqueue.msg_max",
            "kernel.shm_rmid_forced",
            "kernel.domainname",
        ] {
            check(key).unwrap();
        }
        for key in [
            "kernel.hostname",
            "kernel.core_pattern",
            "vm.overcommit_memory",
            "fs.file-max",
            "net/../kernel/core_pattern",
            "/net/ipv4/ip_forward",
            "net",
        ] {
            assert_eq!(check(key).unwrap_err().field, format!("linux.sysctl.{key}"));
        }
    }
}
