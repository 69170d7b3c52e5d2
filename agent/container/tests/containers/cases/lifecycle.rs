//! Creating, starting, signalling and deleting, above all when it goes wrong.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;

use agent_container::{CreateError, ExecError, StartError};
use serde_json::{Value, json};

use crate::fixture::{Host, pids, read_until, wait};

pub fn create_missing_program(host: &Host) {
    let mut spec = host.spec("a", &[]);
    for (program, expected) in [
        (
            "no-such",
            "exec: \"no-such\": executable file not found in $PATH",
        ),
        (
            "/no/such",
            "exec: \"/no/such\": stat /no/such: no such file or directory",
        ),
        (
            "/proc/version",
            "exec: \"/proc/version\": permission denied",
        ),
    ] {
        spec["process"]["args"] = json!([program]);
        assert_eq!(host.create_error("a", &spec), expected);
    }
}

pub fn start_unusable_program(host: &Host) {
    let spec = host.spec("a", &[]);
    let program = host.share().join("containers/a/rootfs/payload");
    for (text, expected) in [
        ("no program at all", "exec /payload: exec format error"),
        (
            "#!/no/interpreter\n",
            "exec /payload: no such file or directory",
        ),
    ] {
        fs::write(&program, text).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let (container, _reader) = host.create("a", &spec).unwrap();
        let error = container.init().start().unwrap_err();
        assert_eq!(error.to_string(), expected);
        assert!(matches!(
            container.init().start(),
            Err(StartError::AlreadyStarted { .. })
        ));
        assert_eq!(wait(container.init().pid()).code(), Some(1));
        container.delete().unwrap();
    }
}

pub fn create_failures(host: &Host) {
    let mut spec = host.spec("a", &["exit 0"]);
    let good = spec.clone();
    let mut fails = |pointer: &str, value: Value, expected: &str| {
        *spec.pointer_mut(pointer).unwrap() = value;
        let error = host.create_error("a", &spec);
        assert!(error.contains(expected), "{pointer}: {error}");
        spec = good.clone();
        host.assert_clean();
    };
    fails(
        "/root/path",
        json!("/nowhere"),
        "cannot open root file system /nowhere",
    );
    fails(
        "/mounts/1/options",
        json!(["size=nonsense"]),
        "cannot mount tmpfs at /dev",
    );
    fails(
        "/mounts/1/destination",
        json!("/payload"),
        "cannot make mount point /payload",
    );
    fails(
        "/mounts/6/destination",
        json!("/proc/self"),
        "it is inside /proc",
    );
    fails(
        "/process/cwd",
        json!("/payload/x"),
        "working directory /payload/x",
    );
    fails("/process/args", json!(["/pay\u{0}load"]), "");
    fails(
        "/linux/resources",
        json!({"unified": {"no.such": "1"}}),
        "cannot write \"1\" to",
    );
}

pub fn create_taken_cgroup(host: &Host) {
    let spec = host.spec("a", &["sleep"]);
    let (container, _reader) = host.create("a", &spec).unwrap();
    container.init().start().unwrap();
    match host.create("a", &spec) {
        Err(CreateError::Cgroup(error)) => assert!(error.to_string().ends_with("exists already")),
        other => panic!("{other:?}"),
    }
    assert_eq!(pids(&container, 1), [container.init().pid()]);
    container.delete().unwrap();
    assert_eq!(wait(container.init().pid()).signal(), Some(libc::SIGKILL));
}

pub fn signal_processes(host: &Host) {
    let (container, mut reader) = host
        .create("a", &host.spec("a", &["fork-forever 2", "sleep"]))
        .unwrap();
    container.init().start().unwrap();
    read_until(&mut reader, "forked");
    assert_eq!(pids(&container, 3).len(), 3);
    assert!(container.init().signal(0).is_ok());
    assert!(container.init().signal(9999).is_err());
    // Nobody's init dies of a signal that it does not handle, but its children do.
    container.signal_all(libc::SIGTERM).unwrap();
    container.init().signal(libc::SIGTERM).unwrap();
    container.signal_all(libc::SIGKILL).unwrap();
    assert_eq!(wait(container.init().pid()).signal(), Some(libc::SIGKILL));
    assert!(matches!(
        container.init().signal(libc::SIGTERM),
        Err(agent_container::SignalError::Ended { .. })
    ));
    container.delete().unwrap();
    assert!(container.pids().unwrap().is_empty());
}

