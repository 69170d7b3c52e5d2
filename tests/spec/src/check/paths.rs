//! `linux.maskedPaths` and `linux.readonlyPaths`.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{major, minor};
use nix::sys::statvfs::{FsFlags, statvfs};
use serde_json::Value;

use super::{mounts, texts};
use crate::report::Report;

pub fn check(spec: &Value, report: &mut Report) {
    for path in texts(spec, "/linux/maskedPaths") {
        let field = format!("linux.maskedPaths: {path}");
        match fs::metadata(path) {
            // This kernel has no such file, or the image.
            Err(_) => report.unchecked(field, "is not there"),
            Ok(status) => report.compare(field, "masked", what(path, &status)),
        }
    }
    let mounted = mounts::mounted();
    for path in texts(spec, "/linux/readonlyPaths") {
        let field = format!("linux.readonlyPaths: {path}");
        if fs::metadata(path).is_err() {
            report.unchecked(field, "is not there");
            continue;
        }
        let read_only =
            statvfs(path).map(|file_system| file_system.flags().contains(FsFlags::ST_RDONLY));
        report.compare_read(field.as_str(), true, read_only);
        let writable: Vec<_> = mounted
            .iter()
            .filter(|mount| mount.point.starts_with(path) && !mount.has("ro"))
            .map(|mount| mount.point.display().to_string())
            .collect();
        report.compare(format!("{field}: writable below"), "", writable.join(" "));
    }
}

/// What a masked path shows: a directory nothing, and no way to write; a file
/// what `/dev/null` has.
fn what(path: &str, status: &Metadata) -> String {
    if status.is_dir() {
        let names = fs::read_dir(path).map(|entries| entries.flatten().count());
        let read_only = statvfs(Path::new(path))
            .is_ok_and(|file_system| file_system.flags().contains(FsFlags::ST_RDONLY));
        return match (names, read_only) {
            (Ok(0), true) => "masked".to_owned(),
            (Ok(names), _) => format!("a directory of {names} names, read-only: {read_only}"),
            (Err(error), _) => format!("a directory that cannot be read: {error}"),
        };
    }
    let number = status.rdev();
    if status.file_type().is_char_device() && (major(number), minor(number)) == (1, 3) {
        "masked".to_owned()
    } else {
        format!("a file of {} bytes", status.size())
    }
}
