//! `root`, `mounts`, `linux.devices`, masked and read-only paths, `hooks`.

use serde_json::{Value, json};

use super::{add, any, mount, put, single};
use crate::base::{CHECKER, Place};
use crate::matrix::Variation;

fn tmpfs(spec: &mut Value, destination: &str, options: &[&str]) {
    mount(spec, destination, "tmpfs", &json!("tmpfs"), options);
}

fn bind(spec: &mut Value, place: &Place, destination: &str, options: &[&str]) {
    mount(spec, destination, "bind", &json!(place.volume), options);
}

fn bind_file(spec: &mut Value, place: &Place, destination: &str, options: &[&str]) {
    let source = json!(place.volume.join("content"));
    mount(spec, destination, "bind", &source, options);
}

fn propagation(spec: &mut Value, word: &str) {
    put(spec, "linux/rootfsPropagation", json!(word));
}

fn device(spec: &mut Value, path: &str, kind: &str, number: (u32, u32), mode: u32) {
    let device = json!({"path": path, "type": kind, "major": number.0, "minor": number.1,
        "fileMode": mode, "uid": 1000, "gid": 5});
    add(spec, "linux/devices", device);
}

/// A hook of the host's, which leaves its input in the root file system.
fn host_hook(spec: &mut Value, place: &Place, kind: &str) {
    let file = place.rootfs.join("hooks").join(kind);
    let hook = json!({"path": place.checker, "args": ["spec-checker", "hook", file]});
    put(spec, &format!("hooks/{kind}"), json!([hook]));
}

