//! The one layer of an image: a tar archive whose bytes depend on nothing but its entries.

use std::collections::BTreeMap;
use std::io;

use tar::{Builder, EntryType, Header};

/// A layer being put together. Names are relative to the root, without a leading slash.
#[derive(Debug, Default)]
pub(super) struct Layer {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
enum Entry {
    Directory { mode: u32 },
    File { mode: u32, content: Vec<u8> },
    HardLink { target: String },
    Symlink { target: String },
}

impl Layer {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Adds a directory, or sets the mode of one that is there.
    pub(super) fn directory(&mut self, name: &str, mode: u32) {
        self.parents(name);
        self.entries
            .insert(name.to_owned(), Entry::Directory { mode });
    }

    pub(super) fn file(&mut self, name: &str, mode: u32, content: impl Into<Vec<u8>>) {
        self.parents(name);
        self.entries.insert(
            name.to_owned(),
            Entry::File {
                mode,
                content: content.into(),
            },
        );
    }

    /// Adds another name for the file `target`.
    pub(super) fn hard_link(&mut self, name: &str, target: &str) {
        self.parents(name);
        self.entries.insert(
            name.to_owned(),
            Entry::HardLink {
                target: target.to_owned(),
            },
        );
    }

    pub(super) fn symlink(&mut self, name: &str, target: &str) {
        self.parents(name);
        self.entries.insert(
            name.to_owned(),
            Entry::Symlink {
                target: target.to_owned(),
            },
        );
    }

    /// The archive: everything owned by root, times 0, links after what they point to.
    pub(super) fn to_tar(&self) -> io::Result<Vec<u8>> {
        let mut tar = Builder::new(Vec::new());
        let is_hard_link = |entry: &Entry| matches!(entry, Entry::HardLink { .. });
        // A hard link's target must exist when the link is unpacked.
        for links in [false, true] {
            for (name, entry) in self
                .entries
                .iter()
                .filter(|(_, entry)| is_hard_link(entry) == links)
            {
                append(&mut tar, name, entry)?;
            }
        }
        tar.into_inner()
    }

    fn parents(&mut self, name: &str) {
        if let Some((parent, _)) = name.rsplit_once('/')
            && !self.entries.contains_key(parent)
        {
            self.directory(parent, 0o755);
        }
    }
}

fn append(tar: &mut Builder<Vec<u8>>, name: &str, entry: &Entry) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header.set_mode(0o777);
    match entry {
        Entry::Directory { mode } => {
            header.set_entry_type(EntryType::Directory);
            header.set_mode(*mode);
            tar.append_data(&mut header, format!("{name}/"), io::empty())
        }
        Entry::File { mode, content } => {
            header.set_entry_type(EntryType::Regular);
            header.set_mode(*mode);
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, name, content.as_slice())
        }
        Entry::HardLink { target } => {
            header.set_entry_type(EntryType::Link);
            tar.append_link(&mut header, name, target)
        }
        Entry::Symlink { target } => {
            header.set_entry_type(EntryType::Symlink);
            tar.append_link(&mut header, name, target)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn to_tar_links_follow_their_target_and_parents_are_made() {
        let mut layer = Layer::new();
        layer.hard_link("bin/a", "bin/z");
        layer.file("bin/z", 0o755, "program");
        layer.symlink("usr/bin/env", "../../bin/a");
        layer.directory("tmp", 0o1777);

        let bytes = layer.to_tar().unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let entries: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header();
                assert_eq!(
                    (
                        header.mtime().unwrap(),
                        header.uid().unwrap(),
                        header.gid().unwrap()
                    ),
                    (0, 0, 0)
                );
                let link = entry
                    .link_name()
                    .unwrap()
                    .map(|link| link.to_str().unwrap().to_owned());
                (
                    entry.path().unwrap().to_str().unwrap().to_owned(),
                    header.mode().unwrap(),
                    link,
                )
            })
            .collect();
        let expected = [
            ("bin/", 0o755, None),
            ("bin/z", 0o755, None),
            ("tmp/", 0o1777, None),
            ("usr/", 0o755, None),
            ("usr/bin/", 0o755, None),
            ("usr/bin/env", 0o777, Some("../../bin/a")),
            ("bin/a", 0o777, Some("bin/z")),
        ];
        assert_eq!(
            entries,
            expected.map(|(name, mode, link)| (name.to_owned(), mode, link.map(str::to_owned)))
        );
    }
}
