//! Device nodes. Only the kernel's virtual devices: a number that names a disk
//! on the host may name the guest's own in here.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, SFlag, fchmodat, fstatat, makedev, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};

use super::{RootfsError, Tree};
use crate::Unsupported;
use crate::cgroup::allows_every_device;
use crate::user_namespace;

/// Devices that are the same in every kernel, as major and minor numbers of
/// Documentation/admin-guide/devices.txt.
const VIRTUAL: [(u64, u64); 11] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (1, 11),   // kmsg: the guest's log
    (5, 0),    // tty
    (5, 1),    // console
    (5, 2),    // ptmx
    (10, 200), // net/tun
    (10, 229), // fuse
];

/// What every container has (OCI runtime specification, config-linux, "Default Devices").
const DEFAULT: [(&str, u64, u64); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// A node to make.
struct Node {
    path: PathBuf,
    kind: SFlag,
    major: u64,
    minor: u64,
    mode: u32,
    uid: u32,
    gid: u32,
}

fn is_virtual(device: &LinuxDevice) -> bool {
    let number = u64::try_from(device.major())
        .ok()
        .zip(u64::try_from(device.minor()).ok());
    match device.typ() {
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => {
            number.is_some_and(|number| VIRTUAL.contains(&number))
        }
        LinuxDeviceType::A | LinuxDeviceType::B => false,
    }
}

fn devices(spec: &Spec) -> &[LinuxDevice] {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.devices().as_deref())
        .unwrap_or_default()
}

/// Refuses devices of the host that are named singly. Where every device is
/// allowed (`--privileged`), clients list all the host has: those are left out,
/// which the returned warning tells.
pub fn check(spec: &Spec) -> Result<Option<String>, Unsupported> {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let privileged = allows_every_device(resources);
    let mut left_out = 0;
    for (index, device) in devices(spec).iter().enumerate() {
        let path = device.path();
        let refuse = |field: &str, reason: String| {
            Err(Unsupported::new(
                format!("linux.devices[{index}]{field}"),
                reason,
            ))
        };
        if !is_virtual(device) {
            if privileged {
                left_out += 1;
                continue;
            }
            return refuse(
                "",
                format!(
                    "{} is device {} {}:{} of the host, which the guest does not have",
                    path.display(),
                    device.typ().as_str(),
                    device.major(),
                    device.minor()
                ),
            );
        }
        let below_dev = path.strip_prefix("/dev").is_ok_and(|rest| {
            rest.file_name().is_some()
                && rest
                    .components()
                    .all(|part| matches!(part, std::path::Component::Normal(_)))
        });
        if !below_dev {
            return refuse(
                ".path",
                format!(
                    "{} is not below /dev, where alone devices work",
                    path.display()
                ),
            );
        }
    }
    Ok((left_out > 0).then(|| {
        format!(
            "linux.devices: left out {left_out} devices of the host, which the guest does not have"
        )
    }))
}

/// Makes the default devices, those of the specification, and the links, in the
/// container's `/dev`, which is the root of `dev`.
pub fn make(dev: &Tree, spec: &Spec) -> Result<(), RootfsError> {
    let maps = user_namespace::of_spec(spec);
    // In a user namespace an owner without an id in there is nobody, as elsewhere.
    let guest_uid = |uid| maps.map_or(uid, |maps| maps.guest_uid(uid).unwrap_or(uid));
    let guest_gid = |gid| maps.map_or(gid, |maps| maps.guest_gid(gid).unwrap_or(gid));
    let asked: Vec<_> = devices(spec)
        .iter()
        .filter(|device| is_virtual(device))
        .collect();
    for (name, major, minor) in DEFAULT {
        let path = Path::new("/dev").join(name);
        // One that the specification describes itself is made as it says.
        if asked.iter().all(|device| *device.path() != path) {
            make_node(
                dev,
                &Node {
                    path,
                    kind: SFlag::S_IFCHR,
                    major,
                    minor,
                    mode: 0o666,
                    uid: guest_uid(0),
                    gid: guest_gid(0),
                },
            )?;
        }
    }
    for device in asked {
        // These two are the container's own: a link into its devpts, and its terminal.
        if [Path::new("/dev/ptmx"), Path::new("/dev/console")].contains(&device.path().as_path()) {
            continue;
        }
        make_node(
            dev,
            &Node {
                path: device.path().clone(),
                kind: if device.typ() == LinuxDeviceType::P {
                    SFlag::S_IFIFO
                } else {
                    SFlag::S_IFCHR
                },
                major: device.major().unsigned_abs(),
                minor: device.minor().unsigned_abs(),
                mode: device.file_mode().unwrap_or(0o666),
                uid: guest_uid(device.uid().unwrap_or(0)),
                gid: guest_gid(device.gid().unwrap_or(0)),
            },
        )?;
    }
    for (name, target) in LINKS {
        match symlinkat(target, dev, name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => {
                return Err(RootfsError::Link {
                    path: Path::new("/dev").join(name),
                    source: errno.into(),
                });
            }
        }
    }
    Ok(())
}

fn make_node(dev: &Tree, node: &Node) -> Result<(), RootfsError> {
    let failed = |source: io::Error| RootfsError::Device {
        path: node.path.clone(),
        source,
    };
    let (Some(parent), Some(name)) = (node.path.parent(), node.path.file_name()) else {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    };
    // Every device is below /dev, as was checked.
    let parent = parent.strip_prefix("/dev").unwrap_or(parent);
    let directory = dev
        .make_directory(parent)
        .map_err(|errno| failed(errno.into()))?;
    let number = if node.kind == SFlag::S_IFIFO {
        0
    } else {
        makedev(node.major, node.minor)
    };
    let mode = Mode::from_bits_truncate(node.mode & 0o7777);
    match mknodat(&directory, name, node.kind, mode, number) {
        Ok(()) => {}
        Err(Errno::EEXIST) => {
            let there = fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_err(|errno| failed(errno.into()))?;
            let kind = SFlag::from_bits_truncate(there.st_mode) & SFlag::S_IFMT;
            if kind == node.kind && there.st_rdev == number {
                return Ok(());
            }
            return Err(RootfsError::DeviceTaken {
                path: node.path.clone(),
            });
        }
        Err(errno) => return Err(failed(errno.into())),
    }
    // The process's umask has no say in a device's mode.
    fchmodat(
        &directory,
        name,
        mode,
        nix::sys::stat::FchmodatFlags::FollowSymlink,
    )
    .and_then(|()| {
        fchownat(
            &directory,
            name,
            Some(Uid::from_raw(node.uid)),
            Some(Gid::from_raw(node.gid)),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
    })
    .map_err(|errno| failed(errno.into()))
}
