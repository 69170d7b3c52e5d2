//! A pod whose shim is killed, and whose cleaning is killed too. The shim and
//! the `delete` command are this test's own executable, started again in
//! another role. Needs root, mount namespaces and cgroup v2; says SKIP without.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::Instant;

use oci_spec::runtime::Hook;
use rustix::pipe::pipe;
use vmm_config::{Memory, Vcpus};

use super::*;
use crate::host::cgroup::CgroupPath;
use crate::host::cgroup::tests::hierarchy;
use crate::host::children;
use crate::host::install::Opened;
use crate::host::mounts::tests::private_mounts;
use crate::host::mounts::{Access, RootFs};
use crate::host::netns::Network;
use crate::host::pod::{ContainerHooks, ContainerRequest, HostPod};
use crate::host::source::Source;
use crate::host::stand_in;
use crate::host::vm::VmRequest;
use crate::host::volumes::{Below, Wanted};

/// Which part the process plays, and where.
const ROLE: &str = "BULKHEAD_TEST_ROLE";
const BASE: &str = "BULKHEAD_TEST_BASE";

struct Scene {
    base: PathBuf,
    hierarchy: PathBuf,
}

impl Scene {
    fn root(&self) -> PathBuf {
        self.base.join("run")
    }

    fn pod(&self) -> PodPaths {
        PodPaths::below(&self.root(), "default", "pod").expect("plain ids")
    }

    fn cgroup(&self) -> PathBuf {
        self.hierarchy.join(self.cgroup_name())
    }

    /// Named after the directory, which is this test's alone.
    fn cgroup_name(&self) -> String {
        let name = self.base.file_name().expect("has a name");
        format!("bulkhead-test{}", name.to_string_lossy().replace('.', "-"))
    }

    fn cleanup(&self, id: &str) -> Result<Deleted, Error> {
        cleanup(&self.root(), "default", id, Deadline::NONE)
    }

    fn poststop_runs(&self, id: &str) -> usize {
        let log = fs::read_to_string(self.base.join("poststop")).unwrap_or_default();
        log.lines().filter(|line| *line == id).count()
    }

    /// The same executable, in another role of this very test.
    fn start(&self, role: &str) -> Child {
        let test = std::thread::current().name().expect("is a test").to_owned();
        let mut command = Command::new(std::env::current_exe().expect("has a path"));
        command
            .args(["--exact", &test, "--nocapture"])
            .env(ROLE, role)
            .env(BASE, &self.base)
            .stdout(std::process::Stdio::null());
        children::spawn_command(&mut command).expect("starts")
    }

    /// Starts the shim and returns when its pod is complete.
    fn start_shim(&self) -> Child {
        let ready = self.base.join("ready");
        let _ = fs::remove_file(&ready);
        rustix::fs::mkfifoat(rustix::fs::CWD, &ready, 0o600.into()).expect("makes");
        let shim = self.start("shim");
        // Opens when the other side does.
        assert_eq!(fs::read(&ready).expect("reads"), b"ready");
        shim
    }

    fn assert_nothing_left(&self) {
        assert!(!self.pod().directory().exists(), "the pod's directory");
        assert!(!self.cgroup().exists(), "the pod's cgroup");
        let slots = fs::read_dir(self.root().join("uids")).into_iter().flatten();
        assert_eq!(slots.count(), 0, "uid slots");
        let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("table");
        let root = self.root();
        assert!(
            !table.contains(root.to_str().expect("text")),
            "mounts: {table}"
        );
    }
}

/// Plays a role if this process was started for one.
fn play() -> bool {
    let (Some(role), Some(base)) = (std::env::var_os(ROLE), std::env::var_os(BASE)) else {
        return false;
    };
    let scene = Scene {
        base: base.into(),
        hierarchy: hierarchy().expect("was there before"),
    };
    match role.to_str() {
        Some("shim") => play_shim(&scene),
        Some(id) => drop(scene.cleanup(id)),
        None => panic!("unknown role"),
    }
    true
}

