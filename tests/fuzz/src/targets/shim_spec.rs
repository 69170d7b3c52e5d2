//! A client's `config.json`: the shim splits it into the host's part and the
//! guest's. What comes out for the guest must name nothing of the host's, and
//! whoever reads it after the shim must read the same in it.

use std::convert::Infallible;
use std::path::{Path, PathBuf};

use agent_container::{parse, validate};
use agent_protocol::{PID_NAMESPACES_DIR, POD_DIR, SHARE_DIR};
use arbitrary::Unstructured;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use shim::host::cgroup::CgroupPath;
use shim::host::mounts::Access;
use shim::host::volumes::{Placed, Wanted};
use shim::spec::{GuestSpec, Membership, Peers, Volumes};

use crate::json::change;

const CONTAINER: &str = "c";
const SANDBOX_PID: u32 = 4242;
const PEER: &str = "d";
const PEER_PID: u32 = 4243;

/// Gives each source a number of its own.
#[derive(Default)]
struct Numbered(Vec<(PathBuf, Access)>);

impl Volumes for Numbered {
    type Error = Infallible;

    fn add(&mut self, source: &Path, wanted: &Wanted) -> Result<Placed, Infallible> {
        assert!(source.is_absolute(), "a source relative to the shim");
        self.0.push((source.to_owned(), wanted.access));
        Ok(Placed {
            path: PathBuf::from(format!("volumes/{}", self.0.len() - 1)),
            read_only: false,
            below: Vec::new(),
        })
    }
}

/// What clients give, roughly.
fn document(choice: u8) -> Value {
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "hostname": "h",
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev/shm", "type": "bind", "options": ["rbind", "ro"],
             "source": "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/box/shm"},
            {"destination": "/a", "type": "bind", "source": "/host/a", "options": ["rbind", "ro"]},
            {"destination": "/b", "source": "/host/b", "options": ["bind", "rro", "rprivate"]},
        ],
        "hooks": {"createRuntime": [{"path": "/hook", "args": ["hook", "up"], "timeout": 5}],
                  "poststop": [{"path": "/hook"}]},
        "annotations": {},
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network", "path": "/run/netns/x"},
            ],
            "cgroupsPath": "/default/c",
            "resources": {"memory": {"limit": 1_000_000}, "devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore"],
        },
    });
    if choice & 1 != 0 {
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": if choice & 2 == 0 { "container" } else { "sandbox" },
            "io.kubernetes.cri.sandbox-id": "box",
        });
        spec["linux"]["namespaces"][1]["path"] = json!(format!("/proc/{SANDBOX_PID}/ns/ipc"));
        if choice & 8 != 0 {
            let pid = if choice & 16 == 0 {
                SANDBOX_PID
            } else {
                PEER_PID
            };
            spec["linux"]["namespaces"][0]["path"] = json!(format!("/proc/{pid}/ns/pid"));
        }
    }
    spec
}

/// Tries one input: JSON as it is, or a configuration, changed.
pub fn run(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else {
        return;
    };
    let spec = if choice & 0x80 == 0 {
        serde_json::from_slice(data).ok()
    } else {
        change(document(choice), &mut Unstructured::new(data)).ok()
    };
    let Some(spec) = spec else {
        return;
    };
    let peers = Peers {
        sandbox: (choice & 4 != 0).then_some(SANDBOX_PID),
        containers: [(PEER_PID, PEER.to_owned())].into(),
        id_maps: None,
    };
    let (host, guest) = match GuestSpec::split(spec, CONTAINER, &peers) {
        Ok(parts) => parts,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let is_sandbox = host.membership == Membership::Sandbox;
    let _ = CgroupPath::for_pod(host.cgroups_path.as_deref(), is_sandbox, "n", CONTAINER);
    let mut volumes = Numbered::default();
    let Ok(json) = guest.into_json(&mut volumes) else {
        return;
    };
    let Ok(spec) = parse(&json) else {
        return;
    };
    if validate(&spec).is_ok() {
        names_nothing_of_the_host(&spec, &volumes);
    }
}

/// Of what the agent would take.
fn names_nothing_of_the_host(spec: &Spec, volumes: &Numbered) {
    let root = spec.root().as_ref().map(|root| root.path().clone());
    let rootfs = format!("{SHARE_DIR}/containers/{CONTAINER}/rootfs");
    assert_eq!(root, Some(PathBuf::from(rootfs)));
    let mut shared = 0;
    for mount in spec.mounts().iter().flatten() {
        let mut words = mount.options().iter().flatten();
        let is_bind = words.clone().any(|word| word == "bind" || word == "rbind")
            || mount.typ().as_deref() == Some("bind");
        // The source of a remount is never looked at.
        if !is_bind || words.clone().any(|word| word == "remount") {
            continue;
        }
        let source = mount.source().clone().unwrap_or_default();
        if source == Path::new(POD_DIR).join("shm") {
            continue;
        }
        let expected = format!("{SHARE_DIR}/volumes/{shared}");
        assert_eq!(source, PathBuf::from(expected), "a source of the host");
        shared += 1;
        // The later of two words counts.
        let last = words.rfind(|word| ["rro", "rrw", "ro", "rw"].contains(&word.as_str()));
        let (path, access) = &volumes.0[shared - 1];
        let writable = *access == Access::Writable;
        let read_only = last.is_some_and(|word| word.ends_with("ro"));
        assert!(
            !(writable && read_only && words_agree(mount.options().as_ref())),
            "{} is writable on the host, read-only in the guest",
            path.display()
        );
    }
    assert_eq!(shared, volumes.0.len(), "a volume for each bind mount");
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().clone());
    for namespace in namespaces.iter().flatten() {
        if let Some(path) = namespace
            .path()
            .as_ref()
            .filter(|path| !path.as_os_str().is_empty())
        {
            let of_pod = path.starts_with(POD_DIR) && path.components().count() == 6;
            assert!(
                of_pod || path == &Path::new(PID_NAMESPACES_DIR).join(PEER),
                "a namespace of the host: {}",
                path.display()
            );
        }
    }
    let cgroup = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.cgroups_path().clone());
    assert_eq!(cgroup, Some(PathBuf::from(CONTAINER)));
    let hooks = spec.hooks().as_ref();
    let on_host = hooks.map(|hooks| [hooks.create_runtime(), hooks.poststart(), hooks.poststop()]);
    let hooks = on_host.into_iter().flatten().flatten().flatten();
    assert_eq!(hooks.count(), 0, "hooks of the host");
}

/// Not both of a recursive word and of one that is not: those are two answers.
fn words_agree(options: Option<&Vec<String>>) -> bool {
    let has = |words: [&str; 2]| {
        let mut options = options.into_iter().flatten();
        options.any(|option| words.contains(&option.as_str()))
    };
    !(has(["rro", "rrw"]) && has(["ro", "rw"]))
}
