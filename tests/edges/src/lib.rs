//! Which crate of the workspace may import which, as docs/architecture.md says, and a test that holds the workspace to it.
//!
//! Normal, build and development dependencies count alike: a boundary that only tests cross is crossed.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

/// Each crate with the crates of the workspace that it may import. A crate that is not here may not be in the workspace.
pub const ALLOWED: &[(&str, &[&str])] = &[
    ("agent-container", &[]),
    ("agent-protocol", &[]),
    ("bulkhead", &["agent-protocol", "vmm-config"]),
    ("bulkhead-agent", &["agent-container", "agent-protocol"]),
    ("bulkhead-vmm", &["vmm-config", "vmm-devices", "vmm-virtio"]),
    (
        "containerd-shim-bulkhead-v2",
        &["agent-protocol", "vmm-config"],
    ),
    ("rootfs-builder", &[]),
    ("vmm-config", &[]),
    ("vmm-devices", &["vmm-virtio"]),
    ("vmm-virtio", &[]),
];

/// Crates from outside that one of ours must do without: devices are tested and fuzzed on machines without KVM.
pub const REFUSED: &[(&str, &[&str])] = &[
    ("vmm-config", &["kvm-bindings", "kvm-ioctls"]),
    ("vmm-devices", &["kvm-bindings", "kvm-ioctls"]),
    ("vmm-virtio", &["kvm-bindings", "kvm-ioctls"]),
];

/// The part of `cargo metadata --no-deps` that this check reads: the packages of the workspace.
#[derive(Debug, Deserialize)]
pub struct Workspace {
    /// The folder that holds the workspace's manifest.
    pub workspace_root: PathBuf,
    /// The workspace's own packages.
    pub packages: Vec<Package>,
}

/// One package of the workspace.
#[derive(Debug, Deserialize)]
pub struct Package {
    /// Its name in the manifest.
    pub name: String,
    /// The absolute path of its manifest.
    pub manifest_path: PathBuf,
    /// What it imports, of every kind and for every target.
    pub dependencies: Vec<Dependency>,
}

/// One dependency of a package.
#[derive(Debug, Deserialize)]
pub struct Dependency {
    /// The imported package's own name, also where the importer renames it.
    pub name: String,
    /// The folder that it is in; `None` for a package of a registry.
    pub path: Option<PathBuf>,
}

/// Says in one line for each edge that is not allowed what is wrong with it; empty when all is well.
pub fn violations(workspace: &Workspace) -> Vec<String> {
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    let refused: BTreeMap<_, _> = REFUSED.iter().copied().collect();
    let tests = workspace.workspace_root.join("tests");
    let is_test = |package: &Package| package.manifest_path.starts_with(&tests);

    let mut found = Vec::new();
    for importer in workspace
        .packages
        .iter()
        .filter(|package| !is_test(package))
    {
        let Some(may_import) = allowed.get(importer.name.as_str()) else {
            found.push(format!(
                "{}: no place in docs/architecture.md; give it one there and in ALLOWED",
                importer.name
            ));
            continue;
        };
        for dependency in &importer.dependencies {
            let name = dependency.name.as_str();
            if dependency.path.is_some() && !may_import.contains(&name) {
                found.push(format!(
                    "{} imports {name}, which docs/architecture.md does not allow",
                    importer.name
                ));
            }
            if refused
                .get(importer.name.as_str())
                .is_some_and(|names| names.contains(&name))
            {
                found.push(format!(
                    "{} imports {name}, but has to work without it",
                    importer.name
                ));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// A package at `folder` of a workspace at /w, importing crates by path (those with a slash) or from a registry.
    fn package(name: &str, folder: &str, imports: &[&str]) -> Package {
        let dependencies = imports
            .iter()
            .map(|import| match import.rsplit_once('/') {
                Some((_, last)) => Dependency {
                    name: last.to_owned(),
                    path: Some(PathBuf::from("/w").join(import)),
                },
                None => Dependency {
                    name: (*import).to_owned(),
                    path: None,
                },
            })
            .collect();
        Package {
            name: name.to_owned(),
            manifest_path: PathBuf::from("/w").join(folder).join("Cargo.toml"),
            dependencies,
        }
    }

    fn violations_of(packages: Vec<Package>) -> Vec<String> {
        violations(&Workspace {
            workspace_root: PathBuf::from("/w"),
            packages,
        })
    }

    #[test]
    fn workspace_as_it_is_has_no_violation() {
        let output = Command::new(env!("CARGO"))
            .args([
                "metadata",
                "--no-deps",
                "--offline",
                "--format-version",
                "1",
            ])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        assert!(
            output.status.success(),
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let workspace: Workspace = serde_json::from_slice(&output.stdout)
            .expect("cargo metadata prints what it documents");

        assert!(
            workspace
                .packages
                .iter()
                .any(|package| package.name == "bulkhead-vmm"),
            "the workspace is the real one"
        );
        let found = violations(&workspace);
        assert!(
            found.is_empty(),
            "dependencies that the design does not allow:\n{}",
            found.join("\n")
        );
    }

    #[test]
    fn table_when_read_names_only_crates_that_it_places() {
        for (importer, imports) in ALLOWED {
            for import in *imports {
                assert!(
                    ALLOWED.iter().any(|(name, _)| name == import),
                    "{importer} may import {import}, which has no place"
                );
            }
        }
    }

    #[test]
    fn violations_when_edge_is_allowed_is_empty() {
        let found = violations_of(vec![
            package("vmm-devices", "vmm/devices", &["x/vmm-virtio", "vm-memory"]),
            package("bulkhead-vmm", "vmm", &["x/vmm-devices", "kvm-ioctls"]),
        ]);
        assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn violations_when_shim_imports_vmm_names_the_edge() {
        let found = violations_of(vec![package(
            "containerd-shim-bulkhead-v2",
            "shim",
            &["x/bulkhead-vmm"],
        )]);
        assert_eq!(
            found,
            [
                "containerd-shim-bulkhead-v2 imports bulkhead-vmm, which docs/architecture.md does not allow"
            ]
        );
    }

    #[test]
    fn violations_when_product_imports_a_test_crate_names_the_edge() {
        let found = violations_of(vec![package(
            "bulkhead-agent",
            "agent",
            &["x/bulkhead-node"],
        )]);
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn violations_when_devices_import_kvm_names_the_crate() {
        let found = violations_of(vec![package("vmm-devices", "vmm/devices", &["kvm-ioctls"])]);
        assert_eq!(
            found,
            ["vmm-devices imports kvm-ioctls, but has to work without it"]
        );
    }

    #[test]
    fn violations_when_crate_is_unknown_asks_for_its_place() {
        let found = violations_of(vec![package("bulkhead-common", "common", &[])]);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("bulkhead-common: no place"));
    }

    #[test]
    fn violations_when_tests_import_anything_is_empty() {
        let found = violations_of(vec![package(
            "bulkhead-e2e",
            "tests/e2e",
            &["x/bulkhead-vmm", "x/bulkhead-node", "x/rootfs-builder"],
        )]);
        assert_eq!(found, Vec::<String>::new());
    }
}
