//! A container in a user namespace of its own.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use agent_container::ContainerStdio;
use serde_json::{Value, json};

use super::exec::end;
use crate::fixture::{Host, read_until, wait, write_file};

/// The first id of the guest's that the container has.
const BASE: u32 = 200_000;

/// Asks for a user namespace with 65536 ids.
pub fn map(spec: &mut Value) {
    let maps = json!([{"containerID": 0, "hostID": BASE, "size": 65536}]);
    spec["linux"]["uidMappings"] = maps.clone();
    spec["linux"]["gidMappings"] = maps;
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
}

/// Hands a root file system to the container's root, as a snapshotter does.
fn own(rootfs: &Path) {
    chown(rootfs, Some(BASE), Some(BASE)).unwrap();
    for entry in fs::read_dir(rootfs).unwrap() {
        chown(entry.unwrap().path(), Some(BASE), Some(BASE)).unwrap();
    }
}

fn spec(host: &Host, lines: &[&str]) -> Value {
    let mut spec = host.spec("a", lines);
    own(&host.share().join("containers/a/rootfs"));
    map(&mut spec);
    spec
}

fn cgroup_mount() -> Value {
    json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
           "options": ["nosuid", "noexec", "nodev", "relatime"]})
}

pub fn run_files(host: &Host) {
    let lines = [
        "cat /proc/self/uid_map",
        "cat /proc/self/gid_map",
        "cat /proc/self/setgroups",
        "cat /proc/self/mounts",
        "cat /proc/sys/kernel/hostname",
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start",
        "stat /payload",
        "stat /dev",
        "stat /dev/null",
        "stat /dev/net/tun",
        "read /dev/zero 16",
        "write /dev/null x",
        "link /dev/fd",
        "ls /dev/mqueue",
        "stat /sys/class",
        "write /run/f x",
        "stat /run/f",
        "write /made x",
        "mknod /dev/mine 1 5",
        "mkdir /sys/fs/cgroup/sub",
        "cat /secret",
        "ls /hidden",
        "append /proc/sys/kernel/hostname",
        "ls /sys/class/net",
    ];
    let mut spec = spec(host, &lines);
    let rootfs = host.share().join("containers/a/rootfs");
    write_file(&rootfs.join("secret"), "secret");
    write_file(&rootfs.join("hidden/f"), "secret");
    spec["hostname"] = json!("mapped");
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "17"});
    spec["linux"]["devices"] = json!([{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o640, "uid": 3, "gid": 4}]);
    let masked = spec["linux"]["maskedPaths"].as_array_mut().unwrap();
    masked.extend([json!("/secret"), json!("/hidden")]);
    spec["mounts"].as_array_mut().unwrap().push(cgroup_mount());
    let outcome = host.run("a", &spec);
    let words = |line: &str| {
        outcome
            .of(line)
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(words(lines[0]), "0 200000 65536");
    assert_eq!(words(lines[1]), "0 200000 65536");
    assert_eq!(outcome.of("cat /proc/self/setgroups"), "allow");
    assert_eq!(outcome.of(lines[4]), "mapped");
    assert_eq!(outcome.of(lines[5]), "17");
    assert!(
        outcome.of("stat /payload").ends_with(" 0:0 0:0"),
        "{}",
        outcome.output
    );
    assert_eq!(outcome.of("stat /dev"), "directory 755 0:0 0:0");
    assert_eq!(outcome.of("stat /dev/null"), "device 666 0:0 1:3");
    assert_eq!(outcome.of("stat /dev/net/tun"), "device 640 3:4 10:200");
    assert_eq!(outcome.of("read /dev/zero 16"), "16 bytes");
    assert_eq!(outcome.of("write /dev/null x"), "written");
    assert_eq!(outcome.of("link /dev/fd"), "/proc/self/fd");
    assert_eq!(outcome.of("ls /dev/mqueue"), "");
    assert_eq!(outcome.of("write /run/f x"), "written");
    assert_eq!(outcome.of("stat /run/f"), "file 644 0:0 0:0");
    assert_eq!(outcome.of("write /made x"), "written");
    assert_eq!(
        outcome.of("mknod /dev/mine 1 5"),
        format!("error {}", libc::EPERM)
    );
    assert_eq!(outcome.of("mkdir /sys/fs/cgroup/sub"), "made");
    assert_eq!(outcome.of("cat /secret"), "");
    assert_eq!(outcome.of("ls /hidden"), "");
    assert_eq!(
        outcome.of("append /proc/sys/kernel/hostname"),
        format!("error {}", libc::EACCES)
    );
    assert_eq!(outcome.of("ls /sys/class/net"), "lo");
    let mounts = outcome.of("cat /proc/self/mounts");
    for expected in [
        "proc /proc proc rw,nosuid,nodev,noexec,relatime 0 0",
        "tmpfs /dev tmpfs rw,nosuid,size=65536k,mode=755",
        "devpts /dev/pts devpts rw,nosuid,noexec,relatime",
        "mqueue /dev/mqueue mqueue rw,nosuid,nodev,noexec,relatime",
        "sysfs /sys sysfs ro,nosuid,nodev,noexec,relatime",
    ] {
        assert!(mounts.contains(expected), "{expected}: {mounts}");
    }
    // What it made belongs, outside, to what its root is there.
    let made = fs::metadata(rootfs.join("made")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), BASE);
}

