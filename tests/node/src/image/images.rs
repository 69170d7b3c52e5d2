//! The OCI images that every containerd in the node starts with, and those that it can pull.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use rootfs_builder::build_root::BuildRoot;
use rootfs_builder::cache::{Cache, Key};
use rootfs_builder::image::{self, Image};

use super::{ImageError, package_dir};

/// What makes the images, beside the packages in the build root.
const SOURCES: &str = "../../rootfs-builder/src/image";

/// The directory of the archives, built when the store does not have it.
pub(super) fn or_build(cache: &Cache, root: &BuildRoot) -> Result<PathBuf, ImageError> {
    let mut key = Key::new();
    key.text("root", &root.path().to_string_lossy())
        .tree("sources", &package_dir().join(SOURCES))?;
    let entry = cache
        .entry("node-images", &key)
        .describe("the node's OCI images", Duration::from_secs(20));
    Ok(entry.or_build(|dir| {
        for image in Image::ALL {
            let archive = image.archive(root)?;
            let path = dir.join(format!("{}.tar", image.name()));
            fs::write(&path, archive).with_context(|| format!("write {}", path.display()))?;
        }
        anyhow::Ok(())
    })?)
}

/// The storage of the node's registry: the images that critest pulls.
pub(super) fn registry_or_build(cache: &Cache, root: &BuildRoot) -> Result<PathBuf, ImageError> {
    image::conformance_registry(cache, root).map_err(ImageError::Registry)
}
