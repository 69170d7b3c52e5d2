//! The cgroup and the devices.

use agent_container::{Figures, UpdateError, parse_resources};
use serde_json::{Value, json};

use crate::fixture::{Host, read_until, wait};

fn cgroup_mount() -> Value {
    json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
           "options": ["ro", "nosuid", "noexec", "nodev", "relatime"]})
}

pub fn run_cgroup(host: &Host) {
    let mut spec = host.spec(
        "a",
        &[
            "cat /proc/self/cgroup",
            "cat /sys/fs/cgroup/cgroup.procs",
            "append /sys/fs/cgroup/cgroup.procs",
        ],
    );
    spec["mounts"].as_array_mut().unwrap().push(cgroup_mount());
    let outcome = host.run("a", &spec);
    assert!(
        outcome
            .of("cat /proc/self/cgroup")
            .lines()
            .any(|line| line == "0::/")
    );
    assert_eq!(outcome.of("cat /sys/fs/cgroup/cgroup.procs"), "1");
    assert_eq!(
        outcome.of("append /sys/fs/cgroup/cgroup.procs"),
        format!("error {}", libc::EROFS)
    );
}

pub fn run_cgroup_bind(host: &Host) {
    let mut spec = host.spec(
        "a",
        &[
            "cat /sys/fs/cgroup/cgroup.procs",
            "mkdir /sys/fs/cgroup/sub",
        ],
    );
    let mut mount = cgroup_mount();
    mount["options"][0] = json!("rw");
    spec["mounts"].as_array_mut().unwrap().push(mount);
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .retain(|one| one["type"] != "cgroup");
    let outcome = host.run("a", &spec);
    assert_eq!(outcome.of("cat /sys/fs/cgroup/cgroup.procs"), "1");
    // Removed with the container, as assert_clean sees.
    assert_eq!(outcome.of("mkdir /sys/fs/cgroup/sub"), "made");
}

pub fn run_devices(host: &Host) {
    let lines = [
        "mknod /dev/kmsg2 1 11",
        "read /dev/kmsg2 1",
        "mknod /dev/zero2 1 5",
        "read /dev/zero2 1",
        "stat /dev/net/tun",
    ];
    let mut spec = host.spec("a", &lines);
    spec["linux"]["devices"] = json!([{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o640, "uid": 3, "gid": 4}]);
    let outcome = host.run("a", &spec);
    assert_eq!(outcome.of("mknod /dev/kmsg2 1 11"), "made");
    assert_eq!(
        outcome.of("read /dev/kmsg2 1"),
        format!("error {}", libc::EPERM)
    );
    assert_eq!(outcome.of("read /dev/zero2 1"), "1 bytes");
    assert_eq!(outcome.of("stat /dev/net/tun"), "device 640 3:4 10:200");
}

pub fn run_privileged(host: &Host) {
    let client: Value =
        serde_json::from_str(include_str!("../../testdata/cri-privileged.json")).unwrap();
    let mut spec = host.spec("a", &["ls /dev", "stat /dev/fuse", "read /dev/kmsg 4096"]);
    for name in ["devices", "resources"] {
        spec["linux"][name] = client["linux"][name].clone();
    }
    spec["linux"]["resources"] = json!({"devices": spec["linux"]["resources"]["devices"]});
    let outcome = host.run("a", &spec);
    let names: Vec<_> = outcome.of("ls /dev").split(' ').collect();
    assert!(
        names.contains(&"fuse") && names.contains(&"kmsg"),
        "{names:?}"
    );
    assert!(
        !names.contains(&"sda") && !names.contains(&"mem"),
        "{names:?}"
    );
    assert_eq!(
        outcome.warnings,
        ["linux.devices: left out 2 devices of the host, which the guest does not have"]
    );
}

pub fn figures_until_deleted(host: &Host) {
    let spec = host.spec("a", &["exit 0"]);
    let (container, _reader) = host.create("a", &spec).unwrap();
    container.init().start().unwrap();
    wait(container.init().pid());
    let used = container.figures().unwrap();
    assert!(used.cpu.of("usage_usec") > 0, "{used:?}");
    if host.has_controller("memory") {
        assert!(used.memory_peak > 0, "{used:?}");
    }
    if host.has_controller("pids") {
        assert_eq!(used.pids, 0);
    }
    assert_eq!(container.oom_kills().unwrap(), 0);
    container.delete().unwrap();
    assert_eq!(container.figures().unwrap(), Figures::default());
}

pub fn update_devices_and_limits(host: &Host) {
    let spec = host.spec("a", &["mknod /dev/fuse2 10 229", "sleep"]);
    let (container, mut reader) = host.create("a", &spec).unwrap();
    container.init().start().unwrap();
    read_until(&mut reader, "made");
    let line = "append /dev/fuse2";
    let open = || {
        let outcome = Host::run_exec(&container, &Host::process(&spec, &[line]));
        outcome.of(line).to_owned()
    };
    let update = |resources: Value| {
        let resources = parse_resources(resources.to_string().as_bytes()).unwrap();
        container.update(&resources)
    };
    let denied = format!("error {}", libc::EPERM);
    let allow = json!({"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"});
    assert_eq!(open(), denied);
    // Up and down, twice: what replaces can be replaced.
    for _ in 0..2 {
        update(json!({"devices": [allow]})).unwrap();
        assert_ne!(open(), denied);
        update(json!({"devices": [{"allow": false, "access": "rwm"}]})).unwrap();
        assert_eq!(open(), denied);
    }
    update(json!({"devices": [allow]})).unwrap();
    // An update that says nothing of devices leaves them.
    update(json!({"devices": []})).unwrap();
    update(json!({})).unwrap();
    assert_ne!(open(), denied);
    if host.has_controller("pids") {
        update(json!({"pids": {"limit": 8}})).unwrap();
        assert_eq!(container.figures().unwrap().pids_limit, 8);
        update(json!({"pids": {"limit": -1}})).unwrap();
        assert_eq!(container.figures().unwrap().pids_limit, u64::MAX);
    }
    let refused = update(
        json!({"blockIO": {"leafWeight": 10}, "devices": [{"allow": false, "access": "rwm"}]}),
    );
    let refused = refused.unwrap_err();
    assert!(matches!(refused, UpdateError::Unsupported(_)));
    assert!(
        refused.to_string().starts_with("linux.resources.blockIO"),
        "{refused}"
    );
    assert_ne!(open(), denied);
    container.delete().unwrap();
    wait(container.init().pid());
}