pub fn run_identity(host: &Host) {
    let lines = [
        "cat /proc/self/status",
        "cat /proc/self/limits",
        "cat /proc/self/oom_score_adj",
        "write /dev/stdout via-stdout",
        "sleep",
    ];
    let mut spec = spec(host, &lines);
    spec["process"]["user"] = json!({"uid": 1000, "gid": 7, "additionalGids": [9, 8]});
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_MSGQUEUE", "soft": 1000, "hard": 2000}]);
    spec["process"]["oomScoreAdj"] = json!(55);
    let (container, mut reader) = host.create("a", &spec).unwrap();
    container.init().start().unwrap();
    let output = read_until(&mut reader, "via-stdout");
    assert!(output.contains("Uid:\t1000\t1000\t1000\t1000"), "{output}");
    assert!(output.contains("Gid:\t7\t7\t7\t7"), "{output}");
    assert!(output.contains("Groups:\t8 9"), "{output}");
    assert!(output.contains("oom_score_adj\n55\n"), "{output}");
    let limit = output
        .lines()
        .find(|line| line.starts_with("Max msgqueue size"));
    let limit: Vec<_> = limit.unwrap().split_whitespace().collect();
    assert_eq!(limit[3..5], ["1000", "2000"]);

    // An exec joins, as another user, with streams of its own.
    let user = "link /proc/self/ns/user";
    let lines = [
        user,
        "cat /proc/self/uid_map",
        "write /dev/stdout again",
        "cat /proc/self/status",
    ];
    let mut process = Host::process(&spec, &lines);
    process["user"] = json!({"uid": 33, "gid": 33});
    let outcome = Host::run_exec(&container, &process);
    let of_init = fs::read_link(format!("/proc/{}/ns/user", container.init().pid())).unwrap();
    assert_eq!(outcome.of(user), of_init.to_str().unwrap());
    assert!(outcome.output.contains("again"), "{}", outcome.output);
    assert!(outcome.of("cat /proc/self/status").contains("Uid:\t33\t33"));

    process["user"] = json!({"uid": 65536, "gid": 0});
    let refused = Host::exec(&container, &process).err().unwrap().to_string();
    assert_eq!(
        refused,
        "process.user.uid: 65536 is not mapped by linux.uidMappings"
    );
    end(&container);
}

pub fn run_terminal(host: &Host) {
    let mut spec = spec(
        host,
        &[
            "terminal",
            "stat /dev/console",
            "write /dev/tty to-the-tty",
            "sleep",
        ],
    );
    spec["process"]["terminal"] = json!(true);
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let container = host
        .create_with("a", &spec, ContainerStdio::Terminal)
        .unwrap();
    let mut console = File::from(container.init().take_console().unwrap());
    container.init().start().unwrap();
    let output = read_until(&mut console, "to-the-tty");
    assert!(output.contains("== terminal\r\n1 "), "{output}");
    assert!(
        output.contains("== stat /dev/console\r\ndevice 620 1000:"),
        "{output}"
    );
    let mut process = Host::process(&spec, &["terminal", "write /dev/tty again"]);
    process["terminal"] = json!(true);
    let process = agent_container::parse_process(process.to_string().as_bytes()).unwrap();
    let (exec, _) = container.exec(&process, ContainerStdio::Terminal).unwrap();
    let mut console = File::from(exec.take_console().unwrap());
    exec.start().unwrap();
    let output = read_until(&mut console, "again");
    assert!(output.contains("== terminal\r\n1 "), "{output}");
    wait(exec.pid());
    end(&container);
}

