//! The files that the program finds.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::fixture::{Host, write_file};

pub fn run_default_files(host: &Host) {
    let outcome = host.run(
        "a",
        &host.spec(
            "a",
            &[
                "stat /dev/null",
                "stat /dev/tty",
                "read /dev/zero 16",
                "read /dev/urandom 16",
                "link /dev/ptmx",
                "link /dev/fd",
                "link /dev/stderr",
                "ls /dev",
                "ls /dev/pts",
                "stat /dev/shm",
                "write /dev/shm/f x",
                "write /run/f x",
                "cat /proc/self/mounts",
                "ls /dev/mqueue",
                "write /sys/f x",
                "ls /proc/self/task",
            ],
        ),
    );
    assert_eq!(outcome.of("stat /dev/null"), "device 666 0:0 1:3");
    assert_eq!(outcome.of("stat /dev/tty"), "device 666 0:0 5:0");
    assert_eq!(outcome.of("read /dev/zero 16"), "16 bytes");
    assert_eq!(outcome.of("read /dev/urandom 16"), "16 bytes");
    assert_eq!(outcome.of("link /dev/ptmx"), "pts/ptmx");
    assert_eq!(outcome.of("link /dev/fd"), "/proc/self/fd");
    assert_eq!(outcome.of("link /dev/stderr"), "/proc/self/fd/2");
    assert_eq!(
        outcome.of("ls /dev"),
        "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
    );
    assert_eq!(outcome.of("ls /dev/pts"), "ptmx");
    assert_eq!(outcome.of("stat /dev/shm"), "directory 1777 0:0 0:0");
    assert_eq!(outcome.of("write /dev/shm/f x"), "written");
    assert_eq!(outcome.of("write /run/f x"), "written");
    assert_eq!(
        outcome.of("write /sys/f x"),
        format!("error {}", libc::EROFS)
    );
    let mounts = outcome.of("cat /proc/self/mounts");
    for expected in [
        "proc /proc proc rw,nosuid,nodev,noexec,relatime 0 0",
        "tmpfs /dev tmpfs rw,nosuid,size=65536k,mode=755",
        "devpts /dev/pts devpts rw,nosuid,noexec,relatime,gid=5,mode=620,ptmxmode=666",
        "shm /dev/shm tmpfs rw,nosuid,nodev,noexec,relatime,size=65536k",
        "mqueue /dev/mqueue mqueue rw,nosuid,nodev,noexec,relatime",
        "sysfs /sys sysfs ro,nosuid,nodev,noexec,relatime",
    ] {
        assert!(mounts.contains(expected), "{expected}: {mounts}");
    }
}

pub fn run_protected_paths(host: &Host) {
    let rootfs = host.rootfs("a");
    let mut spec = host.spec(
        "a",
        &[
            "cat /secret",
            // As it is, should it reach the machine's own /dev/null after all.
            "chmod /secret 666",
            "ls /hidden",
            "write /hidden/f x",
            "append /proc/sys/kernel/hostname",
            "read /proc/kcore 16",
            "ls /sys/firmware",
            "append /frozen/f",
            "cat /frozen/f",
        ],
    );
    // `spec` made the root file system anew.
    write_file(&rootfs.join("secret"), "secret");
    write_file(&rootfs.join("hidden/f"), "secret");
    write_file(&rootfs.join("frozen/f"), "visible");
    for path in ["/secret", "/hidden", "/not-there"] {
        spec["linux"]["maskedPaths"]
            .as_array_mut()
            .unwrap()
            .push(json!(path));
    }
    for path in ["/frozen", "/not-there"] {
        spec["linux"]["readonlyPaths"]
            .as_array_mut()
            .unwrap()
            .push(json!(path));
    }
    let outcome = host.run("a", &spec);
    let readonly = format!("error {}", libc::EROFS);
    assert_eq!(outcome.of("cat /secret"), "");
    assert_eq!(outcome.of("chmod /secret 666"), readonly);
    assert_eq!(outcome.of("ls /hidden"), "");
    assert_eq!(outcome.of("write /hidden/f x"), readonly);
    assert_eq!(outcome.of("append /proc/sys/kernel/hostname"), readonly);
    // Not there at all in some kernels.
    let kcore = outcome.of("read /proc/kcore 16");
    assert!(["0 bytes", "error 2"].contains(&kcore), "{kcore}");
    let firmware = outcome.of("ls /sys/firmware");
    assert!(["", "error 2"].contains(&firmware), "{firmware}");
    assert_eq!(outcome.of("append /frozen/f"), readonly);
    assert_eq!(outcome.of("cat /frozen/f"), "visible");
}

