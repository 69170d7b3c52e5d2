//! Whether anything is mounted below a directory that is about to be removed.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The first mount point at or below `path` in this process's mount namespace.
pub(super) fn first_below(path: &Path) -> io::Result<Option<PathBuf>> {
    let path = match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        canonical => canonical?,
    };
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(mount_points(&table).find(|mount| mount.starts_with(&path)))
}

/// The fifth field of each line, see `proc_pid_mountinfo(5)`.
fn mount_points(table: &[u8]) -> impl Iterator<Item = PathBuf> + '_ {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape)
}

/// Space, tab, newline and backslash are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        match tail {
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] if *first == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_escaped_path_is_decoded() {
        let table = b"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:5 / /a\\040b\\134c rw shared:1 - tmpfs t rw\n";
        let points: Vec<_> = mount_points(table).collect();
        assert_eq!(points, [PathBuf::from("/"), PathBuf::from("/a b\\c")]);
    }

    #[test]
    fn first_below_proc_is_found_and_absent_path_is_not() {
        assert_eq!(
            first_below(Path::new("/proc")).unwrap(),
            Some(PathBuf::from("/proc"))
        );
        assert_eq!(
            first_below(Path::new("/proc/self/nothing-here")).unwrap(),
            None
        );
    }
}
