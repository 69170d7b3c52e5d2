//! The kernel's table of mounts, as the calling thread sees it.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount (`proc_pid_mountinfo(5)`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MountEntry {
    /// What `statx(2)` calls `stx_mnt_id`.
    pub(super) id: u64,
    /// The mount that it is mounted on.
    pub(super) parent: u64,
    /// `major:minor` of its file system, which every mount of it shares.
    pub(super) device: String,
    /// Which directory of its file system it shows.
    pub(super) root: PathBuf,
    /// Where.
    pub(super) point: PathBuf,
    /// Whether this mount, or the file system as a whole, cannot be written to.
    pub(super) read_only: bool,
    /// As in `ext4` or `fuse.sshfs`.
    pub(super) kind: String,
    /// What is mounted: a device, or a name.
    pub(super) source: String,
}

/// All mounts, in the order in which they were made.
pub(super) fn read() -> io::Result<Vec<MountEntry>> {
    let table = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect())
}

fn parse(line: &[u8]) -> Option<MountEntry> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let number = |field: &[u8]| text(field).parse().ok();
    let path = |field| PathBuf::from(OsString::from_vec(unescape(field)));
    let read_only = |options: &[u8]| {
        options
            .split(|byte| *byte == b',')
            .any(|word| word == b"ro")
    };

    let mut fields = line.split(|byte| *byte == b' ');
    let (id, parent) = (number(fields.next()?)?, number(fields.next()?)?);
    let (device, root, point) = (fields.next()?, fields.next()?, fields.next()?);
    let options = fields.next()?;
    // Any number of tagged fields, up to a hyphen.
    fields.by_ref().find(|field| *field == b"-")?;
    let (kind, source, of_file_system) = (fields.next()?, fields.next()?, fields.next()?);
    Some(MountEntry {
        id,
        parent,
        device: text(device),
        root: path(root),
        point: path(point),
        read_only: read_only(options) || read_only(of_file_system),
        kind: text(kind),
        source: text(source),
    })
}

/// Undoes the escapes of mountinfo: a backslash and three octal digits.
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
    use proptest::prelude::*;
    use std::path::Path;

    #[test]
    fn parse_with_tags_and_escapes_reads_every_field() {
        let line = br"36 35 98:0 /mnt1 /mnt\0402 ro,noatime master:1 shared:2 - fuse.sshfs /dev/root rw,errors=continue";
        let wanted = MountEntry {
            id: 36,
            parent: 35,
            device: "98:0".to_owned(),
            root: "/mnt1".into(),
            point: "/mnt 2".into(),
            read_only: true,
            kind: "fuse.sshfs".to_owned(),
            source: "/dev/root".to_owned(),
        };
        assert_eq!(parse(line), Some(wanted));
        let untagged = b"1 0 0:2 / / rw - tmpfs tmpfs ro,size=1m";
        assert!(parse(untagged).expect("is a line").read_only);
        let writable = b"1 0 0:2 / / rw,error=ro - tmpfs ro rw,x=ro";
        assert!(!parse(writable).expect("is a line").read_only);
    }

    #[test]
    fn read_has_the_root() {
        let table = read().expect("reads");
        assert!(table.iter().any(|mount| mount.point == Path::new("/")));
    }

    proptest! {
        #[test]
        fn parse_any_line_never_panics(line: Vec<u8>) {
            let _ = parse(&line);
        }
    }
}