pub fn create_refusals(host: &Host) {
    let whole = spec(host, &["exit 0"]);
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut spec = whole.clone();
        change(&mut spec);
        host.create_error("a", &spec)
    };
    let error = refused(&|spec| spec["linux"]["uidMappings"][0]["containerID"] = json!(1));
    assert_eq!(
        error,
        "linux.uidMappings: container id 0, which sets the container up, is not mapped"
    );
    let error = refused(&|spec| spec["process"]["user"]["gid"] = json!(65536));
    assert_eq!(
        error,
        "process.user.gid: 65536 is not mapped by linux.gidMappings"
    );
    // The kernel's word: a range that is mapped twice.
    let error = refused(&|spec| {
        let twice = json!([{"containerID": 0, "hostID": BASE, "size": 2},
                           {"containerID": 1, "hostID": BASE + 5, "size": 1}]);
        spec["linux"]["gidMappings"] = twice;
    });
    assert!(
        error.starts_with("cannot map the user namespace's ids"),
        "{error}"
    );
    // What the process outside of it cannot do is told as well.
    let error = refused(&|spec| spec["linux"]["sysctl"] = json!({"net.no.such": "1"}));
    assert!(
        error.starts_with("cannot set sysctl net.no.such"),
        "{error}"
    );
}

pub fn run_idmapped_mounts(host: &Host) {
    // A tmpfs, whatever this machine's files are on.
    let volume = host.share().join("volumes/mapped");
    fs::create_dir_all(&volume).unwrap();
    nix::mount::mount(
        None::<&str>,
        &volume,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    write_file(&volume.join("f"), "x");
    chown(volume.join("f"), Some(5), Some(6)).unwrap();
    let lines = [
        "stat /own/f",
        "stat /plain/f",
        "stat /containers/f",
        "stat /new",
    ];
    let mut spec = spec(host, &lines);
    let maps = json!([{"containerID": 0, "hostID": BASE + 100, "size": 50}]);
    let bind = |destination: &str, options: Value| json!({"destination": destination, "type": "bind", "source": volume, "options": options});
    let mut own = bind("/own", json!(["rbind", "ridmap"]));
    own["uidMappings"] = maps.clone();
    own["gidMappings"] = maps.clone();
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(own);
    mounts.push(bind("/plain", json!(["rbind"])));
    mounts.push(bind("/containers", json!(["rbind", "idmap"])));
    let outcome = host.run("a", &spec);
    assert_eq!(outcome.of("stat /own/f"), "file 644 105:106 0:0");
    assert_eq!(outcome.of("stat /plain/f"), "file 644 65534:65534 0:0");
    assert_eq!(outcome.of("stat /containers/f"), "file 644 5:6 0:0");

    // Without a user namespace, and on a file system of the container's own.
    let mut spec = host.spec("a", &["write /new/f x", "stat /new/f"]);
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1001});
    spec["process"]["capabilities"] = json!({});
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/new", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"],
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
        "gidMappings": [{"containerID": 0, "hostID": 1001, "size": 1}],
    }));
    let outcome = host.run("a", &spec);
    assert_eq!(
        outcome.of("write /new/f x"),
        "written",
        "{}",
        outcome.output
    );
    assert_eq!(outcome.of("stat /new/f"), "file 644 1000:1001 0:0");

    // proc cannot.
    spec["mounts"][0]["options"] = json!(["idmap"]);
    spec["mounts"][0]["uidMappings"] = maps.clone();
    spec["mounts"][0]["gidMappings"] = maps;
    let error = host.create_error("a", &spec);
    assert!(error.contains("cannot map ids (idmap)"), "{error}");
    nix::mount::umount2(&volume, nix::mount::MntFlags::MNT_DETACH).unwrap();
    let mut left = String::new();
    File::open("/proc/self/mountinfo")
        .unwrap()
        .read_to_string(&mut left)
        .unwrap();
    assert!(!left.contains("volumes/mapped"));
}

/// Namespaces as a pod with a user namespace has them, held by bind mounts.
struct Pod {
    holder: Child,
    directory: PathBuf,
}

