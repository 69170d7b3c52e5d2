//! `linux.devices`, the default devices and links, and the rules of
//! `linux.resources.devices`.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, major, makedev, minor, mknod};
use serde_json::{Value, json};

use super::{has_namespace, list, status, text};
use crate::report::Report;

/// OCI runtime specification, config-linux, "Default Devices".
const DEFAULT: [(&str, u64, u64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// runtime-linux, "Dev symbolic links", and `/dev/ptmx` of the default devices.
const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

pub fn check(spec: &Value, report: &mut Report) {
    nodes(spec, report);
    for (link, target) in LINKS {
        let seen = fs::read_link(link).map(|path| path.display().to_string());
        report.compare_read(format!("devices: {link}"), target, seen);
    }
    if spec["process"]["terminal"] == true {
        let number = |path: &str| fs::metadata(path).map(|status| status.rdev());
        let slave = number("/dev/pts/0").map_or_else(|error| error.to_string(), |n| n.to_string());
        report.compare_read("devices: /dev/console", slave, number("/dev/console"));
    }
    others(spec, report);
    rules(spec, report);
}

fn nodes(spec: &Value, report: &mut Report) {
    let asked = list(spec, "/linux/devices");
    for device in asked {
        let path = text(device, "/path");
        let kind = text(device, "/type");
        let number = |field: &str| device[field].as_u64().unwrap_or_default();
        let (kind, numbers) = match kind {
            "u" => ("c", (number("major"), number("minor"))),
            "p" => ("p", (0, 0)),
            _ => (kind, (number("major"), number("minor"))),
        };
        let mode = device["fileMode"].as_u64().unwrap_or(0o666);
        let owner = (number("uid"), number("gid"));
        node(spec, path, kind, numbers, (mode, owner), report);
    }
    for (path, major, minor) in DEFAULT {
        if asked.iter().all(|device| text(device, "/path") != path) {
            node(spec, path, "c", (major, minor), (0o666, (0, 0)), report);
        }
    }
}

fn node(
    spec: &Value,
    path: &str,
    kind: &str,
    (major_number, minor_number): (u64, u64),
    (mode, (uid, gid)): (u64, (u64, u64)),
    report: &mut Report,
) {
    // In a user namespace it is another's node, bound.
    let bound = has_namespace(spec, "user");
    let owned = |mode: u64, uid: u64, gid: u64| {
        if bound {
            String::new()
        } else {
            format!(" {mode:04o} {uid}:{gid}")
        }
    };
    let seen = fs::symlink_metadata(path).map(|status| {
        let kind = match status.file_type() {
            kind if kind.is_char_device() => "c",
            kind if kind.is_block_device() => "b",
            kind if kind.is_fifo() => "p",
            _ => "no device",
        };
        let (major, minor) = (major(status.rdev()), minor(status.rdev()));
        let owned = owned(
            u64::from(status.mode() & 0o7777),
            u64::from(status.uid()),
            u64::from(status.gid()),
        );
        format!("{kind} {major}:{minor}{owned}")
    });
    let expected = format!(
        "{kind} {major_number}:{minor_number}{}",
        owned(mode, uid, gid)
    );
    report.compare_read(format!("devices: {path}"), expected, seen);
}

/// What else is in `/dev`.
fn others(spec: &Value, report: &mut Report) {
    // runc makes `core`, where there is a `/proc/kcore`.
    let mut known = BTreeSet::from(["core".to_owned()]);
    let mounts = list(spec, "/mounts")
        .iter()
        .map(|mount| text(mount, "/destination"));
    let devices = list(spec, "/linux/devices")
        .iter()
        .map(|device| text(device, "/path"));
    let default = DEFAULT.iter().map(|(path, ..)| *path);
    let links = LINKS.iter().map(|(path, _)| *path);
    let all = mounts.chain(devices).chain(default).chain(links);
    known.extend(
        all.filter_map(|path| path.strip_prefix("/dev/")?.split('/').next())
            .map(str::to_owned),
    );
    if spec["process"]["terminal"] == true {
        known.insert("console".to_owned());
    }
    let Ok(entries) = fs::read_dir("/dev") else {
        return report.compare("devices: others", "", "cannot be listed");
    };
    let names = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    let found: BTreeSet<_> = names.filter(|name| !known.contains(name)).collect();
    let found: Vec<_> = found.into_iter().collect();
    report.compare("devices: others", "", found.join(" "));
}

/// Devices that are the same in every kernel, and do nothing by being opened.
const PROBED: [(u64, u64); 5] = [(1, 3), (1, 5), (1, 7), (10, 200), (10, 229)];

fn rules(spec: &Value, report: &mut Report) {
    const CAP_MKNOD: u64 = 1 << 27;
    let effective = status().get("CapEff").cloned().unwrap_or_default();
    let effective = u64::from_str_radix(&effective, 16).unwrap_or_default();
    if effective & CAP_MKNOD == 0 || has_namespace(spec, "user") {
        let why = "the program may not make nodes to try them with";
        return report.unchecked("linux.resources.devices", why);
    }
    let path = Path::new("/dev/probe");
    for (major, minor) in PROBED {
        for access in ['r', 'w'] {
            let field = format!("linux.resources.devices: {major}:{minor} {access}");
            let number = makedev(major, minor);
            if let Err(error) = mknod(
                path,
                SFlag::S_IFCHR,
                Mode::from_bits_truncate(0o666),
                number,
            ) {
                report.compare(field, "a node to try", error);
                continue;
            }
            let expected = allowed(spec, (major, minor), access);
            let opened = OpenOptions::new()
                .read(access == 'r')
                .write(access == 'w')
                .open(path);
            report.compare(field, answer(expected), answer(!is_denied(&opened)));
            let _ = fs::remove_file(path);
        }
    }
}

fn answer(allowed: bool) -> &'static str {
    if allowed { "allowed" } else { "denied" }
}

/// That a driver is missing or busy comes after the question whether it may be used.
fn is_denied(opened: &io::Result<File>) -> bool {
    matches!(opened, Err(error) if error.raw_os_error() == Some(libc::EPERM))
}

/// The last rule that is about a device decides; without any, the default
/// devices may be used.
fn allowed(spec: &Value, (major, minor): (u64, u64), access: char) -> bool {
    let matches = |rule: &Value| {
        let number = |field: &str, is: u64| match &rule[field] {
            Value::Null => true,
            value => *value == json!(is) || *value == json!(-1),
        };
        matches!(text(rule, "/type"), "" | "a" | "c")
            && number("major", major)
            && number("minor", minor)
            && (rule["access"].is_null() || text(rule, "/access").contains(access))
    };
    let rules = list(spec, "/linux/resources/devices");
    match rules.iter().rfind(|rule| matches(rule)) {
        Some(rule) => rule["allow"] == true,
        None => DEFAULT
            .iter()
            .any(|known| (known.1, known.2) == (major, minor)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowed_by_the_last_rule_that_matches() {
        let spec = json!({"linux": {"resources": {"devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
            {"allow": false, "type": "c", "major": 10, "access": "w"},
        ]}}});
        assert!(allowed(&spec, (10, 229), 'r'));
        assert!(!allowed(&spec, (10, 229), 'w'));
        assert!(!allowed(&spec, (1, 3), 'r'));
    }

    #[test]
    fn allowed_without_rules_are_the_default_devices() {
        assert!(allowed(&json!({}), (1, 3), 'w'));
        assert!(!allowed(&json!({}), (10, 200), 'r'));
    }
}
