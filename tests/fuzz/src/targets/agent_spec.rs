//! The OCI configuration that the agent gets from the shim, whole, as `process`
//! of an exec, and as `linux.resources` of an update.

use std::path::{Component, Path};

use agent_container::{parse, parse_process, parse_resources, validate};
use arbitrary::Unstructured;
use serde_json::Value;

use crate::json;

/// What clients ask for by default, as the shim passes it on.
const SPECS: [&str; 5] = [
    include_str!("../../../../agent/container/tests/testdata/ctr.json"),
    include_str!("../../../../agent/container/tests/testdata/nerdctl.json"),
    include_str!("../../../../agent/container/tests/testdata/cri-sandbox.json"),
    include_str!("../../../../agent/container/tests/testdata/cri-container.json"),
    include_str!("../../../../agent/container/tests/testdata/cri-privileged.json"),
];

/// Tries one input: JSON as it is, or one of the specifications, changed.
pub fn run(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else {
        return;
    };
    let mut json = data.to_vec();
    if choice & 0x80 != 0 {
        let document = SPECS[usize::from(choice >> 2) % SPECS.len()];
        let mut document: Value = serde_json::from_str(document).expect("JSON");
        let part = match choice & 3 {
            1 => document["process"].take(),
            2 => document["linux"]["resources"].take(),
            _ => document,
        };
        let Ok(changed) = json::change(part, &mut Unstructured::new(data)) else {
            return;
        };
        json = changed.to_string().into_bytes();
    }
    let refusal = match choice & 3 {
        1 => parse_process(&json).err().map(|error| error.to_string()),
        2 => parse_resources(&json).err().map(|error| error.to_string()),
        _ => match parse(&json) {
            Ok(spec) => {
                let refusal = validate(&spec).err();
                if refusal.is_none() {
                    check(&spec);
                }
                refusal.map(|refusal| refusal.to_string())
            }
            Err(error) => Some(error.to_string()),
        },
    };
    if let Some(refusal) = refusal {
        assert!(!refusal.is_empty(), "a refusal tells what it is about");
    }
}

/// What must hold of a specification that is not refused.
fn check(spec: &oci_spec::runtime::Spec) {
    let root = spec.root().as_ref().expect("a root");
    assert!(root.path().is_absolute());
    for mount in spec.mounts().iter().flatten() {
        assert!(mount.destination().is_absolute());
    }
    let linux = spec.linux().as_ref();
    if let Some(path) = linux.and_then(|linux| linux.cgroups_path().as_ref()) {
        let normal = |part: Component<'_>| matches!(part, Component::Normal(_));
        assert!(path.components().all(normal), "{}", path.display());
    }
    for path in linux
        .into_iter()
        .flat_map(oci_spec::runtime::Linux::masked_paths)
        .flatten()
    {
        assert!(Path::new(path).is_absolute());
    }
    let process = spec.process().as_ref().expect("a process");
    assert!(process.cwd().is_absolute());
    let arguments = process.args().iter().flatten();
    assert!(arguments.count() > 0, "a program");
}
