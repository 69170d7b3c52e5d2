//! A prefix with everything that a host needs, as docs/architecture.md lays it out.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::product;

/// What is installed.
#[derive(Debug)]
pub struct Artefacts {
    /// The directory of the product's binaries.
    pub product: PathBuf,
    /// The virtiofsd binary.
    pub virtiofsd: PathBuf,
    /// The guest kernel.
    pub vmlinux: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
}

/// Copies `artefacts` into the directory `prefix`. Each file appears by a rename, so that a running one is replaced whole.
///
/// # Errors
/// When a file cannot be copied.
pub fn install(artefacts: &Artefacts, prefix: &Path) -> Result<()> {
    let binary = |name: &str| artefacts.product.join(name);
    let files = [
        (
            binary(product::SHIM),
            "bin/containerd-shim-bulkhead-v2",
            0o755,
        ),
        (binary(product::CLI), "bin/bulkhead", 0o755),
        (binary(product::VMM), "libexec/bulkhead/bulkhead-vmm", 0o755),
        (
            artefacts.virtiofsd.clone(),
            "libexec/bulkhead/virtiofsd",
            0o755,
        ),
        (artefacts.vmlinux.clone(), "share/bulkhead/vmlinux", 0o644),
        (
            artefacts.initramfs.clone(),
            "share/bulkhead/initramfs.cpio",
            0o644,
        ),
    ];
    for (from, name, mode) in files {
        replace(&from, &prefix.join(name), mode)
            .with_context(|| format!("install {}", prefix.join(name).display()))?;
    }
    Ok(())
}

fn replace(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let dir = to.parent().context("no parent directory")?;
    fs::create_dir_all(dir)?;
    let temporary = tempfile::NamedTempFile::new_in(dir)?;
    fs::copy(from, temporary.path()).with_context(|| format!("copy {}", from.display()))?;
    fs::set_permissions(temporary.path(), Permissions::from_mode(mode))?;
    temporary.persist(to)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::initramfs;

    #[test]
    fn install_over_an_older_one_replaces_every_file_with_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        let names =
            product::BINARIES
                .iter()
                .copied()
                .chain(["virtiofsd", "vmlinux", initramfs::FILE]);
        for name in names {
            fs::write(source.join(name), name).unwrap();
        }
        let artefacts = Artefacts {
            product: source.clone(),
            virtiofsd: source.join("virtiofsd"),
            vmlinux: source.join("vmlinux"),
            initramfs: source.join(initramfs::FILE),
        };
        let prefix = dir.path().join("prefix");
        fs::create_dir_all(prefix.join("bin")).unwrap();
        fs::write(prefix.join("bin/bulkhead"), "older").unwrap();

        install(&artefacts, &prefix).unwrap();
        let mode = |name: &str| {
            fs::metadata(prefix.join(name))
                .unwrap()
                .permissions()
                .mode()
                & 0o7777
        };
        assert_eq!(
            fs::read_to_string(prefix.join("bin/bulkhead")).unwrap(),
            "bulkhead"
        );
        assert_eq!(
            fs::read_to_string(prefix.join("libexec/bulkhead/bulkhead-vmm")).unwrap(),
            "bulkhead-vmm"
        );
        assert_eq!(mode("bin/containerd-shim-bulkhead-v2"), 0o755);
        assert_eq!(mode("share/bulkhead/vmlinux"), 0o644);
        assert_eq!(fs::read_dir(prefix.join("bin")).unwrap().count(), 2);
    }
}