const OWNED: [(&str, &str); 5] = [
    ("user", "user"),
    ("network", "net"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("pid", "pid"),
];

impl Pod {
    fn new(host: &Host) -> Self {
        let mut holder = Command::new("unshare")
            .args(["--user", "--net", "--ipc", "--uts", "--pid", "--fork"])
            .args(["--kill-child", "sh", "-c", "echo there; exec sleep 1000"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut there = [0; 6];
        let mut output = holder.stdout.take().unwrap();
        output.read_exact(&mut there).unwrap();
        for file in ["uid_map", "gid_map"] {
            let map = format!("/proc/{}/{file}", holder.id());
            fs::write(map, format!("0 {BASE} 65536")).unwrap();
        }
        let directory = host.pod().join("ns");
        for (_, name) in OWNED {
            File::create(directory.join(name)).unwrap();
            let suffix = if name == "pid" { "_for_children" } else { "" };
            let source = format!("/proc/{}/ns/{name}{suffix}", holder.id());
            let no = None::<&str>;
            let bind = nix::mount::MsFlags::MS_BIND;
            nix::mount::mount(Some(source.as_str()), &directory.join(name), no, bind, no).unwrap();
        }
        Self { holder, directory }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        for (_, name) in OWNED {
            let _ =
                nix::mount::umount2(&self.directory.join(name), nix::mount::MntFlags::MNT_DETACH);
            let _ = fs::remove_file(self.directory.join(name));
        }
    }
}

pub fn run_in_the_pods(host: &Host) {
    let pod = Pod::new(host);
    let lines = [
        "cat /proc/self/uid_map",
        "link /proc/self/ns/user",
        "cat /proc/1/comm",
        "cat /proc/sys/kernel/hostname",
        "write /proc/sys/net/ipv4/ip_forward 1",
        "write /made x",
        "ls /sys/class/net",
        "cat /proc/sys/kernel/shmmni",
        "cat /proc/sys/fs/mqueue/msg_max",
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start",
        "write /dev/stdout all-told",
        "sleep",
    ];
    let mut spec = spec(host, &lines);
    spec["hostname"] = json!("owned");
    spec["linux"]["sysctl"] = json!({
        "kernel.shmmni": "77",
        "fs.mqueue.msg_max": "9",
        "net.ipv4.ip_unprivileged_port_start": "17",
    });
    spec["linux"]["readonlyPaths"] = json!([]);
    for set in ["bounding", "effective", "permitted"] {
        let set = spec["process"]["capabilities"][set].as_array_mut().unwrap();
        set.push(json!("CAP_NET_ADMIN"));
    }
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    for namespace in namespaces.iter_mut() {
        let kind = namespace["type"].as_str().unwrap().to_owned();
        if let Some((_, name)) = OWNED.iter().find(|(owned, _)| *owned == kind) {
            namespace["path"] = json!(pod.directory.join(name));
        }
    }
    let user = format!("/proc/{}/ns/user", pod.holder.id());
    let user = fs::read_link(user).unwrap();
    let user = user.to_str().unwrap();

    let (container, mut reader) = host.create("a", &spec).unwrap();
    container.init().start().unwrap();
    let output = read_until(&mut reader, "all-told");
    let of = |line: &str| {
        let mut lines = output
            .lines()
            .skip_while(|one| *one != format!("== {line}"));
        lines.nth(1).unwrap_or_default().trim().to_owned()
    };
    let words = of(lines[0]);
    let words: Vec<_> = words.split_whitespace().collect();
    assert_eq!(words, ["0", "200000", "65536"], "{output}");
    assert_eq!(of(lines[1]), user);
    assert_eq!(of(lines[2]), "sleep");
    assert_eq!(of(lines[3]), "owned");
    // Its root is that of the pod's network, which another user namespace owned before.
    assert_eq!(of(lines[4]), "written", "{output}");
    assert_eq!(of(lines[5]), "written");
    assert_eq!(of(lines[6]), "lo");
    assert_eq!(of(lines[7]), "77", "{output}");
    assert_eq!(of(lines[8]), "9");
    assert_eq!(of(lines[9]), "17");

    // Execs and containers are in the same one: they may look into each other.
    let process = Host::process(&spec, &["link /proc/self/ns/user", "cat /proc/1/environ"]);
    let outcome = Host::run_exec(&container, &process);
    assert_eq!(outcome.of("link /proc/self/ns/user"), user);
    let pid = container.init().pid();
    let inner = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let inner = inner.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let inner = inner.unwrap().split_whitespace().last().unwrap();
    let look = format!("link /proc/{inner}/root");
    let mut other = spec.clone();
    other["root"]["path"] = json!(host.rootfs("b"));
    own(&host.share().join("containers/b/rootfs"));
    other["process"]["args"] = json!(["/payload", look]);
    other["linux"]["cgroupsPath"] = json!("group/b");
    let outcome = host.run("b", &other);
    assert_eq!(outcome.of(&look), "/", "{}", outcome.output);
    end(&container);
}
