use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::host::volumes::{Placed, Wanted};
use agent_protocol::POD_DIR;

/// Numbers the sources.
#[derive(Default)]
struct Counted(Vec<PathBuf>);

impl Volumes for Counted {
    type Error = Infallible;

    fn add(&mut self, source: &Path, _: &Wanted) -> Result<Placed, Infallible> {
        let known = self.0.iter().position(|known| known == source);
        let number = known.unwrap_or_else(|| {
            self.0.push(source.to_owned());
            self.0.len() - 1
        });
        Ok(Placed {
            path: format!("volumes/{number}").into(),
            read_only: false,
            below: Vec::new(),
        })
    }
}

fn namespaces() -> Value {
    json!([
        {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}
    ])
}

fn lone() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "hostname": "h",
        "root": {"path": "rootfs", "readonly": true},
        "linux": {"namespaces": namespaces(), "cgroupsPath": "/default/c"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
            {"destination": "/a", "type": "bind", "source": "/host/a", "options": ["rbind", "ro"]},
            {"destination": "/b", "source": "/host/a", "options": ["bind", "ro"]},
        ],
        "futureField": {"x": 1},
    })
}

fn member(namespaces: &Value) -> Value {
    json!({
        "root": {"path": "rootfs"},
        "linux": {"namespaces": namespaces},
        "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "box",
        },
        "mounts": [{
            "destination": "/dev/shm", "type": "bind",
            "source": "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/box/shm",
            "options": ["rbind", "ro"],
        }],
    })
}

/// With container `d`, whose pid is 79.
fn peers(sandbox: Option<u32>) -> Peers {
    let containers = [(79, "d".to_owned())].into();
    Peers {
        sandbox,
        containers,
        id_maps: None,
    }
}

fn rewritten(spec: Value, sandbox_pid: Option<u32>) -> (HostView, Value) {
    let (host, guest) = GuestSpec::split(spec, "c", &peers(sandbox_pid)).expect("splits");
    let json = guest.into_json(&mut Counted::default()).expect("rewrites");
    (host, serde_json::from_slice(&json).expect("is JSON"))
}

fn refusal(spec: Value, sandbox_pid: Option<u32>) -> String {
    GuestSpec::split(spec, "c", &peers(sandbox_pid))
        .expect_err("is refused")
        .to_string()
}

#[test]
fn rewrite_lone_container_replaces_every_path_of_the_host() {
    let (host, guest) = rewritten(lone(), None);
    assert_eq!(
        guest["root"],
        json!({"path": "/run/bulkhead/share/containers/c/rootfs", "readonly": true})
    );
    assert_eq!(guest["linux"]["cgroupsPath"], "c");
    assert_eq!(
        guest["linux"]["namespaces"][4],
        json!({"type": "network", "path": "/run/bulkhead/pod/ns/net"})
    );
    assert_eq!(guest["linux"]["namespaces"][0], json!({"type": "pid"}));
    assert_eq!(
        guest["mounts"][2]["source"],
        "/run/bulkhead/share/volumes/0"
    );
    assert_eq!(
        guest["mounts"][3]["source"],
        "/run/bulkhead/share/volumes/0"
    );
    assert_eq!(guest["mounts"][1]["source"], "shm");
    assert_eq!(host.root, PathBuf::from("rootfs"));
    assert_eq!(host.cgroups_path.as_deref(), Some("/default/c"));
    assert!(host.own_pid_namespace);
}

#[test]
fn rewrite_unknown_field_reaches_the_agent() {
    assert_eq!(rewritten(lone(), None).1["futureField"], json!({"x": 1}));
}

#[test]
fn rewrite_member_maps_its_sandbox_and_shm_back_to_the_pod() {
    let namespaces = json!([
        {"type": "network", "path": "/proc/77/ns/net"},
        {"type": "ipc", "path": "/proc/77/ns/ipc"},
        {"type": "uts", "path": "/proc/77/ns/uts"},
        {"type": "pid"},
    ]);
    let (host, guest) = rewritten(member(&namespaces), Some(77));
    assert_eq!(
        guest["linux"]["namespaces"][1]["path"],
        "/run/bulkhead/pod/ns/ipc"
    );
    assert_eq!(guest["mounts"][0]["source"], "/run/bulkhead/pod/shm");
    assert_eq!(host.network_path, None);
    assert!(host.shm_source.is_some());
}

