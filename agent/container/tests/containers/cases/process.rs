//! The program: its streams, namespaces, identity, privileges and terminal.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use agent_container::ContainerStdio;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use crate::fixture::{Host, pipe, read_until, wait, write_file};

pub fn run_exit_code(host: &Host) {
    let outcome = host.run("a", &host.spec("a", &["exit 42"]));
    assert_eq!(outcome.status.code(), Some(42));
}

pub fn run_streams(host: &Host) {
    // Without close-on-exec, to be found if anything of ours leaked.
    let leak = File::open("/dev/null").unwrap();
    nix::fcntl::fcntl(
        &leak,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
    )
    .unwrap();
    let (stdin, input) = pipe();
    let (output, stdout) = pipe();
    let (_unused, stderr) = pipe();
    let spec = host.spec("a", &["echo-input", "descriptors"]);
    let stdio = ContainerStdio::Streams {
        stdin,
        stdout,
        stderr,
    };
    let container = host.create_with("a", &spec, stdio).unwrap();
    container.init().start().unwrap();
    File::from(input).write_all(b"hello").unwrap();
    let mut text = String::new();
    File::from(output).read_to_string(&mut text).unwrap();
    assert_eq!(text, "== echo-input\nhello\n== descriptors\n3\n");
    wait(container.init().pid());
    container.delete().unwrap();
}

pub fn run_namespaces(host: &Host) {
    let mut spec = host.spec(
        "a",
        &[
            "pid",
            "session",
            "cat /proc/sys/kernel/hostname",
            "cat /proc/sys/kernel/domainname",
            "ls /sys/class/net",
            "cat /proc/1/mountinfo",
            "cat /proc/net/route",
            "syscall 39",
        ],
    );
    spec["hostname"] = json!("inside");
    spec["domainname"] = json!("example.org");
    let before = nix::unistd::gethostname().unwrap();
    let outcome = host.run("a", &spec);
    assert_eq!(outcome.of("pid"), "1");
    assert_eq!(outcome.of("session"), "1");
    assert_eq!(outcome.of("cat /proc/sys/kernel/hostname"), "inside");
    assert_eq!(outcome.of("cat /proc/sys/kernel/domainname"), "example.org");
    assert_eq!(outcome.of("ls /sys/class/net"), "lo");
    // Nothing of the guest's file systems can be seen.
    let mounts = outcome.of("cat /proc/1/mountinfo");
    let foreign = mounts.lines().find(|line| {
        let target = line.split(' ').nth(4).unwrap();
        target != "/"
            && !["/proc", "/dev", "/sys", "/run"]
                .iter()
                .any(|own| target.starts_with(own))
    });
    assert_eq!(foreign, None);
    assert_eq!(nix::unistd::gethostname().unwrap(), before);
}

pub fn run_joined_pid_namespace(host: &Host) {
    let held = host.pod().join("ns/pid");
    let mut init = std::thread::scope(|scope| {
        let spawned = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWPID).unwrap();
            Command::new("sleep").arg("60").spawn().unwrap()
        });
        spawned.join().unwrap()
    });
    let of_init = PathBuf::from(format!("/proc/{}/ns/pid", init.id()));
    let link = fs::read_link(&of_init).unwrap();
    File::create(&held).unwrap();
    let no = None::<&str>;
    mount(Some(&of_init), &held, no, MsFlags::MS_BIND, no).unwrap();

    let hook = json!({"path": "/payload", "args": ["hook", "copy-input /state"]});
    let lines = [
        "cat /proc/1/comm",
        "link /proc/self/ns/pid",
        "link /proc/self",
        "cat /state",
    ];
    let mut spec = host.spec("a", &lines);
    spec["linux"]["namespaces"][0]["path"] = json!(held);
    spec["hooks"] = json!({"startContainer": [hook]});
    let outcome = host.run("a", &spec);
    init.kill().unwrap();
    init.wait().unwrap();
    umount2(&held, MntFlags::MNT_DETACH).unwrap();

    assert_eq!(outcome.of("cat /proc/1/comm"), "sleep");
    assert_eq!(outcome.of("link /proc/self/ns/pid"), link.to_str().unwrap());
    let state: Value = serde_json::from_str(outcome.of("cat /state")).unwrap();
    assert_eq!(state["pid"].to_string(), outcome.of("link /proc/self"));
    assert_ne!(state["pid"], 1);
}

