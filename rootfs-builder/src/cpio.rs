//! The archive format of initramfs: "newc", as the kernel's Documentation/driver-api/early-userspace/buffer-format.rst
//! describes it.
//!
//! The same entries give the same bytes in whatever order they were added: sorted by name, owned by root, without times,
//! inodes numbered from 1.

use std::collections::BTreeMap;
use std::io::{self, Write};

const MAGIC: &[u8] = b"070701";
const TRAILER: &str = "TRAILER!!!";

// The file types of inode(7), in the upper bits of a mode.
const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;

/// An archive being put together. Names are relative to the root, without a leading slash.
#[derive(Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, Default)]
struct Entry {
    mode: u32,
    device: (u32, u32),
    content: Vec<u8>,
}

impl Archive {
    /// An archive without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory. `mode` is its permission bits. The kernel makes no parents: add them too.
    pub fn directory(&mut self, name: &str, mode: u32) -> &mut Self {
        self.insert(
            name,
            Entry {
                mode: S_IFDIR | mode,
                ..Entry::default()
            },
        )
    }

    /// Adds a regular file with its permission bits and content.
    pub fn file(&mut self, name: &str, mode: u32, content: Vec<u8>) -> &mut Self {
        self.insert(
            name,
            Entry {
                mode: S_IFREG | mode,
                content,
                ..Entry::default()
            },
        )
    }

    /// Adds a character device with its permission bits and its numbers.
    pub fn character_device(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> &mut Self {
        self.insert(
            name,
            Entry {
                mode: S_IFCHR | mode,
                device: (major, minor),
                ..Entry::default()
            },
        )
    }

    /// Writes the archive, uncompressed.
    ///
    /// # Errors
    /// Those of `output`, and `InvalidInput` for a file of 4 GiB or more, which the format cannot hold.
    pub fn write_to(&self, output: &mut impl Write) -> io::Result<()> {
        // A parent's name sorts before those of its children, as the kernel needs it.
        for (inode, (name, entry)) in (1..).zip(&self.entries) {
            write_entry(output, inode, name, entry)?;
        }
        write_entry(output, 0, TRAILER, &Entry::default())
    }

    fn insert(&mut self, name: &str, entry: Entry) -> &mut Self {
        let replaced = self.entries.insert(name.to_owned(), entry);
        debug_assert!(replaced.is_none(), "{name} added twice");
        self
    }
}

fn write_entry(output: &mut impl Write, inode: u32, name: &str, entry: &Entry) -> io::Result<()> {
    let too_large = |_| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name} is too large for a cpio archive"),
        )
    };
    let size = u32::try_from(entry.content.len()).map_err(too_large)?;
    let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
    let links = if entry.mode & S_IFMT == S_IFDIR { 2 } else { 1 };
    let (major, minor) = entry.device;
    // c_ino c_mode c_uid c_gid c_nlink c_mtime c_filesize c_maj c_min c_rmaj c_rmin c_namesize c_chksum
    let fields = [
        inode, entry.mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0,
    ];

    output.write_all(MAGIC)?;
    for field in fields {
        write!(output, "{field:08x}")?;
    }
    output.write_all(name.as_bytes())?;
    output.write_all(b"\0")?;
    pad(output, MAGIC.len() + 8 * fields.len() + name.len() + 1)?;
    output.write_all(&entry.content)?;
    pad(output, entry.content.len())
}

/// Header with name, and content, each end at a multiple of four bytes.
fn pad(output: &mut impl Write, written: usize) -> io::Result<()> {
    output.write_all(&[0; 3][..written.next_multiple_of(4) - written])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(archive: &Archive) -> Vec<u8> {
        let mut output = Vec::new();
        archive.write_to(&mut output).unwrap();
        output
    }

    #[test]
    fn archive_of_one_file_has_the_bytes_of_the_format() {
        let mut archive = Archive::new();
        archive.file("init", 0o755, b"hello".to_vec());
        #[rustfmt::skip]
        let expected = concat!(
            "070701", "00000001", "000081ed", "00000000", "00000000", "00000001", "00000000", "00000005",
            "00000000", "00000000", "00000000", "00000000", "00000005", "00000000", "init\0\0", "hello\0\0\0",
            "070701", "00000000", "00000000", "00000000", "00000000", "00000001", "00000000", "00000000",
            "00000000", "00000000", "00000000", "00000000", "0000000b", "00000000", "TRAILER!!!\0\0\0\0",
        );
        assert_eq!(String::from_utf8(bytes(&archive)).unwrap(), expected);
    }

    #[test]
    fn archive_order_of_adding_does_not_change_bytes() {
        let mut one = Archive::new();
        one.directory("dev", 0o755)
            .character_device("dev/console", 0o600, 5, 1)
            .file("init", 0o755, vec![1]);
        let mut other = Archive::new();
        other
            .file("init", 0o755, vec![1])
            .character_device("dev/console", 0o600, 5, 1)
            .directory("dev", 0o755);
        assert_eq!(bytes(&one), bytes(&other));
    }

    #[test]
    fn archive_device_carries_type_and_numbers() {
        let mut archive = Archive::new();
        archive.character_device("console", 0o600, 5, 1);
        let text = String::from_utf8(bytes(&archive)).unwrap();
        assert_eq!(&text[14..22], "00002180");
        assert_eq!(&text[78..94], "0000000500000001");
    }

    #[test]
    fn archive_parents_come_before_children() {
        let mut archive = Archive::new();
        archive
            .directory("a/b", 0o755)
            .directory("a", 0o755)
            .directory("a.b", 0o755);
        let text = String::from_utf8(bytes(&archive)).unwrap();
        let at = |name: &str| text.find(&format!("{name}\0")).unwrap();
        assert!(at("a") < at("a/b"));
    }
}
