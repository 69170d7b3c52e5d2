//! Which specifications are accepted: what the clients make by default, as the
//! shim passes it on; and which single changes are refused, by which name.

use agent_container::{ParseError, Unsupported, parse, parse_process, parse_resources, validate};
use serde_json::{Value, json};

const CLIENTS: [(&str, &str); 5] = [
    ("ctr", include_str!("testdata/ctr.json")),
    ("nerdctl", include_str!("testdata/nerdctl.json")),
    ("CRI sandbox", include_str!("testdata/cri-sandbox.json")),
    ("CRI container", include_str!("testdata/cri-container.json")),
    (
        "CRI privileged",
        include_str!("testdata/cri-privileged.json"),
    ),
];

fn ctr() -> Value {
    serde_json::from_str(CLIENTS[0].1).unwrap()
}

/// The `ctr` specification with the value at a JSON pointer set, parents included.
fn with(pointer: &str, value: Value) -> Value {
    let mut spec = ctr();
    let mut place = &mut spec;
    for part in pointer.split('/').skip(1) {
        place = match part.parse::<usize>() {
            Ok(index) => &mut place[index],
            Err(_) => &mut place[part],
        };
    }
    *place = value;
    spec
}

fn refusal(spec: &Value) -> Option<Unsupported> {
    match parse(spec.to_string().as_bytes()) {
        Ok(spec) => validate(&spec).err(),
        Err(ParseError::Unsupported(refused)) => Some(refused),
        Err(error) => panic!("{error:?}"),
    }
}

#[test]
fn validate_default_specifications_of_clients_are_accepted() {
    for (client, json) in CLIENTS {
        let spec = parse(json.as_bytes()).unwrap_or_else(|error| panic!("{client}: {error:?}"));
        validate(&spec).unwrap_or_else(|error| panic!("{client}: {error}"));
    }
}

#[test]
fn validate_each_unsupported_field_is_refused_by_its_name() {
    let hook = json!([{"path": "/bin/true"}]);
    let mapping = json!([{"containerID": 0, "hostID": 0, "size": 1}]);
    let shared_pid_with_user = || {
        let mut all = ctr()["linux"]["namespaces"].clone();
        all[0]["path"] = json!("/run/bulkhead/pod/ns/pid");
        all.as_array_mut().unwrap().push(json!({"type": "user"}));
        all
    };
    let namespaces = |add: Value| {
        let mut all = ctr()["linux"]["namespaces"].clone();
        all.as_array_mut().unwrap().push(add);
        all
    };
    let without = |kind: &str| {
        let mut all = ctr()["linux"]["namespaces"].clone();
        all.as_array_mut()
            .unwrap()
            .retain(|namespace| namespace["type"] != kind);
        all
    };
    let device = |path: &str, kind: &str, major: i64| json!([{"path": path, "type": kind, "major": major, "minor": 3}]);
    for (pointer, value, field) in [
        ("/ociVersion", json!("2.0.0"), "ociVersion"),
        ("/root", Value::Null, "root"),
        ("/root/path", json!("rootfs"), "root.path"),
        ("/process", Value::Null, "process"),
        ("/process/args", json!([]), "process.args"),
        ("/process/cwd", json!("tmp"), "process.cwd"),
        ("/process/commandLine", json!("cmd"), "process.commandLine"),
        (
            "/process/user/username",
            json!("u"),
            "process.user.username",
        ),
        ("/process/oomScoreAdj", json!(1001), "process.oomScoreAdj"),
        (
            "/hooks",
            json!({"createContainer": hook}),
            "hooks.createContainer",
        ),
        (
            "/hooks",
            json!({"startContainer": [{"path": "relative"}]}),
            "hooks.startContainer[0].path",
        ),
        (
            "/hooks",
            json!({"startContainer": [{"path": "/x", "timeout": 0}]}),
            "hooks.startContainer[0].timeout",
        ),
        ("/hooks", json!({"prestart": hook}), "hooks.prestart"),
        (
            "/hooks",
            json!({"createRuntime": hook}),
            "hooks.createRuntime",
        ),
        ("/hooks", json!({"poststart": hook}), "hooks.poststart"),
        ("/hooks", json!({"poststop": hook}), "hooks.poststop"),
        ("/vm", json!({"kernel": {"path": "/k"}}), "vm"),
        ("/linux/uidMappings", mapping.clone(), "linux.uidMappings"),
        ("/linux/gidMappings", mapping.clone(), "linux.gidMappings"),
        ("/linux/netDevices", json!({"eth0": {}}), "linux.netDevices"),
        ("/linux/intelRdt", json!({"closID": "c"}), "linux.intelRdt"),
        (
            "/linux/personality",
            json!({"domain": "LINUX32", "flags": ["SHORT_INODE"]}),
            "linux.personality.flags",
        ),
        (
            "/linux/timeOffsets",
            json!({"boottime": {"secs": 1}}),
            "linux.timeOffsets.boottime",
        ),
        (
            "/linux/cgroupsPath",
            json!("../escape"),
            "linux.cgroupsPath",
        ),
        (
            "/linux/cgroupsPath",
            json!("/absolute"),
            "linux.cgroupsPath",
        ),
        (
            "/linux/sysctl",
            json!({"kernel.panic": "1"}),
            "linux.sysctl.kernel.panic",
        ),
        (
            "/linux/rootfsPropagation",
            json!("sideways"),
            "linux.rootfsPropagation",
        ),
        (
            "/linux/maskedPaths",
            json!(["proc/kcore"]),
            "linux.maskedPaths",
        ),
        (
            "/linux/readonlyPaths",
            json!(["proc/sys"]),
            "linux.readonlyPaths",
        ),
        ("/linux/namespaces", without("pid"), "linux.namespaces: pid"),
        (
            "/linux/namespaces",
            without("mount"),
            "linux.namespaces: mount",
        ),
        (
            "/linux/namespaces",
            without("network"),
            "linux.namespaces: network",
        ),
        ("/linux/namespaces", without("ipc"), "linux.namespaces: ipc"),
        ("/linux/namespaces", without("uts"), "linux.namespaces: uts"),
        (
            "/linux/namespaces",
            namespaces(json!({"type": "user", "path": "/run/bulkhead/pod/ns/user"})),
            "linux.uidMappings",
        ),
        (
            "/linux/namespaces",
            namespaces(json!({"type": "time", "path": "/run/bulkhead/pod/ns/time"})),
            "linux.namespaces: time",
        ),
        (
            "/linux/namespaces",
            namespaces(json!({"type": "ipc"})),
            "linux.namespaces: ipc",
        ),
        (
            "/linux/namespaces",
            shared_pid_with_user(),
            "linux.namespaces: pid",
        ),
        (
            "/linux/namespaces/3/path",
            json!("/run/bulkhead/pod/ns/mnt"),
            "linux.namespaces: mount",
        ),
        (
            "/mounts/0/destination",
            json!("proc"),
            "mounts[0].destination",
        ),
        ("/mounts/0/type", json!("ext4"), "mounts[0].type"),
        (
            "/mounts/0/uidMappings",
            mapping.clone(),
            "mounts[0].gidMappings",
        ),
        ("/mounts/0/gidMappings", mapping, "mounts[0].uidMappings"),
        ("/mounts/0/options", json!(["mand"]), "mounts[0].options"),
        ("/mounts/0/options", json!(["idmap"]), "mounts[0].options"),
        (
            "/mounts/0",
            json!({"destination": "/d", "options": ["rbind"]}),
            "mounts[0].source",
        ),
        (
            "/linux/devices",
            device("/dev/sda", "b", 8),
            "linux.devices[0]",
        ),
        (
            "/linux/devices",
            device("/dev/x", "c", 4),
            "linux.devices[0]",
        ),
        (
            "/linux/devices",
            device("/etc/null", "c", 1),
            "linux.devices[0].path",
        ),
        (
            "/linux/devices",
            device("/dev/../null", "c", 1),
            "linux.devices[0].path",
        ),
        (
            "/linux/resources/memory",
            json!({"swappiness": 60}),
            "linux.resources.memory.swappiness",
        ),
        (
            "/linux/resources/blockIO",
            json!({"weight": 1}),
            "linux.resources.blockIO.weight",
        ),
        (
            "/linux/resources/devices",
            json!([{"allow": true, "access": "q"}]),
            "linux.resources.devices[0].access",
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "linux.seccomp.defaultAction",
        ),
        ("/linux/fromTheFuture", json!(1), "linux.fromTheFuture"),
        (
            "/process/user/fromTheFuture",
            json!({}),
            "process.user.fromTheFuture",
        ),
        ("/fromTheFuture", json!([]), "fromTheFuture"),
    ] {
        let spec = with(pointer, value);
        match refusal(&spec) {
            Some(refused) => assert_eq!(refused.field, field, "{pointer}: {refused}"),
            None => panic!("{pointer} = {} is accepted", spec.pointer(pointer).unwrap()),
        }
    }
}