fn mappings(host: u32) -> Value {
    json!([{"containerID": 0, "hostID": host, "size": 65536}])
}

fn with_mappings(mut spec: Value, uids: &Value) -> Value {
    spec["linux"]["uidMappings"] = uids.clone();
    spec["linux"]["gidMappings"] = uids.clone();
    spec
}

#[test]
fn rewrite_user_namespace_of_the_first_container_is_the_pods() {
    let mut spec = lone();
    let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("a list");
    namespaces.push(json!({"type": "user"}));
    let (host, guest) = rewritten(with_mappings(spec.clone(), &mappings(65536)), None);
    let maps = host.id_maps.expect("has maps");
    assert_eq!(maps.uid_map(), "0 65536 65536\n");
    let user = json!({"type": "user", "path": "/run/bulkhead/pod/ns/user"});
    assert_eq!(guest["linux"]["namespaces"][5], user);
    assert_eq!(guest["linux"]["uidMappings"], mappings(65536));
    assert!(refusal(spec.clone(), None).contains("needs both"));
    let mut joining = with_mappings(spec.clone(), &mappings(65536));
    joining["linux"]["namespaces"][5]["path"] = json!("/proc/123/ns/user");
    assert!(refusal(joining, None).contains("/proc/123/ns/user"));
    let without_root = json!([{"containerID": 1, "hostID": 65536, "size": 10}]);
    assert!(refusal(with_mappings(spec, &without_root), None).contains("container id 0"));
}

#[test]
fn rewrite_user_namespace_of_the_sandbox_is_joined_with_its_mappings() {
    let namespaces = json!([
        {"type": "user", "path": "/proc/77/ns/user"},
        {"type": "network", "path": "/proc/77/ns/net"}, {"type": "ipc"}, {"type": "uts"},
    ]);
    let spec = with_mappings(member(&namespaces), &mappings(65536));
    let in_pod = |sandbox, maps: Option<&str>| {
        let id_maps = maps.map(|maps| IdMaps::of_options(maps, maps).expect("maps"));
        let peers = Peers {
            id_maps,
            ..peers(Some(sandbox))
        };
        let split = GuestSpec::split(spec.clone(), "c", &peers);
        split.map_err(|error| error.to_string())
    };
    let (host, guest) = in_pod(77, Some("0:65536:65536")).expect("splits");
    assert_eq!(host.id_maps, None);
    let json = guest.into_json(&mut Counted::default()).expect("rewrites");
    let guest: Value = serde_json::from_slice(&json).expect("is JSON");
    let user = json!({"type": "user", "path": "/run/bulkhead/pod/ns/user"});
    assert_eq!(guest["linux"]["namespaces"][0], user);
    let refused = |sandbox, maps| in_pod(sandbox, maps).expect_err("is refused");
    assert!(refused(77, Some("0:100000:65536")).contains("another way"));
    assert!(refused(77, None).contains("not at all"));
    assert!(refused(78, Some("0:65536:65536")).contains("/proc/77/ns/user"));
}

#[test]
fn rewrite_remount_has_no_source() {
    let mut spec = lone();
    spec["mounts"] = json!([
        {"destination": "/a", "type": "bind", "source": "none", "options": ["bind", "remount", "ro"]},
    ]);
    assert_eq!(rewritten(spec, None).1["mounts"][0]["source"], "none");
}

#[test]
fn rewrite_namespace_of_another_pod_is_refused() {
    let namespaces = json!([
        {"type": "network", "path": "/proc/78/ns/net"},
        {"type": "ipc", "path": "/proc/77/ns/ipc"},
        {"type": "uts", "path": "/proc/77/ns/uts"},
    ]);
    let refused = refusal(member(&namespaces), Some(77));
    assert!(refused.contains("/proc/78/ns/net"), "{refused}");
}