pub fn run_readonly_root(host: &Host) {
    let mut spec = host.spec("a", &["write /f x", "write /run/f x", "write /dev/f x"]);
    spec["root"]["readonly"] = json!(true);
    // Mount points must be there: nothing can be made in an image's root then, but here it is made before.
    let outcome = host.run("a", &spec);
    assert_eq!(outcome.of("write /f x"), format!("error {}", libc::EROFS));
    assert_eq!(outcome.of("write /run/f x"), "written");
    assert_eq!(outcome.of("write /dev/f x"), "written");
}

fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

pub fn run_binds(host: &Host) {
    let volume = host.share().join("volumes/0");
    write_file(&volume.join("f"), "volume");
    fs::copy(
        host.share().parent().unwrap().join("payload"),
        volume.join("payload"),
    )
    .unwrap();
    let file = host.share().join("volumes/1");
    write_file(&file, "one file");
    let mut spec = host.spec(
        "a",
        &[
            "cat /deep/er/f",
            "write /deep/er/g x",
            "cat /etc/resolv.conf",
            "append /etc/resolv.conf",
            "cat /rw/f",
            "write /rw/new text",
            "cat /proc/self/mountinfo",
        ],
    );
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(bind(
        &volume,
        "/deep/er",
        &["rbind", "rprivate", "ro", "nosuid", "noexec"],
    ));
    mounts.push(bind(&file, "/etc/resolv.conf", &["bind", "ro"]));
    mounts.push(bind(&volume, "/rw", &["rbind", "rshared", "noatime"]));
    mounts.push(bind(&volume, "/slave", &["rbind", "rslave"]));
    let outcome = host.run("a", &spec);
    let readonly = format!("error {}", libc::EROFS);
    assert_eq!(outcome.of("cat /deep/er/f"), "volume");
    assert_eq!(outcome.of("write /deep/er/g x"), readonly);
    assert_eq!(outcome.of("cat /etc/resolv.conf"), "one file");
    assert_eq!(outcome.of("append /etc/resolv.conf"), readonly);
    assert_eq!(outcome.of("write /rw/new text"), "written");
    assert_eq!(fs::read_to_string(volume.join("new")).unwrap(), "text");
    let mounts = outcome.of("cat /proc/self/mountinfo");
    let line = |target: &str| {
        let found = mounts
            .lines()
            .find(|line| line.split(' ').nth(4) == Some(target));
        found
            .unwrap_or_else(|| panic!("{target}: {mounts}"))
            .to_owned()
    };
    assert!(line("/deep/er").contains(" ro,nosuid,noexec"));
    assert!(line("/rw").contains("noatime") && line("/rw").contains("shared:"));
    assert!(!line("/deep/er").contains("shared:"));

    let mut spec = host.spec("a", &["exit 0"]);
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(bind(Path::new("/etc"), "/etc", &["rbind"]));
    let error = host.create_error("a", &spec);
    assert!(
        error.contains("not below the directories of the pod"),
        "{error}"
    );
}

