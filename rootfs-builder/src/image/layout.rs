//! An image as its blobs, and the archive around it: an OCI image layout (image-spec 1.1, image-layout.md) with one manifest.

use std::collections::BTreeMap;
use std::io;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::layer::Layer;
use crate::cache::hex;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// The archive of one image. Each of `names` is a full reference that the image gets when it is imported.
pub(super) fn archive(image: &Packed, names: &[&str]) -> io::Result<Vec<u8>> {
    let mut archive = Layer::new();
    for (digest, content) in &image.blobs {
        archive.file(&format!("blobs/sha256/{digest}"), 0o644, content.clone());
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": names.iter().map(|name| named(&image.manifest, name)).collect::<Vec<_>>(),
    });
    archive.file("index.json", 0o644, index.to_string());
    archive.file(
        "oci-layout",
        0o644,
        json!({ "imageLayoutVersion": "1.0.0" }).to_string(),
    );
    archive.to_tar()
}

/// An image as content: its blobs, and what leads to them.
#[derive(Debug)]
pub(super) struct Packed {
    /// Layers, configuration and manifest by their SHA-256 in hex.
    pub(super) blobs: BTreeMap<String, Vec<u8>>,
    /// The descriptor of the manifest.
    pub(super) manifest: Value,
}

impl Packed {
    /// An image of `layers`, the lowest first. `config` is the image configuration's `config` object.
    ///
    /// The layers are not compressed, since a compressor's next version would change the bytes.
    pub(super) fn new(layers: &[&Layer], config: &Value) -> io::Result<Self> {
        let mut blobs = BTreeMap::new();
        let mut add = |content: Vec<u8>, media_type: &str| {
            let digest = hex(&Sha256::digest(&content));
            let descriptor = json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len() });
            blobs.insert(digest, content);
            descriptor
        };
        let layers = layers
            .iter()
            .map(|layer| Ok(add(layer.to_tar()?, LAYER)))
            .collect::<io::Result<Vec<_>>>()?;
        let diff_ids: Vec<_> = layers.iter().map(|layer| &layer["digest"]).collect();
        let configuration = json!({
            "created": "1970-01-01T00:00:00Z",
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let configuration = add(configuration.to_string().into_bytes(), CONFIG);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": configuration,
            "layers": layers,
        });
        let manifest = add(manifest.to_string().into_bytes(), MANIFEST);
        Ok(Self { blobs, manifest })
    }
}

/// containerd takes the whole name from its own annotation, other tools the tag from the specification's.
fn named(manifest: &Value, name: &str) -> Value {
    let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    let mut descriptor = manifest.clone();
    descriptor["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    descriptor["annotations"] =
        json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag });
    descriptor
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn unpack(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(archive).entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            files.insert(entry.path().unwrap().to_str().unwrap().to_owned(), content);
        }
        files
    }

    #[test]
    fn archive_every_descriptor_leads_to_a_blob_of_its_digest_and_size() {
        let mut layer = Layer::new();
        layer.file("hello", 0o644, "hello");
        let image = Packed::new(&[&layer], &json!({ "Cmd": ["/hello"] })).unwrap();
        let bytes = archive(&image, &["example.org/hello:1", "example.org/hello:2"]);
        let files = unpack(&bytes.unwrap());
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"]
                .as_str()
                .unwrap()
                .strip_prefix("sha256:")
                .unwrap();
            let content = &files[&format!("blobs/sha256/{digest}")];
            assert_eq!(hex(&Sha256::digest(content)), digest);
            assert_eq!(descriptor["size"], content.len());
            content.clone()
        };
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let manifests = index["manifests"].as_array().unwrap();
        let names: Vec<_> = manifests
            .iter()
            .map(|one| {
                one["annotations"]["io.containerd.image.name"]
                    .as_str()
                    .unwrap()
            })
            .collect();
        assert_eq!(names, ["example.org/hello:1", "example.org/hello:2"]);
        assert_eq!(
            manifests[1]["annotations"]["org.opencontainers.image.ref.name"],
            "2"
        );

        let manifest: Value = serde_json::from_slice(&blob(&manifests[0])).unwrap();
        let configuration: Value = serde_json::from_slice(&blob(&manifest["config"])).unwrap();
        let content = unpack(&blob(&manifest["layers"][0]));
        assert_eq!(content["hello"], b"hello");
        assert_eq!(
            configuration["rootfs"]["diff_ids"][0],
            manifest["layers"][0]["digest"]
        );
        assert_eq!(configuration["config"]["Cmd"][0], "/hello");
        assert_eq!(files["oci-layout"], br#"{"imageLayoutVersion":"1.0.0"}"#);
    }
}
