//! What a node is made of, each part a cache entry of its own: a change of one tool or script rebuilds little.

mod agent;
mod disk;
mod images;
mod initrd;
mod root;
mod runc;
mod tools;

pub(crate) use disk::make_ext4;

use std::io;
use std::path::{Path, PathBuf};

use rootfs_builder::build_root::BuildRoot;
use rootfs_builder::cache::{Cache, CacheError, Key, KeyError};
use rootfs_builder::command::CommandError;
use rootfs_builder::debian_root::DebianRootError;

use crate::qemu::{Mode, Qemu};
use initrd::Purpose;

/// What can go wrong in building the node.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The Debian root cannot be made.
    #[error("make the node's Debian root")]
    Root(#[from] DebianRootError),
    /// An input cannot be read.
    #[error("hash the node's inputs")]
    Key(#[from] KeyError),
    /// A part cannot be built or stored.
    #[error("build a part of the node")]
    Cache(#[from] CacheError),
    /// The images that the node's registry serves cannot be made.
    #[error("make the images of the node's registry")]
    Registry(#[source] anyhow::Error),
    /// A program failed.
    #[error("build a part of the node")]
    Command(#[from] CommandError),
    /// A file operation failed.
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
    /// The Debian root does not hold what it must.
    #[error("the node's Debian root has no {what}: clear the cache and build it again")]
    Missing {
        /// What is not there.
        what: String,
    },
}

fn failed<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> ImageError + 'a {
    move |source| ImageError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// What runs a kernel at all: enough to find out which mode this machine is capable of.
#[derive(Clone, Debug)]
pub struct Base {
    /// The Debian root directory, for the programs in it.
    pub root: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    modules: initrd::Kernel,
    /// The directory that holds the agent's binary.
    agent: PathBuf,
}

impl Base {
    /// Finds it in the store, and builds what is not there.
    ///
    /// # Errors
    /// Any [`ImageError`].
    pub fn or_build(cache: &Cache) -> Result<Self, ImageError> {
        let root = root::or_build(cache)?;
        let modules = initrd::Kernel::find(&root)?;
        Ok(Self {
            kernel: modules.image.clone(),
            modules,
            agent: agent::or_build(cache)?,
            root,
        })
    }

    /// The QEMU in the root.
    pub fn qemu(&self) -> Qemu {
        Qemu::new(&self.root)
    }

    /// The initial RAM disk that tells whether a guest runs in a VM.
    ///
    /// # Errors
    /// Any [`ImageError`].
    pub fn probe_initrd(&self, cache: &Cache) -> Result<PathBuf, ImageError> {
        initrd::or_build(
            cache,
            &self.root,
            &self.modules,
            Purpose::Probe(&self.agent.join(agent::NAME)),
        )
    }
}

/// Everything that a node boots from.
#[derive(Clone, Debug)]
pub struct Image {
    /// Root directory and kernel.
    pub base: Base,
    /// The root disk: raw, ext4, never written to.
    pub root_disk: PathBuf,
    /// The tools' disk: raw, ext4, read-only.
    pub tools_disk: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
}

impl Image {
    /// Finds every part in the store, and builds what is not there.
    ///
    /// # Errors
    /// Any [`ImageError`].
    pub fn or_build(cache: &Cache, base: Base, mode: Mode) -> Result<Self, ImageError> {
        Ok(Self {
            root_disk: disk::root_disk(cache, &base.root)?,
            initrd: initrd::or_build(cache, &base.root, &base.modules, Purpose::Node)?,
            tools_disk: disk::tools_disk(cache, &parts(cache, &base)?, mode)?,
            base,
        })
    }

    /// Adds all of it to `key`: store paths tell their content.
    pub fn add_to(&self, key: &mut Key) {
        let parts = [
            &self.base.root,
            &self.root_disk,
            &self.tools_disk,
            &self.base.kernel,
            &self.initrd,
        ];
        key.texts(
            "part",
            parts.map(|path| path.to_string_lossy().into_owned()),
        );
    }
}

/// What goes to the tools' disk, beside the scripts and configuration.
fn parts(cache: &Cache, base: &Base) -> Result<Vec<disk::Part>, ImageError> {
    let build_root = BuildRoot::open(cache)?;
    let mut parts = vec![
        disk::Part {
            from: base.agent.clone(),
            to: "bin",
        },
        disk::Part {
            from: runc::or_build(cache, &build_root)?,
            to: "bin",
        },
        disk::Part {
            from: images::or_build(cache, &build_root)?,
            to: "images",
        },
        disk::Part {
            from: images::registry_or_build(cache, &build_root)?,
            to: "registry",
        },
    ];
    for tool in &tools::TOOLS {
        parts.push(disk::Part {
            from: tools::or_build(cache, tool)?,
            to: tool.destination,
        });
    }
    Ok(parts)
}

/// The folder of this package in the checkout: the node is built from its sources, by whoever has them.
fn package_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
