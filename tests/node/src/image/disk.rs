//! The disk images: the Debian root, and beside it everything of ours, so that a changed script does not rebuild the root.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rootfs_builder::cache::{Cache, Key};
use rootfs_builder::command::{CommandError, run_logged};

use super::{ImageError, failed, package_dir};
use crate::qemu::{Mode, ROOT_DISK_BYTES};

/// The containerd of Debian 13, which the root has, under the same paths as the others.
const DEBIAN_CONTAINERD: [&str; 3] = ["containerd", "containerd-shim-runc-v2", "ctr"];

/// Tests must never wait for a disk check or a journal: the images live as long as a node.
const MKFS: [&str; 8] = [
    "-q",
    "-F",
    "-m",
    "0",
    "-O",
    "^has_journal,^metadata_csum",
    "-E",
    "lazy_itable_init=1,nodiscard,root_owner=0:0",
];

/// The root disk, made when the store does not have it.
pub(super) fn root_disk(cache: &Cache, root: &Path) -> Result<PathBuf, ImageError> {
    let mut key = Key::new();
    key.text("root", &root.to_string_lossy())
        .texts("mkfs", MKFS)
        .text("bytes", &ROOT_DISK_BYTES.to_string());
    let entry = cache
        .entry("node-root-disk", &key)
        .describe("the node's root disk", Duration::from_secs(20));
    let log = entry.log();
    let dir =
        entry.or_build(|dir| make_ext4(&dir.join("root.img"), ROOT_DISK_BYTES, root, &log))?;
    Ok(dir.join("root.img"))
}

/// Built things and where they appear in the node.
#[derive(Debug)]
pub(super) struct Part {
    /// A directory of files, an entry of the store.
    pub(super) from: PathBuf,
    /// A directory below `/opt/node`.
    pub(super) to: &'static str,
}

/// The disk that the node sees at `/opt/node`, made when the store does not have it.
pub(super) fn tools_disk(cache: &Cache, parts: &[Part], mode: Mode) -> Result<PathBuf, ImageError> {
    const BYTES: u64 = 2 << 30;
    let guest = package_dir().join("guest");
    let mut key = Key::new();
    key.text("recipe", "2")
        .text("factor", &mode.time_factor().to_string())
        .texts("mkfs", MKFS)
        .texts("link", DEBIAN_CONTAINERD);
    for part in parts {
        key.text(part.to, &part.from.to_string_lossy());
    }
    for folder in FOLDERS {
        key.tree(folder, &guest.join(folder))?;
    }
    let entry = cache
        .entry("node-tools-disk", &key)
        .describe("the node's disk of tools", Duration::from_secs(20));
    let log = entry.log();
    let dir = entry.or_build(|dir| {
        let tree = dir.join("tree");
        for part in parts {
            copy_tree(&part.from, &tree.join(part.to))?;
        }
        for folder in FOLDERS {
            copy_tree(&guest.join(folder), &tree.join(folder))?;
        }
        link_debian_programs(&tree)?;
        scale_timeouts(&tree.join("etc/containerd"), mode.time_factor())?;
        make_ext4(&dir.join("tools.img"), BYTES, &tree, &log)?;
        fs::remove_dir_all(&tree).map_err(failed("remove", &tree))
    })?;
    Ok(dir.join("tools.img"))
}

/// The folders of `guest/` that the node sees.
const FOLDERS: [&str; 2] = ["etc", "sbin"];

/// Makes the file `image`, an ext4 file system of `bytes` bytes, sparse, with the content of `tree`.
pub(crate) fn make_ext4(
    image: &Path,
    bytes: u64,
    tree: &Path,
    log: &Path,
) -> Result<(), ImageError> {
    File::create_new(image)
        .and_then(|file| file.set_len(bytes))
        .map_err(failed("create", image))?;
    let mut mkfs = Command::new("mkfs.ext4");
    // Debian keeps it in sbin, which is not on everybody's PATH.
    let path = std::env::var("PATH").unwrap_or_default();
    mkfs.args(MKFS)
        .arg("-d")
        .arg(tree)
        .arg(image)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"));
    Ok::<_, CommandError>(run_logged(&mut mkfs, log)?).map_err(ImageError::from)
}

fn link_debian_programs(tree: &Path) -> Result<(), ImageError> {
    let debian = tree.join("containerd-1.7/bin");
    fs::create_dir_all(&debian).map_err(failed("create", &debian))?;
    let links = DEBIAN_CONTAINERD
        .iter()
        .map(|name| (debian.join(name), format!("/usr/bin/{name}")))
        .chain([(tree.join("bin/busybox"), "/usr/bin/busybox".to_owned())]);
    for (link, target) in links {
        symlink(target, &link).map_err(failed("link", &link))?;
    }
    Ok(())
}

/// containerd gives a shim 5 s, which an emulated one may need for its start alone. `@Ns@` in the configuration is N
/// seconds times the factor.
fn scale_timeouts(directory: &Path, factor: u32) -> Result<(), ImageError> {
    for entry in fs::read_dir(directory)
        .map_err(failed("list", directory))?
        .flatten()
    {
        let path = entry.path();
        if path.is_dir() {
            continue;
        }
        let text = fs::read_to_string(&path).map_err(failed("read", &path))?;
        fs::write(&path, scaled(&text, factor)).map_err(failed("write", &path))?;
    }
    Ok(())
}

fn scaled(text: &str, factor: u32) -> String {
    let mut parts = text.split('@');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part
            .strip_suffix('s')
            .and_then(|seconds| seconds.parse::<u32>().ok())
        {
            Some(seconds) => {
                out.push_str(&(seconds * factor).to_string());
                out.push('s');
            }
            None => out.push_str(part),
        }
    }
    out
}

/// Copies directories and files with their modes.
fn copy_tree(from: &Path, to: &Path) -> Result<(), ImageError> {
    fs::create_dir_all(to).map_err(failed("create", to))?;
    for entry in fs::read_dir(from).map_err(failed("list", from))?.flatten() {
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            copy_tree(&source, &target)?;
        } else {
            fs::copy(&source, &target).map_err(failed("copy", &source))?;
            let executable = fs::metadata(&source)
                .is_ok_and(|metadata| metadata.permissions().mode() & 0o100 != 0);
            // The checkout's umask is not the node's.
            let mode = if executable { 0o755 } else { 0o644 };
            fs::set_permissions(&target, PermissionsExt::from_mode(mode))
                .map_err(failed("set the mode of", &target))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaled_marks_are_multiplied_and_the_rest_stays() {
        assert_eq!(
            scaled("a = \"@5s@\"\nb = \"@3s@\"\n", 8),
            "a = \"40s\"\nb = \"24s\"\n"
        );
        assert_eq!(scaled("nothing", 8), "nothing");
    }
}