fn play_shim(scene: &Scene) {
    let pod = scene.pod();
    let lock = pod.create_and_lock().expect("is free");
    let path = format!("/{}/pod", scene.cgroup_name());
    let path = CgroupPath::for_pod(Some(&path), false, "default", "pod").expect("is a path");
    let mut host = HostPod::create_in(&scene.hierarchy, pod, lock, &path).expect("creates");
    let (_vm_log, listener) = pipe().expect("pipe");
    let program = || {
        let copy = scene.base.join("program");
        let mut source = File::open(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(stand_in::program().expect("program"))
        ))
        .expect("opens");
        let options = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .mode(0o755)
            .clone();
        std::io::copy(&mut source, &mut options.open(&copy).expect("makes")).expect("copies");
        File::open(copy).expect("opens").into()
    };
    let null = || File::open("/dev/null").expect("opens").into();
    let installed = Opened {
        vmm: program(),
        virtiofsd: program(),
        kernel: null(),
        initramfs: null(),
    };
    let request = VmRequest {
        vcpus: Vcpus { boot: 1, max: 1 },
        memory: Memory {
            size_mib: 512,
            max_mib: 512,
        },
        command_line: String::new(),
        vsock_listener: listener,
        console: None,
    };
    let _vm = host
        .start_processes(installed, null(), request)
        .expect("starts");
    host.set_network(&Network::New).expect("makes");
    let mut stand_ins = Vec::new();
    for id in ["pod", "member"] {
        let rootfs = scene.base.join("rootfs");
        host.add_container(ContainerRequest {
            id: id.to_owned(),
            bundle: scene.base.clone(),
            rootfs: RootFs::Premounted(rootfs),
            hooks: hooks(scene, id),
        })
        .expect("adds");
        stand_ins.push(host.start_stand_in(id, None).expect("starts"));
        stand_ins.push(host.start_stand_in(id, Some("exec")).expect("starts"));
        let hooks = host.create_runtime_hooks(id).expect("are noted");
        hooks.run_until_failure().expect("run");
    }
    let volume = Source::open(&scene.base.join("rootfs")).expect("opens");
    host.add_volume(&volume, &Wanted::unmapped(Access::ReadOnly, Below::Now))
        .expect("adds");
    let exit = ExitRecord {
        status: 7,
        exited_at_ns: 8,
    };
    host.record_exit("member", exit).expect("records");
    if let Ok(mut ready) = fs::OpenOptions::new()
        .write(true)
        .open(scene.base.join("ready"))
    {
        std::io::Write::write_all(&mut ready, b"ready").expect("tells");
    }
    loop {
        std::thread::park();
    }
}

fn hooks(scene: &Scene, id: &str) -> ContainerHooks {
    let log = scene.base.join("poststop");
    let hook: Hook = serde_json::from_value(serde_json::json!({
        "path": "/bin/sh",
        "args": ["sh", "-c", format!("echo {id} >>{}", log.display())],
    }))
    .expect("is a hook");
    ContainerHooks {
        poststop: vec![hook],
        oci_version: "1.2.0".to_owned(),
        ..ContainerHooks::default()
    }
}

fn scene(base: &Path) -> Option<Scene> {
    let hierarchy = hierarchy()?;
    fs::create_dir(base.join("rootfs")).expect("makes");
    fs::write(base.join("rootfs/precious"), "x").expect("writes");
    Some(Scene {
        base: base.to_owned(),
        hierarchy,
    })
}

/// Kills as a user would, and waits.
fn kill(mut child: Child) {
    child.kill().expect("kills");
    let status = collect(child);
    assert_eq!(status.signal(), Some(9), "was alive until then");
}

fn collect(mut child: Child) -> ExitStatus {
    let status = child.wait().expect("is collected");
    children::forget(child.id());
    status
}

fn is_alive(process: crate::host::record::Process) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
    process.open().is_some() && !stat.contains(") Z ")
}