pub fn run_joined_namespaces(host: &Host) {
    // As the agent makes the pod's: held by bind mounts.
    let directory = host.pod().join("ns");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC).unwrap();
            nix::unistd::sethostname("the-pod").unwrap();
            for name in ["uts", "ipc"] {
                let held = directory.join(name);
                File::create(&held).unwrap();
                let own = Path::new("/proc/thread-self/ns").join(name);
                mount(
                    Some(&own),
                    &held,
                    None::<&str>,
                    MsFlags::MS_BIND,
                    None::<&str>,
                )
                .unwrap();
            }
        });
    });
    let mut spec = host.spec(
        "a",
        &["cat /proc/sys/kernel/hostname", "link /proc/self/ns/ipc"],
    );
    for (index, name) in [(1, "ipc"), (2, "uts")] {
        spec["linux"]["namespaces"][index]["path"] = json!(directory.join(name));
    }
    let outcome = host.run("a", &spec);
    let again = host.run("b", &{
        spec["root"]["path"] = json!(host.rootfs("b"));
        spec.clone()
    });
    assert_eq!(outcome.of("cat /proc/sys/kernel/hostname"), "the-pod");
    let link = "link /proc/self/ns/ipc";
    assert_eq!(outcome.of(link), again.of(link));
    assert_ne!(
        outcome.of(link),
        fs::read_link("/proc/self/ns/ipc")
            .unwrap()
            .to_str()
            .unwrap()
    );

    spec["linux"]["namespaces"][1]["path"] = json!(directory.join("uts"));
    let error = host.create_error("a", &spec);
    assert!(error.contains("is not a namespace of type"), "{error}");
    spec["linux"]["namespaces"][1]["path"] = json!("/proc/self/ns/ipc");
    let error = host.create_error("a", &spec);
    assert!(
        error.contains("not below the directories of the pod"),
        "{error}"
    );
    for name in ["uts", "ipc"] {
        umount2(&directory.join(name), MntFlags::MNT_DETACH).unwrap();
    }
}