pub fn start_that_hangs(host: &Host) {
    let (container, _reader) = host.create("a", &host.spec("a", &["sleep"])).unwrap();
    let init = container.init();
    // As one whose program's file does not come: it takes the order and never acts.
    init.signal(libc::SIGSTOP).unwrap();
    std::thread::scope(|scope| {
        let started = scope.spawn(|| init.start());
        init.signal(0).unwrap();
        assert_eq!(pids(&container, 1), [init.pid()]);
        container.delete().unwrap();
        // That it was killed, its exit tells; or the deletion was first.
        let started = started.join().unwrap();
        assert!(matches!(
            started,
            Ok(()) | Err(StartError::AlreadyStarted { .. } | StartError::Ended { .. })
        ));
    });
    assert_eq!(wait(init.pid()).signal(), Some(libc::SIGKILL));
}

pub fn container_binds(host: &Host) {
    let volume = host.share().join("volumes/0");
    fs::create_dir_all(&volume).unwrap();
    let mut spec = host.spec("a", &["exit 0"]);
    spec["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/data", "type": "bind", "source": volume, "options": ["rbind"]}),
    );
    let (container, _reader) = host.create("a", &spec).unwrap();
    assert_eq!(container.bind_sources(), [volume]);
    assert_eq!(container.root(), host.share().join("containers/a/rootfs"));
    container.delete().unwrap();
    wait(container.init().pid());
}

pub fn delete_everything(host: &Host) {
    let mut spec = host.spec("a", &["fork-forever 30", "sleep"]);
    if host.has_controller("pids") {
        spec["linux"]["resources"]["pids"] = json!({"limit": 64});
    }
    let (container, mut reader) = host.create("a", &spec).unwrap();
    container.init().start().unwrap();
    read_until(&mut reader, "forked");
    container.delete().unwrap();
    container.delete().unwrap();
    container.signal_all(libc::SIGKILL).unwrap();
    container.signal_all(libc::SIGTERM).unwrap();
    // Every writer is gone.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert_eq!(wait(container.init().pid()).signal(), Some(libc::SIGKILL));
}

pub fn delete_never_started(host: &Host) {
    let (container, mut reader) = host.create("a", &host.spec("a", &["exit 0"])).unwrap();
    container.delete().unwrap();
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert_eq!(wait(container.init().pid()).signal(), Some(libc::SIGKILL));
    let (container, mut reader) = host.create("b", &host.spec("b", &["exit 0"])).unwrap();
    let pid = container.init().pid();
    drop(container);
    wait(pid);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    // Its cgroup outlives a container that was dropped instead of deleted.
    fs::remove_dir(host.cgroup_root.join("group/b")).unwrap();
    fs::remove_dir(host.cgroup_root.join("group")).unwrap();
}

pub fn pause_and_resume(host: &Host) {
    let mut spec = host.spec("a", &["count", "sleep"]);
    spec["process"]["args"] = json!(["/payload", "count"]);
    let (container, mut reader) = host.create("a", &spec).unwrap();
    container.init().start().unwrap();
    read_until(&mut reader, "1\n");
    assert!(!container.is_paused().unwrap());
    container.pause().unwrap();
    container.pause().unwrap();
    assert!(container.is_paused().unwrap());
    // Once it has printed what it was about to, nothing more comes.
    let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
    nix::fcntl::fcntl(&reader, flags).unwrap();
    let mut rest = Vec::new();
    let blocked = reader.read_to_end(&mut rest).unwrap_err();
    assert_eq!(blocked.kind(), std::io::ErrorKind::WouldBlock);
    let events = host.cgroup_root.join("group/a/cgroup.events");
    let events = fs::read_to_string(events).unwrap();
    assert!(events.contains("frozen 1"), "{events}");
    assert!(reader.read(&mut [0]).is_err());
    let exec = Host::exec(&container, &Host::process(&spec, &["exit 0"]));
    assert!(matches!(exec, Err(ExecError::Paused)));

    container.resume().unwrap();
    container.resume().unwrap();
    let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty());
    nix::fcntl::fcntl(&reader, flags).unwrap();
    read_until(&mut reader, "\n");
    // What is paused can be killed.
    container.pause().unwrap();
    container.init().signal(libc::SIGKILL).unwrap();
    assert_eq!(wait(container.init().pid()).signal(), Some(libc::SIGKILL));
    container.delete().unwrap();

    let (container, mut reader) = host.create("a", &spec).unwrap();
    container.init().start().unwrap();
    read_until(&mut reader, "1\n");
    container.pause().unwrap();
    container.delete().unwrap();
    assert_eq!(wait(container.init().pid()).signal(), Some(libc::SIGKILL));
    assert!(!container.is_paused().unwrap());
}
