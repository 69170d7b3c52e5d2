//! The installed files and `/dev/kvm`, opened with errors that say what to do.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use thiserror::Error;

/// Why something that the VM needs cannot be opened.
#[derive(Debug, Error)]
pub enum Error {
    /// The shim's own path cannot be read.
    #[error("read the path of the shim's own executable")]
    OwnPath(#[source] io::Error),
    /// The shim does not lie in a `bin` directory.
    #[error(
        "shim executable {path} is not in PREFIX/bin, so its installation cannot be found: install it as PREFIX/bin/containerd-shim-bulkhead-v2"
    )]
    NoPrefix {
        /// The shim's own path.
        path: PathBuf,
    },
    /// A file of the installation is not there.
    #[error("{what} {path} is not there: install Bulkhead completely, with {path}")]
    Missing {
        /// As in "guest kernel".
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
    },
    /// A file of the installation cannot be opened.
    #[error("open {what} {path}")]
    Open {
        /// As in "guest kernel".
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// `/dev/kvm` cannot be used.
    #[error("{path}: {advice}")]
    Kvm {
        /// `/dev/kvm`.
        path: PathBuf,
        /// What it means and what to check.
        advice: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// One installation: the files below a prefix.
#[derive(Clone, Debug)]
pub struct Installation {
    prefix: PathBuf,
}

impl Installation {
    /// The installation that the running shim belongs to.
    pub fn locate() -> Result<Self, Error> {
        let path = std::env::current_exe().map_err(Error::OwnPath)?;
        match path.parent() {
            Some(directory) if directory.ends_with("bin") => {
                Ok(Self::at(directory.parent().unwrap_or(Path::new("/"))))
            }
            _ => Err(Error::NoPrefix { path }),
        }
    }

    /// The installation below `prefix`.
    pub fn at(prefix: &Path) -> Self {
        Self {
            prefix: prefix.to_owned(),
        }
    }

    /// Opens everything that a VM needs. Everything, so that Create fails
    /// before anything is made.
    pub fn open(&self) -> Result<Opened, Error> {
        Ok(Opened {
            vmm: self.open_file("monitor", "libexec/bulkhead/bulkhead-vmm")?,
            virtiofsd: self.open_file("file server", "libexec/bulkhead/virtiofsd")?,
            kernel: self.open_file("guest kernel", "share/bulkhead/vmlinux")?,
            initramfs: self.open_file("guest initramfs", "share/bulkhead/initramfs.cpio")?,
        })
    }

    fn open_file(&self, what: &'static str, name: &str) -> Result<OwnedFd, Error> {
        let path = self.prefix.join(name);
        match open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => Ok(file),
            Err(Errno::NOENT | Errno::NOTDIR) => Err(Error::Missing { what, path }),
            Err(source) => Err(Error::Open {
                what,
                path,
                source: source.into(),
            }),
        }
    }
}

/// The files of an installation, open.
#[derive(Debug)]
pub struct Opened {
    /// `libexec/bulkhead/bulkhead-vmm`, for execution.
    pub vmm: OwnedFd,
    /// `libexec/bulkhead/virtiofsd`, for execution.
    pub virtiofsd: OwnedFd,
    /// `share/bulkhead/vmlinux`, for reading.
    pub kernel: OwnedFd,
    /// `share/bulkhead/initramfs.cpio`, for reading.
    pub initramfs: OwnedFd,
}

/// Opens `/dev/kvm` for reading and writing.
pub fn open_kvm() -> Result<OwnedFd, Error> {
    open_kvm_at(Path::new("/dev/kvm"))
}

fn open_kvm_at(path: &Path) -> Result<OwnedFd, Error> {
    open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| Error::Kvm {
        path: path.to_owned(),
        advice: kvm_advice(errno),
        source: errno.into(),
    })
}

fn kvm_advice(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT => {
            "the host has no KVM device: enable virtualisation (VT-x, AMD-V) in its firmware, or nested virtualisation in a cloud machine, then load kvm_intel or kvm_amd"
        }
        Errno::ACCESS | Errno::PERM => {
            "the shim may not open it: let root read and write it, and check the device rules of the service that containerd runs in"
        }
        Errno::NODEV | Errno::NXIO => {
            "the device node has no driver: load kvm_intel or kvm_amd, and see dmesg for why it did not load"
        }
        Errno::BUSY => {
            "another hypervisor (VirtualBox, VMware) holds the processor's virtualisation: stop it"
        }
        _ => "it cannot be opened",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn open_without_a_kernel_names_its_path() {
        let prefix = tempfile::tempdir().expect("directory");
        fs::create_dir_all(prefix.path().join("libexec/bulkhead")).expect("makes");
        for name in ["bulkhead-vmm", "virtiofsd"] {
            fs::write(prefix.path().join("libexec/bulkhead").join(name), "").expect("writes");
        }
        let error = Installation::at(prefix.path())
            .open()
            .expect_err("no kernel");
        let kernel = prefix.path().join("share/bulkhead/vmlinux");
        assert!(
            error.to_string().contains(&*kernel.to_string_lossy()),
            "{error}"
        );
        assert!(error.to_string().contains("guest kernel"), "{error}");
    }

    #[test]
    fn open_kvm_that_is_not_there_says_what_to_enable() {
        let error = open_kvm_at(Path::new("/nonexistent/kvm")).expect_err("is not there");
        assert!(error.to_string().contains("firmware"), "{error}");
    }

    #[test]
    fn kvm_advice_differs_by_cause() {
        let causes = [
            Errno::NOENT,
            Errno::ACCESS,
            Errno::NODEV,
            Errno::BUSY,
            Errno::IO,
        ];
        let advice: std::collections::BTreeSet<_> = causes.map(kvm_advice).into();
        assert_eq!(advice.len(), causes.len());
    }
}
