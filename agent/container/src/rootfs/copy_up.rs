//! `tmpcopyup`: what a tmpfs covers is copied into it first.
//!
//! Both trees are walked by descriptors and through no link: the image's author
//! wrote the names, and the copy is attached nowhere yet.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, futimens, mkdirat, mknodat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown, fchownat, symlinkat};

/// Deeper trees are refused: each level is a call and two descriptors.
const MAX_DEPTH: usize = 64;

const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// Copies what is in the directory `from` to `to`, and gives `to` its owner,
/// mode and times. Sockets and devices stay behind: they lead nowhere from a copy.
pub fn copy_up(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    // Both may be references, which can be opened and no more.
    let open = |place| open(place, c".", DIRECTORY);
    copy_directory(open(from)?.as_fd(), open(to)?.as_fd(), MAX_DEPTH)
}

fn copy_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    let depth = depth.checked_sub(1).ok_or_else(|| {
        io::Error::other(format!("tmpcopyup: more than {MAX_DEPTH} directories deep"))
    })?;
    let mut entries = Dir::openat(from, ".", DIRECTORY, Mode::empty())?;
    for entry in entries.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        let status = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        match SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT {
            SFlag::S_IFDIR => {
                mkdirat(to, name, Mode::S_IRWXU)?;
                let (inner, copy) = (open(from, name, DIRECTORY)?, open(to, name, DIRECTORY)?);
                copy_directory(inner.as_fd(), copy.as_fd(), depth)?;
            }
            SFlag::S_IFREG => copy_file(from, to, name, &status)?,
            SFlag::S_IFLNK => {
                symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?;
                let (uid, gid) = owner(&status);
                fchownat(to, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
            }
            SFlag::S_IFIFO => {
                mknodat(to, name, SFlag::S_IFIFO, mode(&status), 0)?;
                let (uid, gid) = owner(&status);
                fchownat(to, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
            }
            _ => {}
        }
    }
    finish(to, &fstat(from)?)
}

fn copy_file(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &std::ffi::CStr,
    status: &FileStat,
) -> io::Result<()> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let mut source = File::from(open(from, name, flags | OFlag::O_RDONLY)?);
    let new = flags | OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    let mut copy = File::from(openat(to, name, new, Mode::S_IRUSR | Mode::S_IWUSR)?);
    io::copy(&mut source, &mut copy)?;
    finish(copy.as_fd(), status)
}

fn open(directory: BorrowedFd<'_>, name: &std::ffi::CStr, flags: OFlag) -> io::Result<OwnedFd> {
    Ok(openat(directory, name, flags, Mode::empty())?)
}

fn owner(status: &FileStat) -> (Uid, Gid) {
    (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid))
}

fn mode(status: &FileStat) -> Mode {
    Mode::from_bits_truncate(status.st_mode & 0o7777)
}

/// The mode after the owner, whose change takes set-id bits away.
fn finish(copy: BorrowedFd<'_>, status: &FileStat) -> io::Result<()> {
    let (uid, gid) = owner(status);
    fchown(copy, Some(uid), Some(gid))?;
    fchmod(copy, mode(status))?;
    let time = |seconds, nanoseconds| TimeSpec::new(seconds, nanoseconds);
    Ok(futimens(
        copy,
        &time(status.st_atime, status.st_atime_nsec),
        &time(status.st_mtime, status.st_mtime_nsec),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn copy_up_takes_files_links_and_modes_and_follows_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir_all(from.join("deep/er")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(directory.path().join("outside"), "outside").unwrap();
        fs::write(from.join("deep/er/f"), "text").unwrap();
        let modes = [("deep/er/f", 0o640), ("deep", 0o2750), ("", 0o1777)];
        for (path, mode) in modes {
            fs::set_permissions(from.join(path), fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink("../outside", from.join("link")).unwrap();
        let open = |path| File::open(path).unwrap();
        copy_up(open(&from).as_fd(), open(&to).as_fd()).unwrap();
        assert_eq!(fs::read_to_string(to.join("deep/er/f")).unwrap(), "text");
        for (path, mode) in modes {
            let status = fs::metadata(to.join(path)).unwrap();
            assert_eq!(status.mode() & 0o7777, mode, "{path}");
        }
        let link = fs::read_link(to.join("link")).unwrap();
        assert_eq!(link.to_str(), Some("../outside"));
        let mtime = |path: &std::path::Path| fs::metadata(path.join("deep/er/f")).unwrap().mtime();
        assert_eq!(mtime(&from), mtime(&to));
    }
}