#[test]
fn validate_what_is_empty_or_unknown_by_design_is_accepted() {
    for (pointer, value) in [
        ("/hooks", json!({"prestart": [], "poststop": null})),
        ("/annotations", json!({"any.thing/at-all": "1"})),
        ("/linux/timeOffsets", json!({})),
        ("/linux/cgroupsPath", json!("")),
        ("/linux/rootfsPropagation", json!("")),
        ("/process/apparmorProfile", json!("profile")),
        ("/process/selinuxLabel", json!("label")),
        ("/linux/mountLabel", json!("label")),
        (
            "/linux/namespaces/1/path",
            json!("/run/bulkhead/pod/ns/ipc"),
        ),
        ("/linux/namespaces/1/path", json!("")),
    ] {
        let spec = with(pointer, value);
        assert_eq!(refusal(&spec), None, "{pointer}");
    }
}

#[test]
fn parse_what_is_no_specification_is_an_error() {
    for json in ["", "{", "{\"process\": 1}", "{} trailing"] {
        assert!(
            matches!(parse(json.as_bytes()), Err(ParseError::Json(_))),
            "{json}"
        );
    }
}

#[test]
fn parse_part_of_a_specification_names_fields_from_its_root() {
    let process = br#"{"user": {"uid": 0, "gid": 0}, "cwd": "/", "user2": 1}"#;
    let resources = br#"{"memory": {"limit": 1, "limits": 2}}"#;
    for (refused, field) in [
        (parse_process(process).err(), "process.user2"),
        (
            parse_resources(resources).err(),
            "linux.resources.memory.limits",
        ),
    ] {
        match refused {
            Some(ParseError::Unsupported(refused)) => assert_eq!(refused.field, field),
            other => panic!("{field}: {other:?}"),
        }
    }
    let deep = "[".repeat(100_000);
    for text in ["", "null", "[]", "{}x", deep.as_str(), "\u{0}"] {
        assert!(parse_process(text.as_bytes()).is_err(), "{text:.9}");
    }
    let deep = format!("{{\"x\": {deep}");
    assert!(parse_resources(deep.as_bytes()).is_err());
}
