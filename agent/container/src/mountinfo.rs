//! The kernel's table of mounts, as the calling process sees it.

use std::{ffi::OsString, fs, io, os::unix::ffi::OsStringExt, path::PathBuf};

/// One mount (`proc_pid_mountinfo(5)`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The same as no other mount's.
    pub id: u64,
    /// The mount that it is mounted on; its own id for the initial root.
    pub parent: u64,
    /// Where it is. Below a volume names are the host's, and may be any bytes.
    pub point: PathBuf,
}

/// All mounts, in the order in which they were made.
///
/// # Errors
/// When the table cannot be read.
pub fn read() -> io::Result<Vec<Mount>> {
    fs::read("/proc/self/mountinfo").map(|table| parse(&table))
}

/// The mounts of a table; lines that are none are left out.
pub fn parse(table: &[u8]) -> Vec<Mount> {
    let lines = table.split(|byte| *byte == b'\n');
    lines.filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut number = || str::from_utf8(fields.next()?).ok()?.parse().ok();
    Some(Mount {
        id: number()?,
        parent: number()?,
        // After the device's number and the root in the file system.
        point: PathBuf::from(OsString::from_vec(unescape(fields.nth(2)?))),
    })
}

/// Undoes the escapes of a field: a backslash and three octal digits.
fn unescape(mut text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    loop {
        match text {
            [
                b'\\',
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                rest @ ..,
            ] => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                text = rest;
            }
            [byte, rest @ ..] => {
                plain.push(*byte);
                text = rest;
            }
            [] => return plain,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn parse_undoes_escapes() {
        let table = b"31 30 0:32 / /share/with\\040space\\134040 rw - virtiofs share rw\n";
        let wanted = Mount {
            id: 31,
            parent: 30,
            point: PathBuf::from("/share/with space\\040"),
        };
        assert_eq!(parse(table), [wanted]);
    }

    #[test]
    fn parse_names_may_be_any_bytes() {
        let mounts = parse(b"31 30 0:32 / /share/\xff rw - virtiofs share rw\n");
        assert_eq!(mounts[0].point.as_os_str().as_bytes(), b"/share/\xff");
    }

    #[test]
    fn parse_what_is_no_mount_is_left_out() {
        assert_eq!(parse(b"\n31\nx 30 0:32 / /a rw\n31 30 0:32 /\n"), []);
    }
}
