//! The configuration that every case starts from, and where a case's files are.

use std::path::PathBuf;

use serde_json::{Value, json};

/// Where the files of one container are in the node.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its root file system, a directory.
    pub rootfs: PathBuf,
    /// A directory with a file `content`, and a mount `below` with another.
    pub volume: PathBuf,
    /// The checker's binary, for hooks.
    pub checker: PathBuf,
    /// Its cgroup, absolute below the root of the hierarchy.
    pub cgroup: PathBuf,
    /// The pod that it is of, if it does not get one of its own.
    pub pod: Option<String>,
}

/// Where the checker is in its container.
pub const CHECKER: &str = "/spec-checker";
/// Where the checker finds its configuration.
pub const CONFIG: &str = "/config.json";
/// What the files `content` of the volume hold.
pub const CONTENT: &str = "content of the volume\n";

/// What `ctr` asks for by default, with the checker as the program and with the
/// container's own cgroup shown.
pub fn spec(place: &Place) -> Value {
    let mut spec: Value =
        serde_json::from_str(include_str!("base.json")).expect("base.json is JSON");
    spec["root"]["path"] = json!(place.rootfs);
    spec["linux"]["cgroupsPath"] = json!(place.cgroup);
    if let Some(pod) = &place.pod {
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": pod,
        });
    }
    spec
}

/// The sandbox container of a pod, which the containers of the cases are put in.
pub fn sandbox(place: &Place, id: &str) -> Value {
    let mut spec = spec(place);
    spec["process"]["args"] = json!([CHECKER, "hold"]);
    spec["annotations"] = json!({
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": id,
    });
    spec
}