/// What becomes of the path of a PID namespace, or of none, in the pod of sandbox 77.
fn guest_pid_path(asked: Option<&str>) -> Value {
    let mut namespaces = json!([
        {"type": "network", "path": "/proc/77/ns/net"},
        {"type": "ipc", "path": "/proc/77/ns/ipc"},
        {"type": "uts", "path": "/proc/77/ns/uts"},
    ]);
    if let Some(path) = asked {
        let all = namespaces.as_array_mut().expect("a list");
        all.push(json!({"type": "pid", "path": path}));
    }
    let (host, guest) = rewritten(member(&namespaces), Some(77));
    assert!(!host.own_pid_namespace);
    guest["linux"]["namespaces"][3]["path"].clone()
}

#[test]
fn rewrite_pid_namespace_of_the_sandbox_or_the_host_is_the_pods() {
    let pods = "/run/bulkhead/pod/ns/pid";
    assert_eq!(guest_pid_path(Some("/proc/77/ns/pid")), pods);
    assert_eq!(guest_pid_path(None), pods);
}

#[test]
fn rewrite_pid_namespace_of_another_container_is_that_ones() {
    let of_d = "/run/bulkhead/pod/ns/pid-of/d";
    assert_eq!(guest_pid_path(Some("/proc/79/ns/pid")), of_d);
}

#[test]
fn rewrite_pid_namespace_from_outside_the_pod_is_refused() {
    let mut namespaces = namespaces();
    namespaces[0]["path"] = json!("/proc/80/ns/pid");
    assert!(refusal(member(&namespaces), Some(77)).contains("/proc/80/ns/pid"));
    // A lone container has no peers.
    let mut spec = lone();
    spec["linux"]["namespaces"][0]["path"] = json!("/proc/79/ns/pid");
    assert!(refusal(spec, None).contains("/proc/79/ns/pid"));
}

#[test]
fn rewrite_without_network_namespace_is_refused_as_the_hosts() {
    let mut spec = lone();
    spec["linux"]["namespaces"] = json!([{"type": "ipc"}, {"type": "uts"}]);
    assert!(refusal(spec, None).contains("network"));
}

#[test]
fn rewrite_network_made_by_cni_is_left_to_the_host() {
    let mut spec = lone();
    spec["linux"]["namespaces"][4]["path"] = json!("/var/run/netns/cni-1");
    let (host, guest) = rewritten(spec, None);
    assert_eq!(
        host.network_path,
        Some(PathBuf::from("/var/run/netns/cni-1"))
    );
    assert_eq!(
        guest["linux"]["namespaces"][4]["path"],
        "/run/bulkhead/pod/ns/net"
    );
}

#[test]
fn rewrite_relative_bind_source_is_refused() {
    let mut spec = lone();
    spec["mounts"][2]["source"] = json!("a");
    let (_, guest) = GuestSpec::split(spec, "c", &peers(None)).expect("splits");
    let error = guest
        .into_json(&mut Counted::default())
        .expect_err("is refused");
    assert!(error.to_string().contains("mounts[2].source"), "{error}");
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        prop_oneof![
            "[a-z/]{0,12}",
            Just("bind".to_owned()),
            Just("network".to_owned())
        ]
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 64, 6, |inner| {
        let key = prop_oneof![
            Just("root"),
            Just("path"),
            Just("linux"),
            Just("namespaces"),
            Just("type"),
            Just("mounts"),
            Just("source"),
            Just("options"),
            Just("hooks"),
            Just("annotations"),
        ];
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::btree_map(key.prop_map(str::to_owned), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn rewrite_any_json_never_panics_nor_lets_a_host_path_through(spec in any_json()) {
        if let Ok((_, guest)) = GuestSpec::split(spec, "c", &peers(Some(1)))
            && let Ok(json) = guest.into_json(&mut Counted::default())
        {
            let spec: Value = serde_json::from_slice(&json).expect("is JSON");
            for mount in spec["mounts"].as_array().into_iter().flatten().filter(|mount| is_bind(mount)) {
                let source = text(mount, "/source").expect("has a source");
                prop_assert!(source.starts_with(SHARE_DIR) || source.starts_with(POD_DIR));
            }
        }
    }
}