#[test]
fn cleanup_of_member_and_pod_touches_what_is_theirs_and_only_after_the_shim() {
    if play() {
        return;
    }
    let Some(base) = private_mounts() else { return };
    let Some(scene) = scene(base.path()) else {
        return;
    };
    let shim = scene.start_shim();
    let record = Record::read(&scene.pod().record())
        .expect("reads")
        .expect("is there");
    let processes = |id: &str| record.containers[id].stand_ins.values().copied();

    for id in ["pod", "member"] {
        let deleted = scene.cleanup(id).expect("reports");
        assert_eq!(deleted.pid, record.containers[id].stand_ins[""].pid);
        assert!(
            processes(id).all(is_alive),
            "a live shim answers for its own"
        );
    }
    kill(shim);

    let deleted = scene.cleanup("member").expect("cleans");
    assert_eq!(deleted.exit.map(|exit| exit.status), Some(7));
    assert!(deleted.members.is_empty());
    assert_eq!(scene.poststop_runs("member"), 1);
    assert!(processes("pod").all(is_alive), "a sibling is left alone");
    assert!(
        scene
            .pod()
            .share()
            .join("containers/pod/rootfs/precious")
            .exists()
    );
    assert!(!scene.pod().share().join("containers/member").exists());
    assert!(
        is_alive(record.monitor.expect("runs")),
        "the VM is the pod's"
    );

    let deleted = scene.cleanup("pod").expect("cleans");
    assert_eq!((deleted.exit, deleted.members.len()), (None, 0));
    assert!(
        processes("pod")
            .chain(processes("member"))
            .all(|process| !is_alive(process))
    );
    assert!(!is_alive(record.monitor.expect("ran")));
    assert_eq!(scene.poststop_runs("pod"), 1);
    scene.assert_nothing_left();
    assert!(base.path().join("rootfs/precious").exists());

    let again = scene.cleanup("pod").expect("is clean");
    assert_eq!((again.pid, again.exit), (0, None));
}

#[test]
fn cleanup_killed_at_any_moment_is_finished_by_the_next() {
    if play() {
        return;
    }
    let Some(base) = private_mounts() else { return };
    let Some(scene) = scene(base.path()) else {
        return;
    };
    for round in 0..4_u32 {
        kill(scene.start_shim());
        // Ever later, so that each step is met by some kill.
        for step in 0..12_u32 {
            let mut delete = scene.start("pod");
            wait_at_most(
                &delete,
                Duration::from_micros(u64::from(step * 700 + round * 170)),
            );
            let _ = delete.kill();
            collect(delete);
        }
        scene.cleanup("pod").expect("finishes");
        scene.assert_nothing_left();
        assert!(scene.poststop_runs("pod") > 0 && scene.poststop_runs("member") > 0);
        assert!(base.path().join("rootfs/precious").exists());
    }
}

#[test]
fn cleanup_after_a_shim_killed_while_it_makes_its_pod_leaves_nothing() {
    if play() {
        return;
    }
    let Some(base) = private_mounts() else { return };
    let Some(scene) = scene(base.path()) else {
        return;
    };
    for step in 0..24_u32 {
        let mut shim = scene.start("shim");
        wait_at_most(&shim, Duration::from_micros(u64::from(step * 1500)));
        let _ = shim.kill();
        collect(shim);
        scene.cleanup("pod").expect("cleans");
        scene.assert_nothing_left();
        assert!(base.path().join("rootfs/precious").exists());
    }
}

/// Lets a process run for a while: the time is the experiment here, nothing is
/// waited for.
fn wait_at_most(child: &Child, time: Duration) {
    let end = Instant::now() + time;
    let alive = PathBuf::from(format!("/proc/{}", child.id()));
    while Instant::now() < end && alive.exists() {
        std::hint::spin_loop();
    }
}

