//! Images as the storage of a registry, so that a node can pull them without anybody having pushed them: the layout of
//! the Go distribution registry's file system driver (distribution, registry/storage/paths.go, version 2).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::layout::Packed;

/// Adds an image under `name`, a reference with host and tag, to the storage in `directory`. The host is left out: a
/// mirror is asked without it.
///
/// # Errors
/// When a file cannot be written, or `name` has no host or no tag.
pub(super) fn add(directory: &Path, image: &Packed, name: &str) -> Result<()> {
    let root = directory.join("docker/registry/v2");
    let (repository, tag) = name
        .split_once('/')
        .and_then(|(_, path)| path.rsplit_once(':'))
        .with_context(|| format!("{name} is not HOST/REPOSITORY:TAG"))?;
    let repository = root.join("repositories").join(repository);
    for (digest, content) in &image.blobs {
        let data = root.join(format!("blobs/sha256/{}/{digest}/data", &digest[..2]));
        write(&data, content)?;
        link(&repository.join("_layers"), &format!("sha256:{digest}"))?;
    }
    let manifest = image.manifest["digest"].as_str().unwrap_or_default();
    let manifests = repository.join("_manifests");
    let tag = manifests.join("tags").join(tag);
    link(&manifests.join("revisions"), manifest)?;
    link(&tag.join("index"), manifest)?;
    write(&tag.join("current/link"), manifest.as_bytes())
}

/// A file that says that `digest` belongs to what `directory` is about.
fn link(directory: &Path, digest: &str) -> Result<()> {
    let file = directory.join(digest.replace(':', "/")).join("link");
    write(&file, digest.as_bytes())
}

fn write(file: &Path, content: &[u8]) -> Result<()> {
    file.parent()
        .map_or(Ok(()), fs::create_dir_all)
        .and_then(|()| fs::write(file, content))
        .with_context(|| format!("write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::layer::Layer;
    use super::*;

    #[test]
    fn add_tag_leads_to_the_manifest_and_that_to_its_blobs() {
        let mut layer = Layer::new();
        layer.file("hello", 0o644, "hello");
        let image = Packed::new(&[&layer], &json!({})).unwrap();
        let storage = tempfile::tempdir().unwrap();
        add(storage.path(), &image, "registry.example/some/hello:1").unwrap();

        let root = storage.path().join("docker/registry/v2");
        let tag = root.join("repositories/some/hello/_manifests/tags/1/current/link");
        let digest = fs::read_to_string(tag).unwrap();
        assert_eq!(image.manifest["digest"], digest);
        let hex = digest.strip_prefix("sha256:").unwrap();
        let blob =
            |hex: &str| fs::read(root.join(format!("blobs/sha256/{}/{hex}/data", &hex[..2])));
        let manifest: serde_json::Value = serde_json::from_slice(&blob(hex).unwrap()).unwrap();
        let layer = manifest["layers"][0]["digest"].as_str().unwrap();
        assert!(blob(layer.strip_prefix("sha256:").unwrap()).is_ok());
    }

    #[test]
    fn add_name_without_a_tag_is_refused() {
        let image = Packed::new(&[], &json!({})).unwrap();
        let storage = tempfile::tempdir().unwrap();
        let error = add(storage.path(), &image, "registry.example/hello").unwrap_err();
        assert!(error.to_string().contains("HOST/REPOSITORY:TAG"), "{error}");
    }
}
