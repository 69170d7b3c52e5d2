//! Copying files into a node and out of it, as tar streams.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;

use crate::command::NodeCommand;
use crate::node::{Node, NodeError};
use crate::session::{Process, SessionError};

/// What can go wrong in copying.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The node cannot be used.
    #[error("copy between the machine and the node")]
    Node(#[from] NodeError),
    /// The session broke.
    #[error("copy between the machine and the node")]
    Session(#[from] SessionError),
    /// A file on this side cannot be read or written.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A path that has no last component, or is relative in the node.
    #[error("{path} does not name a file in the node: give an absolute path")]
    BadPath {
        /// The path.
        path: PathBuf,
    },
    /// tar in the node failed.
    #[error("tar in the node: {0}")]
    Tar(String),
}

fn failed<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> TransferError + 'a {
    move |source| TransferError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

impl Node {
    /// Copies the file, directory or symbolic link `from` to the absolute path `to` in the node, whose parent directory is made
    /// when it is not there. Modes are kept; all belongs to root. What is there already is replaced; a directory is added to.
    ///
    /// # Errors
    /// Any [`TransferError`].
    pub fn push(&self, from: &Path, to: &Path) -> Result<(), TransferError> {
        let (parent, name) = split(to)?;
        let command = NodeCommand::script(
            "mkdir -p \"$0\"; exec tar --extract --file=- --directory=\"$0\" --preserve-permissions --no-same-owner --numeric-owner",
        )
        .arg(parent);
        let mut process = self.spawn(&command)?;
        let stdin = process.stdin.take();
        let sent = stdin.map_or(Ok(()), |stdin| send(from, name, stdin));
        // tar's own words, if it has any, are the better explanation of a broken pipe.
        finish(process).and(sent)
    }

    /// Copies the file, directory or symbolic link `from`, an absolute path in the node, to `to` here, which must not exist.
    /// Modes are kept; all belongs to this user.
    ///
    /// # Errors
    /// Any [`TransferError`].
    pub fn pull(&self, from: &Path, to: &Path) -> Result<(), TransferError> {
        let (parent, name) = split(from)?;
        let command = NodeCommand::new("tar")
            .args(["--create", "--file=-", "--numeric-owner", "--directory"])
            .args([parent, Path::new("--"), name]);
        let mut process = self.spawn(&command)?;
        drop(process.stdin.take());
        // Beside the target, so that the last step is a rename.
        let beside = to
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let scratch = beside.join(format!(
            ".bulkhead-node-pull-{}-{:?}",
            std::process::id(),
            thread::current().id()
        ));
        fs::create_dir(&scratch).map_err(failed("create", &scratch))?;
        let received = process
            .stdout
            .take()
            .map_or(Ok(()), |stdout| receive(stdout, &scratch));
        let result = finish(process).and(received).and_then(|()| {
            if fs::symlink_metadata(to).is_ok() {
                return Err(failed("create", to)(io::ErrorKind::AlreadyExists.into()));
            }
            fs::rename(scratch.join(name), to).map_err(failed("create", to))
        });
        let _ = fs::remove_dir_all(&scratch);
        result
    }
}

fn split(path: &Path) -> Result<(&Path, &Path), TransferError> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if path.is_absolute() => Ok((parent, Path::new(name))),
        _ => Err(TransferError::BadPath {
            path: path.to_owned(),
        }),
    }
}

fn send(from: &Path, name: &Path, to: impl io::Write) -> Result<(), TransferError> {
    let error = failed("read", from);
    let mut archive = tar::Builder::new(to);
    archive.follow_symlinks(false);
    let appended = match fs::symlink_metadata(from) {
        Ok(metadata) if metadata.is_dir() => archive.append_dir_all(name, from),
        Ok(metadata) if metadata.is_file() => {
            File::open(from).and_then(|mut file| archive.append_file(name, &mut file))
        }
        Ok(_) => archive.append_path_with_name(from, name),
        Err(error) => Err(error),
    };
    appended.and_then(|()| archive.finish()).map_err(error)
}

fn receive(from: impl Read, to: &Path) -> Result<(), TransferError> {
    let mut archive = tar::Archive::new(from);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(false);
    archive.unpack(to).map_err(failed("unpack into", to))
}

fn finish(mut process: Process) -> Result<(), TransferError> {
    let mut words = String::new();
    if let Some(mut stderr) = process.stderr.take() {
        stderr
            .read_to_string(&mut words)
            .map_err(failed("read the errors of", Path::new("tar")))?;
    }
    let status = process.wait()?;
    if status.success() {
        Ok(())
    } else {
        Err(TransferError::Tar(format!(
            "{status}: {}",
            words.trim_end()
        )))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn split_relative_or_nameless_path_is_refused() {
        for path in ["a/b", "/", "/a/.."] {
            assert!(split(Path::new(path)).is_err(), "{path}");
        }
        assert_eq!(
            split(Path::new("/a/b")).unwrap(),
            (Path::new("/a"), Path::new("b"))
        );
    }

    #[test]
    fn send_and_receive_keep_modes_links_and_bytes() {
        let from = tempfile::tempdir().unwrap();
        let to = tempfile::tempdir().unwrap();
        fs::write(from.path().join("run"), [0, 255, 10]).unwrap();
        fs::set_permissions(from.path().join("run"), PermissionsExt::from_mode(0o751)).unwrap();
        symlink("run", from.path().join("link")).unwrap();
        let mut bytes = Vec::new();
        send(from.path(), Path::new("tree"), &mut bytes).unwrap();
        receive(bytes.as_slice(), to.path()).unwrap();
        let tree = to.path().join("tree");
        assert_eq!(fs::read(tree.join("run")).unwrap(), [0, 255, 10]);
        assert_eq!(
            fs::metadata(tree.join("run")).unwrap().permissions().mode() & 0o7777,
            0o751
        );
        assert_eq!(fs::read_link(tree.join("link")).unwrap(), Path::new("run"));
    }
}