#[test]
fn cleanup_of_what_another_is_cleaning_up_waits_for_the_pod_and_reports_a_member() {
    if play() {
        return;
    }
    let Some(base) = private_mounts() else { return };
    let Some(scene) = scene(base.path()) else {
        return;
    };
    let shim = scene.start_shim();
    assert!(orphans(&scene.root(), "default").is_empty(), "it is alive");
    kill(shim);
    let orphans = orphans(&scene.root(), "default");
    assert_eq!(orphans.len(), 1);

    let lock = scene.pod().lock_existing(LONGEST_WAIT).expect("is free");
    let soon = Deadline::after(Duration::from_millis(100));
    let deleted = cleanup(&scene.root(), "default", "member", soon).expect("reports");
    assert_eq!(deleted.exit.map(|exit| exit.status), Some(7));
    assert!(deleted.pid > 0);
    let soon = Deadline::after(Duration::from_millis(100));
    let error = cleanup(&scene.root(), "default", "pod", soon).expect_err("is another's");
    assert!(matches!(
        error,
        Error::Directory(directory::Error::Held { .. })
    ));
    let swept = orphans[0].remove(Deadline::NONE).expect("looks");
    assert!(swept.is_none() && scene.pod().record().exists());

    drop(lock);
    // Those who waited too long still get the lock, and let go of it.
    let end = Instant::now() + LONGEST_WAIT;
    while orphans[0]
        .remove(Deadline::NONE)
        .expect("removes")
        .is_none()
    {
        assert!(Instant::now() < end, "is free in the end");
    }
    scene.assert_nothing_left();
    assert_eq!(scene.poststop_runs("pod"), 1);
    assert!(
        orphans[0]
            .remove(Deadline::NONE)
            .expect("is gone")
            .is_none()
    );
}

#[test]
fn cleanup_that_runs_out_of_time_is_finished_by_the_next() {
    let root = tempfile::tempdir().expect("directory");
    let pod = PodPaths::below(root.path(), "default", "c").expect("plain ids");
    drop(pod.create_and_lock().expect("is free"));
    let wait = root.path().join("wait");
    fs::write(&wait, "").expect("writes");
    let script = format!("while test -e {}; do sleep 0.01; done", wait.display());
    let hook: Hook = serde_json::from_value(serde_json::json!({
        "path": "/bin/sh", "args": ["sh", "-c", script],
    }))
    .expect("is a hook");
    let container = Container {
        bundle: root.path().to_owned(),
        oci_version: String::new(),
        annotations: std::collections::BTreeMap::new(),
        poststop: vec![hook],
        poststop_due: true,
        stand_ins: std::collections::BTreeMap::new(),
        exit: None,
    };
    let mut record = Record::new();
    record.containers.insert("c".to_owned(), container);
    record.write(&pod.record()).expect("writes");

    let soon = Deadline::after(Duration::from_millis(100));
    cleanup(root.path(), "default", "c", soon).expect_err("has no time");
    assert!(pod.record().exists());
    fs::remove_file(wait).expect("removes");
    let deleted = cleanup(root.path(), "default", "c", Deadline::NONE).expect("finishes");
    assert!(deleted.hook_failures.is_empty());
    assert!(!pod.directory().exists());
}

#[test]
fn cleanup_of_a_pod_tells_of_members_without_an_exit_and_of_no_other() {
    let root = tempfile::tempdir().expect("directory");
    let pod = PodPaths::below(root.path(), "default", "pod").expect("plain ids");
    drop(pod.create_and_lock().expect("is free"));
    let exit = ExitRecord {
        status: 3,
        exited_at_ns: 4,
    };
    let container = |exit| Container {
        bundle: root.path().to_owned(),
        oci_version: String::new(),
        annotations: std::collections::BTreeMap::new(),
        poststop: Vec::new(),
        poststop_due: false,
        stand_ins: [(
            String::new(),
            Process {
                pid: 42,
                start_ticks: u64::MAX,
            },
        )]
        .into(),
        exit,
    };
    let mut record = Record::new();
    for (id, exit) in [("pod", None), ("dead", None), ("ended", Some(exit))] {
        record.containers.insert(id.to_owned(), container(exit));
    }
    record.write(&pod.record()).expect("writes");
    let deleted = cleanup(root.path(), "default", "pod", Deadline::NONE).expect("cleans");
    let id = "dead".to_owned();
    assert_eq!(deleted.members, [Member { id, pid: 42 }]);
}
