//! The digest of everything that an artefact is made from.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// An input that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("read build input {path}")]
pub struct KeyError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A SHA-256 over labelled inputs, in the order in which they are added.
///
/// Label and length go in before each value, so that no two lists of inputs run together to the same bytes.
#[derive(Clone, Debug, Default)]
pub struct Key {
    digest: Sha256,
}

impl Key {
    /// A key of no inputs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a string: a version, an argument, a recipe.
    pub fn text(&mut self, label: &str, value: &str) -> &mut Self {
        self.bytes(label, value.as_bytes())
    }

    /// Adds a list of strings, keeping their order.
    pub fn texts<S: AsRef<str>>(
        &mut self,
        label: &str,
        values: impl IntoIterator<Item = S>,
    ) -> &mut Self {
        for value in values {
            self.text(label, value.as_ref());
        }
        self
    }

    /// Adds bytes that are at hand.
    pub fn bytes(&mut self, label: &str, bytes: &[u8]) -> &mut Self {
        self.frame(label.as_bytes());
        self.frame(bytes);
        self
    }

    /// Adds a file's bytes. Its name and mode do not count.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn file(&mut self, label: &str, path: &Path) -> Result<&mut Self, KeyError> {
        self.frame(label.as_bytes());
        let digest = file_digest(path).map_err(|source| KeyError {
            path: path.to_owned(),
            source,
        })?;
        self.frame(&digest);
        Ok(self)
    }

    /// Adds a directory: the relative names, types and permission bits of all that is below it, the bytes of files and
    /// the targets of symbolic links. Owners and times do not count. Symbolic links are not followed.
    ///
    /// # Errors
    /// When anything below cannot be read, or is neither file, directory nor symbolic link.
    pub fn tree(&mut self, label: &str, path: &Path) -> Result<&mut Self, KeyError> {
        self.frame(label.as_bytes());
        self.tree_below(path, Path::new(""))?;
        Ok(self)
    }

    /// The digest so far, in lower-case hexadecimal.
    pub fn hex(&self) -> String {
        hex(&self.digest.clone().finalize())
    }

    fn tree_below(&mut self, path: &Path, name: &Path) -> Result<(), KeyError> {
        let failed = |source| KeyError {
            path: path.to_owned(),
            source,
        };
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        self.frame(name.as_os_str().as_bytes());
        self.frame(&metadata.mode().to_be_bytes());
        if metadata.is_dir() {
            let mut names = fs::read_dir(path)
                .and_then(|entries| {
                    entries
                        .map(|entry| Ok(entry?.file_name()))
                        .collect::<io::Result<Vec<_>>>()
                })
                .map_err(failed)?;
            names.sort();
            for child in names {
                self.tree_below(&path.join(&child), &name.join(&child))?;
            }
        } else if metadata.is_file() {
            self.frame(&file_digest(path).map_err(failed)?);
        } else if metadata.is_symlink() {
            self.frame(fs::read_link(path).map_err(failed)?.as_os_str().as_bytes());
        } else {
            return Err(failed(io::Error::from(io::ErrorKind::Unsupported)));
        }
        Ok(())
    }

    fn frame(&mut self, bytes: &[u8]) {
        self.digest.update((bytes.len() as u64).to_be_bytes());
        self.digest.update(bytes);
    }
}

/// The SHA-256 of a file's bytes.
pub(crate) fn file_digest(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(digest.finalize().into()),
            read => digest.update(&buffer[..read]),
        }
    }
}

/// Lower-case hexadecimal, as OCI digests and entry names have it.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}
