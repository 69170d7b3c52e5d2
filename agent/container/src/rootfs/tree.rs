//! Paths inside the container's root file system.
//!
//! The image's author wrote every name and symbolic link there. Each lookup is
//! one openat2 with `RESOLVE_IN_ROOT`: the kernel itself keeps it inside, and
//! what it returns is a descriptor, so nothing is looked up twice.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::{Mode, mkdirat};

/// As many as the kernel follows in one lookup (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;
/// openat2 answers EAGAIN when something was renamed meanwhile.
const MAX_ATTEMPTS: usize = 64;

/// The root directory, as a mount of its own.
#[derive(Debug)]
pub struct Tree(OwnedFd);

impl Tree {
    pub fn new(root: OwnedFd) -> Self {
        Self(root)
    }

    fn open_with(&self, path: &Path, flags: OFlag, mode: Mode) -> Result<OwnedFd, Errno> {
        // An absolute path would be taken from the root as well; an empty one is an error.
        let path = path.strip_prefix("/").unwrap_or(path);
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .mode(mode)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        for _ in 0..MAX_ATTEMPTS {
            match openat2(&self.0, path, how) {
                Err(Errno::EAGAIN) => {}
                result => return result,
            }
        }
        Err(Errno::EAGAIN)
    }

    /// A reference to whatever `path` names, links followed inside the root.
    pub fn find(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.open_with(path, OFlag::O_PATH, Mode::empty())
    }

    /// Opens what is expected to be a device for reading and writing.
    pub fn open_device(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.open_with(path, OFlag::O_RDWR | OFlag::O_NOCTTY, Mode::empty())
    }

    /// Finds a directory, making what is missing on the way; a dangling link is
    /// followed and its target made.
    pub fn make_directory(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.make_directory_at(path, &mut 0)?;
        self.open_with(path, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty())
    }

    fn make_directory_at(&self, path: &Path, links: &mut usize) -> Result<(), Errno> {
        let directory = OFlag::O_PATH | OFlag::O_DIRECTORY;
        let mut made = PathBuf::new();
        for component in path.components() {
            let name: &OsStr = match component {
                Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
                Component::ParentDir => OsStr::new(".."),
                Component::Normal(name) => name,
            };
            let next = made.join(name);
            match self.open_with(&next, directory, Mode::empty()) {
                Ok(_) => {}
                Err(Errno::ENOENT) => {
                    let parent = self.open_with(&made, directory, Mode::empty())?;
                    match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
                        Ok(()) => {}
                        Err(Errno::EEXIST) => {
                            *links += 1;
                            if *links > MAX_LINKS {
                                return Err(Errno::ELOOP);
                            }
                            let target = readlinkat(&parent, name)?;
                            // An absolute target replaces what was made so far.
                            self.make_directory_at(&made.join(target), links)?;
                        }
                        Err(errno) => return Err(errno),
                    }
                }
                Err(errno) => return Err(errno),
            }
            made = next;
        }
        Ok(())
    }

    /// Finds a file, making it (empty) and its directories if they are missing.
    pub fn make_file(&self, path: &Path) -> Result<OwnedFd, Errno> {
        match self.find(path) {
            Err(Errno::ENOENT) => {}
            result => return result,
        }
        if let Some(parent) = path.parent() {
            self.make_directory(parent)?;
        }
        // O_NONBLOCK: should a FIFO appear meanwhile, this must not wait for its reader.
        self.open_with(
            path,
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NONBLOCK | OFlag::O_NOCTTY,
            Mode::from_bits_truncate(0o644),
        )?;
        self.find(path)
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens a path of the agent's own below one of its directories, through no
/// symbolic link at all.
///
/// Directories are opened as such: only that lets the kernel mount what the
/// file server announces as a mount point of the host.
pub fn open_below(directories: &[&Path], path: &Path) -> io::Result<OwnedFd> {
    match open_below_as(directories, path, OFlag::O_PATH | OFlag::O_DIRECTORY) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTDIR) => {
            open_below_as(directories, path, OFlag::O_PATH)
        }
        result => result,
    }
}

/// As [`open_below`], with the caller's flags.
pub fn open_below_as(directories: &[&Path], path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let Some((directory, relative)) = directories
        .iter()
        .find_map(|directory| Some((directory, path.strip_prefix(directory).ok()?)))
    else {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "not below the directories of the pod",
        ));
    };
    let base = nix::fcntl::open(
        *directory,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    if relative.as_os_str().is_empty() {
        return Ok(base);
    }
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(&base, relative, how)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, symlink};

    fn tree() -> (tempfile::TempDir, Tree) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        let root = nix::fcntl::open(
            &directory.path().join("root"),
            OFlag::O_PATH | OFlag::O_DIRECTORY,
            Mode::empty(),
        )
        .unwrap();
        (directory, Tree::new(root))
    }

    #[test]
    fn make_directory_through_dangling_links_stays_inside() {
        let (directory, tree) = tree();
        let root = directory.path().join("root");
        symlink("/run", root.join("absolute")).unwrap();
        symlink("../../../escaped", root.join("relative")).unwrap();
        tree.make_directory(Path::new("/absolute/secrets/a"))
            .unwrap();
        tree.make_directory(Path::new("/relative/b")).unwrap();
        assert!(root.join("run/secrets/a").is_dir());
        assert!(root.join("escaped/b").is_dir());
        assert!(!directory.path().join("escaped").exists());
    }

    #[test]
    fn make_directory_loop_of_links_ends() {
        let (directory, tree) = tree();
        let root = directory.path().join("root");
        symlink("b", root.join("a")).unwrap();
        symlink("a", root.join("b")).unwrap();
        assert_eq!(
            tree.make_directory(Path::new("/a/c")).unwrap_err(),
            Errno::ELOOP
        );
        // Grows with each step instead of turning in a circle.
        symlink("c/c", root.join("c")).unwrap();
        assert!(tree.make_directory(Path::new("/c/d")).is_err());
    }

    #[test]
    fn make_file_through_links_stays_inside() {
        let (directory, tree) = tree();
        let root = directory.path().join("root");
        fs::write(directory.path().join("outside"), "untouched").unwrap();
        symlink("../../outside", root.join("link")).unwrap();
        tree.make_file(Path::new("/link")).unwrap();
        assert!(root.join("outside").is_file());
        assert_eq!(
            fs::read_to_string(directory.path().join("outside")).unwrap(),
            "untouched"
        );
    }

    #[test]
    fn make_file_existing_fifo_does_not_block() {
        let (directory, tree) = tree();
        let fifo = directory.path().join("root/fifo");
        nix::unistd::mkfifo(&fifo, Mode::from_bits_truncate(0o600)).unwrap();
        tree.make_file(Path::new("/fifo")).unwrap();
        assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
    }

    #[test]
    fn open_below_link_or_foreign_path_is_refused() {
        let (directory, _tree) = tree();
        let share = directory.path().join("root");
        fs::write(share.join("file"), "").unwrap();
        symlink("/etc", share.join("etc")).unwrap();
        let open = |path: &str| open_below(&[&share], Path::new(path));
        assert!(open(share.join("file").to_str().unwrap()).is_ok());
        for path in ["/etc/passwd", "etc", "../root/file"] {
            assert!(open(path).is_err(), "{path}");
            assert!(open(share.join(path).to_str().unwrap()).is_err(), "{path}");
        }
    }
}