pub fn run_recursive_readonly(host: &Host) {
    let volume = host.share().join("volumes/2");
    let below = volume.join("below");
    fs::create_dir_all(&below).unwrap();
    mount(
        None::<&str>,
        &below,
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    let mut spec = host.spec(
        "a",
        &[
            "write /all/below/f x",
            "write /top/below/f x",
            "write /top/f x",
        ],
    );
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(bind(&volume, "/all", &["rbind", "rro"]));
    mounts.push(bind(&volume, "/top", &["rbind", "ro"]));
    let outcome = host.run("a", &spec);
    let readonly = format!("error {}", libc::EROFS);
    assert_eq!(outcome.of("write /all/below/f x"), readonly);
    assert_eq!(outcome.of("write /top/below/f x"), "written");
    assert_eq!(outcome.of("write /top/f x"), readonly);
    umount2(&below, MntFlags::MNT_DETACH).unwrap();
}

pub fn run_hostile_links(host: &Host) {
    let outside = host.share().join("outside");
    fs::create_dir_all(&outside).unwrap();
    let volume = host.share().join("volumes/3");
    write_file(&volume.join("f"), "volume");
    let mut spec = host.spec("a", &["cat /data/f", "stat /proc", "pid"]);
    let rootfs = host.share().join("containers/a/rootfs");
    symlink(
        format!("../../../../../../../../..{}", outside.display()),
        rootfs.join("data"),
    )
    .unwrap();
    symlink(&outside, rootfs.join("dev")).unwrap();
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(bind(&volume, "/data", &["rbind"]));
    let outcome = host.run("a", &spec);
    assert_eq!(outcome.of("cat /data/f"), "volume");
    assert_eq!(
        fs::read_dir(&outside).unwrap().count(),
        0,
        "something was made outside"
    );
}

pub fn run_escape(host: &Host) {
    let outcome = host.run("a", &host.spec("a", &["ls /", "escape"]));
    let mut expected: Vec<_> = outcome.of("ls /").split(' ').collect();
    expected.insert(0, "below");
    assert_eq!(
        outcome.of("escape").split(' ').collect::<Vec<_>>(),
        expected
    );
}

pub fn run_copy_up(host: &Host) {
    let lines = [
        "cat /data/deep/f",
        "stat /data/deep/f",
        "stat /data",
        "write /data/new x",
        "write /kept/new x",
        "stat /plain",
    ];
    let mut spec = host.spec("a", &lines);
    let rootfs = host.share().join("containers/a/rootfs");
    write_file(&rootfs.join("data/deep/f"), "copied");
    for (name, mode) in [("data", 0o750), ("plain", 0o711)] {
        fs::create_dir_all(rootfs.join(name)).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(rootfs.join(name), mode).unwrap();
    }
    std::os::unix::fs::chown(rootfs.join("data/deep/f"), Some(5), Some(6)).unwrap();
    write_file(&rootfs.join("kept/f"), "x");
    let tmpfs = |destination: &str, options: &[&str]| json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options});
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(tmpfs("/data", &["tmpcopyup", "size=1m"]));
    mounts.push(tmpfs("/kept", &["tmpcopyup", "ro"]));
    mounts.push(tmpfs("/plain", &[]));
    let outcome = host.run("a", &spec);
    assert_eq!(outcome.of("cat /data/deep/f"), "copied");
    assert_eq!(outcome.of("stat /data/deep/f"), "file 644 5:6 0:0");
    assert_eq!(outcome.of("stat /data"), "directory 750 0:0 0:0");
    assert_eq!(outcome.of("write /data/new x"), "written");
    let readonly = format!("error {}", libc::EROFS);
    assert_eq!(outcome.of("write /kept/new x"), readonly);
    assert_eq!(outcome.of("stat /plain"), "directory 711 0:0 0:0");
    assert!(!rootfs.join("data/new").exists());
}

pub fn run_remount(host: &Host) {
    let mounts = "cat /proc/self/mounts";
    let mut spec = host.spec("a", &[mounts, "write /run/f x"]);
    let remount = |destination: &str, options: &[&str]| json!({"destination": destination, "type": "none", "options": options});
    let asked = spec["mounts"].as_array_mut().unwrap();
    asked.push(remount("/run", &["bind", "remount", "ro", "nodev"]));
    asked.push(remount("/dev/shm", &["remount", "size=8m", "exec"]));
    let outcome = host.run("a", &spec);
    let readonly = format!("error {}", libc::EROFS);
    assert_eq!(outcome.of("write /run/f x"), readonly);
    let found = outcome.of(mounts);
    let line = |target: &str| found.lines().find(|line| line.contains(target)).unwrap();
    assert!(line(" /run ").contains("ro,nosuid,nodev"), "{found}");
    assert!(line(" /dev/shm ").contains("size=8192k"), "{found}");
    assert!(!line(" /dev/shm ").contains("noexec"), "{found}");

    let mut spec = host.spec("a", &["exit 0"]);
    let asked = spec["mounts"].as_array_mut().unwrap();
    asked.push(remount("/payload", &["remount", "ro"]));
    let error = host.create_error("a", &spec);
    assert!(error.contains("cannot remount /payload"), "{error}");
    let sysfs = remount("/sys", &["remount", "size=1"]);
    let last = spec["mounts"].as_array().unwrap().len() - 1;
    spec["mounts"][last] = sysfs;
    let error = host.create_error("a", &spec);
    assert!(error.contains("not the container's alone"), "{error}");
}