pub const VARIATIONS: &[Variation] = &[
    any("root.readonly", "root", |spec, _| {
        put(spec, "root/readonly", json!(true));
    }),
    any(
        "linux.rootfsPropagation: private",
        "propagation",
        |spec, _| {
            propagation(spec, "private");
        },
    ),
    any(
        "linux.rootfsPropagation: rslave",
        "propagation",
        |spec, _| {
            propagation(spec, "rslave");
        },
    ),
    any(
        "linux.rootfsPropagation: shared",
        "propagation",
        |spec, _| {
            propagation(spec, "shared");
        },
    ),
    // Under runc no path of the root can then be made read-only.
    single("linux.rootfsPropagation: unbindable", |spec, _| {
        propagation(spec, "unbindable");
    }),
    any("mounts: tmpfs with size, mode, owner", "m1", |spec, _| {
        let options = [
            "size=1m",
            "mode=1770",
            "uid=1000",
            "gid=2000",
            "nr_inodes=64",
        ];
        tmpfs(spec, "/mnt/tmpfs", &options);
    }),
    any(
        "mounts: tmpfs ro nosuid nodev noexec noatime",
        "m2",
        |spec, _| {
            let options = ["ro", "nosuid", "nodev", "noexec", "noatime"];
            tmpfs(spec, "/mnt/tmpfs-ro", &options);
        },
    ),
    any("mounts: tmpfs nodiratime strictatime", "m3", |spec, _| {
        tmpfs(spec, "/mnt/tmpfs-atime", &["nodiratime", "strictatime"]);
    }),
    any("mounts: tmpfs nosymfollow", "m4", |spec, _| {
        tmpfs(spec, "/mnt/tmpfs-links", &["nosymfollow"]);
    }),
    any("mounts: tmpfs tmpcopyup", "m5", |spec, _| {
        tmpfs(spec, "/kept-dir", &["tmpcopyup"]);
    }),
    any("mounts: later words win", "m6", |spec, _| {
        let options = ["ro", "noexec", "nosuid", "rw", "exec", "suid"];
        tmpfs(spec, "/mnt/tmpfs-words", &options);
    }),
    any("mounts: through a link of the image", "m7", |spec, _| {
        tmpfs(spec, "/link/inner", &["size=64k"]);
    }),
    any("mounts: over another", "m8", |spec, _| {
        tmpfs(spec, "/mnt/twice", &["size=64k"]);
        tmpfs(spec, "/mnt/twice", &["size=128k"]);
    }),
    any("mounts: rbind", "m9", |spec, place| {
        bind(spec, place, "/mnt/rbind", &["rbind", "rw"]);
    }),
    any("mounts: bind, not what is below", "m10", |spec, place| {
        bind(spec, place, "/mnt/bind", &["bind"]);
    }),
    any("mounts: rbind ro", "m11", |spec, place| {
        bind(spec, place, "/mnt/rbind-ro", &["rbind", "ro"]);
    }),
    any("mounts: rbind rro", "m12", |spec, place| {
        bind(spec, place, "/mnt/rbind-rro", &["rbind", "rro"]);
    }),
    any(
        "mounts: rbind rnosuid rnodev rnoexec",
        "m13",
        |spec, place| {
            let options = ["rbind", "rnosuid", "rnodev", "rnoexec"];
            bind(spec, place, "/mnt/rbind-rno", &options);
        },
    ),
    any(
        "mounts: bind nosuid nodev noexec noatime",
        "m14",
        |spec, place| {
            let options = ["bind", "nosuid", "nodev", "noexec", "noatime"];
            bind(spec, place, "/mnt/bind-no", &options);
        },
    ),
    any("mounts: bind of a file", "m15", |spec, place| {
        bind_file(spec, place, "/mnt/file", &["bind"]);
    }),
    any("mounts: bind of a file, ro", "m16", |spec, place| {
        bind_file(spec, place, "/mnt/file-ro", &["bind", "ro"]);
    }),
    any("mounts: rbind rprivate", "m17", |spec, place| {
        bind(spec, place, "/mnt/rprivate", &["rbind", "rprivate"]);
    }),
    any("mounts: rbind rslave", "m18", |spec, place| {
        bind(spec, place, "/mnt/rslave", &["rbind", "rslave"]);
    }),
    any("mounts: rbind rshared", "m19", |spec, place| {
        bind(spec, place, "/mnt/rshared", &["rbind", "rshared"]);
    }),
    any("mounts: bind unbindable", "m20", |spec, place| {
        bind(spec, place, "/mnt/unbindable", &["bind", "unbindable"]);
    }),
    any("mounts: bind nosymfollow", "m21", |spec, place| {
        bind(spec, place, "/mnt/bind-links", &["bind", "nosymfollow"]);
    }),
    any("mounts: proc", "m22", |spec, _| {
        mount(spec, "/mnt/proc", "proc", &json!("proc"), &["ro", "nosuid"]);
    }),
    any("mounts: sysfs", "m23", |spec, _| {
        mount(
            spec,
            "/mnt/sysfs",
            "sysfs",
            &json!("sysfs"),
            &["ro", "nodev"],
        );
    }),
    any("mounts: mqueue", "m24", |spec, _| {
        mount(spec, "/mnt/mqueue", "mqueue", &json!("mqueue"), &["nosuid"]);
    }),
    any("mounts: devpts", "m25", |spec, _| {
        let options = [
            "newinstance",
            "ptmxmode=0640",
            "mode=0600",
            "gid=7",
            "noexec",
        ];
        mount(spec, "/mnt/devpts", "devpts", &json!("devpts"), &options);
    }),
    any("mounts: cgroup", "m26", |spec, _| {
        mount(
            spec,
            "/mnt/cgroup",
            "cgroup",
            &json!("cgroup"),
            &["ro", "nosuid"],
        );
    }),
    any("mounts: idmap", "m27", |spec, place| {
        let mappings = json!([{"containerID": 0, "hostID": 5000, "size": 65536}]);
        let mount = json!({"destination": "/mnt/idmap", "type": "bind", "source": place.volume,
            "options": ["bind", "idmap"], "uidMappings": mappings, "gidMappings": mappings});
        add(spec, "mounts", mount);
    }),
    any("mounts: overlay", "m28", |spec, place| {
        let lower = format!("lowerdir={0}:{0}/below", place.volume.display());
        mount(
            spec,
            "/mnt/overlay",
            "overlay",
            &json!("overlay"),
            &[&lower],
        );
    }),
    single("mounts: remount", |spec, _| {
        tmpfs(spec, "/dev", &["remount", "nosuid", "noexec"]);
    }),
    single("mounts: no /dev", |spec, _| {
        let mounts = spec["mounts"].as_array_mut().expect("the base has mounts");
        mounts.retain(|mount| mount["destination"] != "/dev");
    }),
    single("mounts: relative source", |spec, _| {
        mount(spec, "/mnt/relative", "bind", &json!("content"), &["bind"]);
    }),
    single("mounts: source that is not there", |spec, _| {
        let source = json!("/no/such/source");
        mount(spec, "/mnt/missing", "bind", &source, &["bind"]);
    }),
    any("linux.devices: fuse", "d1", |spec, _| {
        device(spec, "/dev/fuse", "c", (10, 229), 0o640);
    }),
    any("linux.devices: net/tun", "d2", |spec, _| {
        device(spec, "/dev/net/tun", "c", (10, 200), 0o666);
    }),
    any("linux.devices: fifo", "d3", |spec, _| {
        device(spec, "/dev/fifo", "p", (0, 0), 0o622);
    }),
    any("linux.devices: a default one", "d4", |spec, _| {
        device(spec, "/dev/zero", "c", (1, 5), 0o640);
    }),
    any("linux.devices: a second name", "d5", |spec, _| {
        device(spec, "/dev/deep/below/full", "u", (1, 7), 0o604);
    }),
    single("linux.devices: outside of /dev", |spec, _| {
        device(spec, "/full", "c", (1, 7), 0o666);
    }),
    single("linux.devices: a disk of the host", |spec, _| {
        device(spec, "/dev/loop0", "b", (7, 0), 0o660);
    }),
    any("linux.maskedPaths", "masked", |spec, _| {
        for path in ["/hidden-dir", "/hidden-file", "/no/such/path"] {
            add(spec, "linux/maskedPaths", json!(path));
        }
    }),
    any("linux.maskedPaths: none", "masked", |spec, _| {
        put(spec, "linux/maskedPaths", json!([]));
    }),
    any("linux.readonlyPaths", "readonly-paths", |spec, _| {
        for path in ["/readonly-dir", "/readonly-file", "/no/such/path"] {
            add(spec, "linux/readonlyPaths", json!(path));
        }
    }),
    any("linux.readonlyPaths: none", "readonly-paths", |spec, _| {
        put(spec, "linux/readonlyPaths", json!([]));
    }),
    any("hooks.prestart", "hooks-1", |spec, place| {
        host_hook(spec, place, "prestart");
    }),
    any("hooks.createRuntime", "hooks-2", |spec, place| {
        host_hook(spec, place, "createRuntime");
    }),
    any("hooks.createContainer", "hooks-3", |spec, place| {
        host_hook(spec, place, "createContainer");
    }),
    any("hooks.startContainer", "hooks-4", |spec, _| {
        // In the container: its program, and a place in its tmpfs.
        let args = ["spec-checker", "hook", "/run/hooks/startContainer"];
        let hook = json!({"path": CHECKER, "args": args});
        put(spec, "hooks/startContainer", json!([hook]));
    }),
];
