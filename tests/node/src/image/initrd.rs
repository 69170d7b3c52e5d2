//! The kernel's initial RAM disk: busybox, our init, and the modules that the root disk needs.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use rootfs_builder::cache::{Cache, Key};

use super::{ImageError, failed, package_dir};

/// An initial RAM disk: what it is for decides what it holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose<'a> {
    /// Boots a node.
    Node,
    /// Tells, with this agent, whether a guest runs in a VM.
    Probe(&'a Path),
}

impl Purpose<'_> {
    fn init(self) -> PathBuf {
        package_dir().join("guest/initrd").join(match self {
            Purpose::Node => "init",
            Purpose::Probe(_) => "probe",
        })
    }

    fn modules(self) -> &'static [&'static str] {
        match self {
            // What stands between the kernel and its root; ext4 and PCI are built in.
            Purpose::Node => &["virtio_blk"],
            Purpose::Probe(_) => &["kvm-amd", "kvm-intel"],
        }
    }

    fn agent(self) -> Option<PathBuf> {
        match self {
            Purpose::Node => None,
            Purpose::Probe(agent) => Some(agent.to_owned()),
        }
    }
}

/// The kernel package's files.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    /// The bootable image.
    pub(super) image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// Finds the one kernel in `root`.
    pub(super) fn find(root: &Path) -> Result<Self, ImageError> {
        let all = root.join("usr/lib/modules");
        let mut versions = fs::read_dir(&all).map_err(failed("list", &all))?.flatten();
        let version = versions.next().ok_or_else(|| ImageError::Missing {
            what: "kernel modules".to_owned(),
        })?;
        let name = version.file_name().to_string_lossy().into_owned();
        Ok(Self {
            image: root.join(format!("boot/vmlinuz-{name}")),
            modules: version.path(),
        })
    }
}

/// The initrd, built when the store does not have it.
pub(super) fn or_build(
    cache: &Cache,
    root: &Path,
    kernel: &Kernel,
    purpose: Purpose<'_>,
) -> Result<PathBuf, ImageError> {
    let mut key = Key::new();
    key.text("recipe", "3")
        .text("kernel", &kernel.modules.to_string_lossy())
        .texts("module", purpose.modules())
        .texts(
            "agent",
            purpose
                .agent()
                .map(|path| path.to_string_lossy().into_owned()),
        )
        .file("init", &purpose.init())?;
    let entry = cache
        .entry("node-initrd", &key)
        .describe("an initial RAM disk for the node", Duration::from_secs(2));
    let path = entry.or_build(|dir| {
        let path = dir.join("initrd.gz");
        let bytes = archive(root, kernel, purpose)?;
        fs::write(&path, bytes).map_err(failed("write", &path))
    })?;
    Ok(path.join("initrd.gz"))
}

fn archive(root: &Path, kernel: &Kernel, purpose: Purpose<'_>) -> Result<Vec<u8>, ImageError> {
    let read = |path: &Path| fs::read(path).map_err(failed("read", path));
    let mut cpio = Cpio::default();
    for directory in ["bin", "dev", "proc", "sys", "root", "modules"] {
        cpio.add(directory, 0o040_755, &[]);
    }
    cpio.add("init", 0o100_755, &read(&purpose.init())?);
    cpio.add(
        "bin/busybox",
        0o100_755,
        &read(&root.join("usr/bin/busybox"))?,
    );
    if let Some(agent) = purpose.agent() {
        cpio.add("bin/node-agent", 0o100_755, &read(&agent)?);
    }
    let mut order = String::new();
    for path in load_order(kernel, purpose.modules())? {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let name = file.trim_end_matches(".xz");
        cpio.add(&format!("modules/{name}"), 0o100_644, &decompressed(&path)?);
        order.push_str(name);
        order.push('\n');
    }
    cpio.add("modules/order", 0o100_644, order.as_bytes());

    let gzip = |archive: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(archive)?;
        encoder.finish()
    };
    gzip(&cpio.finish()).map_err(failed("compress", Path::new("the initial RAM disk")))
}

/// The files of `names` and of all that they need, each after what it needs.
fn load_order(kernel: &Kernel, names: &[&str]) -> Result<Vec<PathBuf>, ImageError> {
    let path = kernel.modules.join("modules.dep");
    let table = fs::read_to_string(&path).map_err(failed("read", &path))?;
    // depmod lists what a module needs in full, nearest first.
    let needs: BTreeMap<&str, &str> = table
        .lines()
        .filter_map(|line| line.split_once(':'))
        .collect();
    let mut order = Vec::new();
    for name in names {
        let stem = format!("/{name}.ko");
        let (file, needed) = needs
            .iter()
            .find(|(file, _)| file.trim_end_matches(".xz").ends_with(&stem))
            .ok_or_else(|| ImageError::Missing {
                what: format!("module {name}"),
            })?;
        for file in needed.split_whitespace().rev().chain([*file]) {
            let path = kernel.modules.join(file);
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    Ok(order)
}

/// Debian compresses modules with xz, which busybox's insmod does not read.
fn decompressed(path: &Path) -> Result<Vec<u8>, ImageError> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).map_err(failed("read", path));
    }
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(path)
        .stderr(Stdio::inherit())
        .output()
        .map_err(failed("run xz on", path))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(failed("decompress", path)(std::io::Error::other(
            output.status.to_string(),
        )))
    }
}

/// A cpio archive in the "newc" format, which the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        // Inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, checksum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_entries_are_aligned_and_counted() {
        let mut cpio = Cpio::default();
        cpio.add("dir", 0o040_755, &[]);
        cpio.add("dir/file", 0o100_644, b"hello");
        let bytes = cpio.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("07070100000001000041ed"));
        assert!(text.contains("dir/file\0"));
        assert!(text.contains("hello"));
        assert!(text.contains("TRAILER!!!"));
    }

    #[test]
    fn load_order_needed_modules_come_first() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("modules.dep"),
            "k/net.ko.xz: k/failover.ko.xz k/core.ko.xz\nk/failover.ko.xz: k/core.ko.xz\nk/core.ko.xz:\n",
        )
        .unwrap();
        let kernel = Kernel {
            image: PathBuf::new(),
            modules: dir.path().to_owned(),
        };
        let order = load_order(&kernel, &["net", "failover"]).unwrap();
        let names: Vec<_> = order.iter().map(|path| path.file_name().unwrap()).collect();
        assert_eq!(names, ["core.ko.xz", "failover.ko.xz", "net.ko.xz"]);
        assert!(load_order(&kernel, &["absent"]).is_err());
    }
}
