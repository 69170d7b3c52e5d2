//! OCI images made from Debian's packages, without a registry, as archives that `ctr images import` takes.

mod busybox;
mod conformance;
mod layer;
mod layout;
mod packaged;
mod pause;
mod programs;
mod registry;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use crate::build_root::BuildRoot;
use crate::cache::{Cache, Key};

/// The storage of a registry with the images that critest pulls, made when the store does not have it: a directory for the
/// Go distribution registry's file system driver.
///
/// # Errors
/// When the packages cannot be had, a tool in a root fails, or the storage cannot be written.
pub fn conformance_registry(cache: &Cache, build: &BuildRoot) -> Result<PathBuf> {
    let packages = BuildRoot::of(
        cache,
        "the Debian 13 root of the conformance images",
        conformance::PACKAGES,
    )?;
    let mut key = Key::new();
    key.text("build", &build.path().to_string_lossy())
        .text("packages", &packages.path().to_string_lossy())
        .tree(
            "sources",
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("src/image"),
        )?;
    let entry = cache
        .entry("conformance-registry", &key)
        .describe("the conformance images", Duration::from_secs(20));
    Ok(entry.or_build(|directory| conformance::write(directory, build, &packages))?)
}

/// The images that examples and tests use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Image {
    /// A shell and small tools: `docker.io/library/busybox:latest`.
    Busybox,
    /// The process that holds a CRI pod's namespaces, under the names that containerd 1.7 to 2.4 ask for by default.
    Pause,
}

impl Image {
    /// Every image.
    pub const ALL: [Self; 2] = [Self::Busybox, Self::Pause];

    /// Its short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Busybox => "busybox",
            Self::Pause => "pause",
        }
    }

    /// The path of its archive, stored when it is not there yet.
    ///
    /// # Errors
    /// When a tool in the build root fails or the archive cannot be stored.
    pub fn or_build(self, cache: &Cache, root: &BuildRoot) -> Result<PathBuf> {
        let archive = self.archive(root)?;
        let mut key = Key::new();
        key.bytes("archive", &archive);
        let file = format!("{}.tar", self.name());
        let what = format!("the image {}", self.name());
        let entry = cache.entry("image", &key).describe(what, Duration::ZERO);
        Ok(entry
            .or_build(|dir| fs::write(dir.join(&file), archive))?
            .join(&file))
    }

    /// Its archive: the same bytes for the same packages.
    ///
    /// # Errors
    /// When a tool in the build root fails.
    pub fn archive(self, root: &BuildRoot) -> Result<Vec<u8>> {
        match self {
            Self::Busybox => busybox::archive(root),
            Self::Pause => pause::archive(root),
        }
    }
}
