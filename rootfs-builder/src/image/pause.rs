//! `registry.k8s.io/pause`: our own program, static, alone in its image.

use anyhow::{Context, Result};
use serde_json::json;

use super::layer::Layer;
use super::layout::{self, Packed};
use super::programs::PAUSE;
use crate::build_root::BuildRoot;

/// The defaults of containerd 1.7, 2.0, 2.1 to 2.3 and 2.4.
const NAMES: [&str; 4] = [
    "registry.k8s.io/pause:3.8",
    "registry.k8s.io/pause:3.10",
    "registry.k8s.io/pause:3.10.1",
    "registry.k8s.io/pause:3.10.2",
];

pub(super) fn archive(root: &BuildRoot) -> Result<Vec<u8>> {
    packed(root, None)
        .and_then(|image| Ok(layout::archive(&image, &NAMES)?))
        .context("write the image pause")
}

/// The image, with `version` as a label if one is given, which makes it another image.
pub(super) fn packed(root: &BuildRoot, version: Option<&str>) -> Result<Packed> {
    let mut layer = Layer::new();
    layer.file(PAUSE.name, 0o755, PAUSE.compile(root)?);
    // No privilege is needed to wait.
    let mut config = json!({ "User": "65535:65535", "Entrypoint": ["/pause"], "WorkingDir": "/" });
    if let Some(version) = version {
        config["Labels"] = json!({ "org.opencontainers.image.version": version });
    }
    Ok(Packed::new(&[&layer], &config)?)
}