pub fn run_identity(host: &Host) {
    let mut spec = host.spec(
        "a",
        &[
            "cat /proc/self/status",
            "cat /proc/self/limits",
            "env",
            "cwd",
            "umask",
            "cat /proc/self/oom_score_adj",
        ],
    );
    spec["process"]["user"] = json!({"uid": 0, "gid": 7, "umask": 0o27, "additionalGids": [9, 8]});
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 3, "hard": 5}]);
    spec["process"]["cwd"] = json!("/made/on/the/way");
    spec["process"]["env"] = json!(["A=b", "PATH=/bin"]);
    spec["process"]["oomScoreAdj"] = json!(321);
    spec["process"]["selinuxLabel"] = json!("some-label");
    // Reading a file needs a fourth descriptor.
    spec["process"]["rlimits"][0]["soft"] = json!(4);
    write_file(
        &host.rootfs("a").join("etc/passwd"),
        "root:x:0:0::/home/root:/bin/sh\n",
    );
    let outcome = host.run("a", &spec);
    let status = outcome.of("cat /proc/self/status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':')
            .unwrap()
            .1
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(field("Uid"), "0 0 0 0");
    assert_eq!(field("Gid"), "7 7 7 7");
    assert_eq!(field("Groups"), "8 9");
    assert_eq!(field("NoNewPrivs"), "1");
    // The fourteen of ctr's default, and no inheritable or ambient one.
    for set in ["CapBnd", "CapEff", "CapPrm"] {
        assert_eq!(field(set), "00000000a80425fb", "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    // No signal is blocked or ignored, SIGPIPE included.
    assert_eq!(field("SigBlk"), "0000000000000000");
    assert_eq!(
        field("SigIgn"),
        "0000000000001000",
        "only SIGPIPE, by the payload's own runtime"
    );
    let limits = outcome.of("cat /proc/self/limits");
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    assert_eq!(
        files.split_whitespace().collect::<Vec<_>>()[3..5],
        ["4", "5"]
    );
    assert_eq!(outcome.of("env"), "A=b HOME=/home/root PATH=/bin");
    assert_eq!(outcome.of("cwd"), "/made/on/the/way");
    assert_eq!(outcome.of("umask"), "27");
    assert_eq!(outcome.of("cat /proc/self/oom_score_adj"), "321");
    assert_eq!(
        outcome.warnings,
        ["process.selinuxLabel has no effect in the guest"]
    );
}

pub fn run_without_oom_score(host: &Host) {
    let own = "/proc/self/oom_score_adj";
    let line = "cat /proc/self/oom_score_adj";
    let mut spec = host.spec("a", &[line]);
    spec["process"]
        .as_object_mut()
        .unwrap()
        .remove("oomScoreAdj");
    // In the agent's place; its -1000 takes a privilege that this machine may lack.
    let before = fs::read_to_string(own).unwrap();
    fs::write(own, "500").unwrap();
    let outcome = host.run("a", &spec);
    fs::write(own, before.trim()).unwrap();
    assert_eq!(outcome.of(line), "0");
}

pub fn run_unprivileged(host: &Host) {
    let mut spec = host.spec(
        "a",
        &[
            "cat /proc/self/status",
            "write /dev/stdout via-stdout",
            "append /payload",
        ],
    );
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    spec["process"]["capabilities"] = json!({
        "bounding": ["CAP_NET_BIND_SERVICE", "CAP_KILL"],
        "permitted": ["CAP_NET_BIND_SERVICE"],
        "inheritable": ["CAP_NET_BIND_SERVICE"],
        "effective": ["CAP_NET_BIND_SERVICE"],
        "ambient": ["CAP_NET_BIND_SERVICE", "CAP_KILL"],
    });
    let outcome = host.run("a", &spec);
    let status = outcome.of("cat /proc/self/status");
    for line in [
        "CapInh:\t0000000000000400",
        "CapPrm:\t0000000000000400",
        "CapEff:\t0000000000000400",
        "CapBnd:\t0000000000000420",
        "CapAmb:\t0000000000000400",
    ] {
        assert!(status.contains(line), "{line}: {status}");
    }
    assert!(outcome.output.contains("via-stdout"), "{}", outcome.output);
    assert_eq!(outcome.of("append /payload"), "error 13");
    assert_eq!(
        outcome.warnings,
        ["process.capabilities.ambient: CAP_KILL is not both permitted and inheritable"]
    );
}

pub fn run_search(host: &Host) {
    let mut spec = host.spec("a", &[]);
    let rootfs = host.share().join("containers/a/rootfs");
    for directory in ["private", "bin"] {
        fs::create_dir(rootfs.join(directory)).unwrap();
        fs::copy(
            rootfs.join("payload"),
            rootfs.join(directory).join("program"),
        )
        .unwrap();
    }
    fs::set_permissions(rootfs.join("private"), fs::Permissions::from_mode(0o700)).unwrap();
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    spec["process"]["capabilities"] = json!({});
    spec["process"]["env"] = json!(["PATH=/private:/bin"]);
    spec["process"]["args"] = json!(["program", "link /proc/self/exe"]);
    let outcome = host.run("a", &spec);
    assert_eq!(outcome.of("link /proc/self/exe"), "/bin/program");

    spec["process"]["args"] = json!(["/private/program"]);
    assert_eq!(
        host.create_error("a", &spec),
        "exec: \"/private/program\": stat /private/program: permission denied"
    );
    spec["process"]["env"] = json!(["PATH=/private"]);
    spec["process"]["args"] = json!(["program"]);
    assert_eq!(
        host.create_error("a", &spec),
        "exec: \"program\": executable file not found in $PATH"
    );
}

/// The profile of the `nerdctl` specification.
pub fn profile() -> Value {
    let spec: Value = serde_json::from_str(include_str!("../../testdata/nerdctl.json")).unwrap();
    spec["linux"]["seccomp"].clone()
}

pub fn run_seccomp(host: &Host) {
    let swapoff = format!("syscall {}", libc::SYS_swapoff);
    let lines = [swapoff.as_str(), "syscall 9999", "cat /proc/self/status"];
    let mut spec = host.spec("a", &lines);
    spec["linux"]["seccomp"] = profile();
    let outcome = host.run("a", &spec);
    assert_eq!(outcome.of(&swapoff), format!("error {}", libc::EPERM));
    assert_eq!(
        outcome.of("syscall 9999"),
        format!("error {}", libc::ENOSYS)
    );
    assert!(outcome.of("cat /proc/self/status").contains("Seccomp:\t2"));
}

pub fn run_seccomp_privileged(host: &Host) {
    let mut spec = host.spec("a", &["cat /proc/self/status"]);
    spec["linux"]["seccomp"] = profile();
    spec["process"]["noNewPrivileges"] = json!(false);
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let outcome = host.run("a", &spec);
    let status = outcome.of("cat /proc/self/status");
    assert!(
        status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t0"),
        "{status}"
    );
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
}

pub fn run_sysctl(host: &Host) {
    let key = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let mut spec = host.spec("a", &[key, "cat /proc/sys/kernel/shmmax"]);
    spec["linux"]["sysctl"] =
        json!({"net.ipv4.ip_unprivileged_port_start": "17", "kernel.shmmax": "65536"});
    let outcome = host.run("a", &spec);
    assert_eq!(outcome.of(key), "17");
    assert_eq!(outcome.of("cat /proc/sys/kernel/shmmax"), "65536");
    assert_ne!(
        fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap(),
        "17\n"
    );
    spec["linux"]["sysctl"] = json!({"net.no.such": "1"});
    let error = host.create_error("a", &spec);
    assert!(error.contains("cannot set sysctl net.no.such"), "{error}");
}

pub fn run_terminal(host: &Host) {
    let mut spec = host.spec(
        "a",
        &["terminal", "stat /dev/console", "write /dev/tty to-the-tty"],
    );
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"height": 33, "width": 101});
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    spec["process"]["args"]
        .as_array_mut()
        .unwrap()
        .push(json!("exit 5"));
    let container = host
        .create_with("a", &spec, ContainerStdio::Terminal)
        .unwrap();
    let mut console = File::from(container.init().take_console().unwrap());
    assert!(container.init().take_console().is_none());
    container.init().start().unwrap();
    let output = read_until(&mut console, "to-the-tty");
    assert!(output.contains("== terminal\r\n1 33x101\r\n"), "{output}");
    assert!(
        output.contains("== stat /dev/console\r\ndevice 620 1000:"),
        "{output}"
    );
    assert_eq!(wait(container.init().pid()).code(), Some(5));
    container.delete().unwrap();

    let error = host.create_error("a", &spec);
    assert!(error.starts_with("process.terminal is true"), "{error}");
}
