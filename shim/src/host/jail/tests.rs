//! What `/proc` says of jailed processes. They need root and a cgroup v2
//! hierarchy, and say SKIP without.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, open};

use super::*;
use crate::host::{children, stand_in};

/// The uid of jails that have one of their own.
const UID: u32 = 2_000_000_007;

/// A directory that is removed when a test ends, whichever way.
struct Cgroup(PathBuf);

impl Cgroup {
    fn make(name: &str) -> Option<Self> {
        let root = crate::host::cgroup::tests::hierarchy()?;
        let path = root.join(format!("bulkhead-test-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a cgroup can be made");
        Some(Self(path))
    }

    fn open(&self) -> OwnedFd {
        open(&self.0, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).expect("opens")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        fs::remove_dir(&self.0).expect("no process is left in the cgroup");
    }
}

/// A running jail, killed when a test ends.
struct Running(Jailed);

impl Running {
    fn status(&self) -> BTreeMap<String, String> {
        fs::read_to_string(format!("/proc/{}/status", self.0.pid))
            .expect("the process runs")
            .lines()
            .filter_map(|line| line.split_once(":\t"))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.0.pid))
    }

    fn entries(&self, name: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.path(name))
            .expect("can be listed")
            .map(|entry| {
                entry
                    .expect("entry")
                    .file_name()
                    .into_string()
                    .expect("text")
            })
            .collect();
        names.sort();
        names
    }

    fn shares_namespace(&self, name: &str) -> bool {
        fs::read_link(self.path("ns").join(name)).expect("theirs")
            == fs::read_link(PathBuf::from("/proc/self/ns").join(name)).expect("ours")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        children::kill_and_reap(self.0.pid, self.0.pidfd.as_fd());
    }
}

fn jail<'a>(root: Root<'a>, cgroup: BorrowedFd<'a>) -> Jail<'a> {
    Jail {
        name: "test",
        program: stand_in::program().expect("program").as_fd(),
        arguments: &[],
        descriptors: &[],
        root,
        network: Network::None,
        pids: Pids::Own,
        uid: UID,
        gid: UID,
        capabilities: Capabilities::NONE,
        open_files: 64,
        cgroup,
    }
}

#[test]
fn launch_with_an_empty_root_leaves_nothing_to_reach() {
    let Some(cgroup) = Cgroup::make("empty") else {
        return;
    };
    let directory = cgroup.open();
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).expect("null");
    let arguments = ["a name".as_ref(), "of its own".as_ref()];
    let descriptors = [(null.as_fd(), 0), (null.as_fd(), 3)];
    let running = Running(
        launch(&Jail {
            arguments: &arguments,
            descriptors: &descriptors,
            ..jail(Root::Empty, directory.as_fd())
        })
        .expect("starts"),
    );

    let status = running.status();
    for capabilities in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[capabilities], "0000000000000000", "{capabilities}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    assert_eq!(status["Uid"], format!("{UID}\t{UID}\t{UID}\t{UID}"));
    assert_eq!(status["Gid"], format!("{UID}\t{UID}\t{UID}\t{UID}"));
    assert_eq!(status["Groups"].trim(), "");
    assert_eq!(status["NSpid"].split('\t').nth(1), Some("1"));
    for signals in ["SigBlk", "SigIgn", "SigCgt"] {
        assert_eq!(status[signals], "0000000000000000", "{signals}");
    }
    assert_eq!(running.entries("root"), Vec::<String>::new());
    assert_eq!(running.entries("fd"), ["0", "3"]);
    for namespace in ["mnt", "pid", "ipc", "uts", "net", "cgroup"] {
        assert!(!running.shares_namespace(namespace), "{namespace}");
    }
    let mounts = fs::read_to_string(running.path("mountinfo")).expect("mounts");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / / ro,nosuid,nodev,noexec"), "{mounts}");
    let limits = fs::read_to_string(running.path("limits")).expect("limits");
    assert!(
        limits.contains("Max core file size        0                    0"),
        "{limits}"
    );
    assert!(
        limits.contains("Max open files            64                   64"),
        "{limits}"
    );
    assert_eq!(fs::read(running.path("environ")).expect("environment"), b"");
    assert_eq!(
        fs::read(running.path("cmdline")).expect("argv"),
        b"a name\0of its own\0"
    );
    let procs = fs::read_to_string(cgroup.0.join("cgroup.procs")).expect("members");
    assert_eq!(procs.trim(), running.0.pid.to_string());
}

#[test]
fn launch_with_capabilities_as_root_keeps_only_these() {
    let Some(cgroup) = Cgroup::make("capabilities") else {
        return;
    };
    let directory = cgroup.open();
    let kept = Capabilities::of(&[Capability::Chown, Capability::Setfcap]);
    let running = Running(
        launch(&Jail {
            uid: 0,
            gid: 0,
            capabilities: kept,
            ..jail(Root::Empty, directory.as_fd())
        })
        .expect("starts"),
    );
    let status = running.status();
    for capabilities in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(
            status[capabilities],
            format!("{:016x}", kept.bits()),
            "{capabilities}"
        );
    }
}

#[test]
fn launch_of_what_cannot_execute_names_the_step_and_leaves_no_process() {
    let Some(cgroup) = Cgroup::make("noexec") else {
        return;
    };
    let directory = cgroup.open();
    let text = open(
        "/etc/passwd",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .expect("opens");
    let error = launch(&Jail {
        program: text.as_fd(),
        ..jail(Root::Empty, directory.as_fd())
    })
    .expect_err("a text file is no program");
    assert!(
        matches!(&error, Error::Child { step: Step::Execute, source, .. }
            if source.raw_os_error() == Some(libc::EACCES)),
        "{error:?}"
    );
    let procs = fs::read_to_string(cgroup.0.join("cgroup.procs")).expect("members");
    assert_eq!(procs, "");
}

#[test]
fn launch_in_a_root_that_is_no_mount_names_the_step() {
    let Some(cgroup) = Cgroup::make("pivot") else {
        return;
    };
    let directory = cgroup.open();
    let plain = tempfile::tempdir().expect("directory");
    let error = launch(&jail(Root::Directory(plain.path()), directory.as_fd()))
        .expect_err("no mount, no root");
    assert!(
        matches!(
            error,
            Error::Child {
                step: Step::PivotRoot,
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn launch_with_descriptors_at_each_others_numbers_places_them_right() {
    let Some(cgroup) = Cgroup::make("fds") else {
        return;
    };
    let directory = cgroup.open();
    let zero = open("/dev/zero", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).expect("zero");
    let null = open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).expect("null");
    let descriptors = [
        (zero.as_fd(), null.as_raw_fd()),
        (null.as_fd(), zero.as_raw_fd()),
    ];
    let running = Running(
        launch(&Jail {
            descriptors: &descriptors,
            ..jail(Root::Empty, directory.as_fd())
        })
        .expect("starts"),
    );
    let target = |fd: RawFd| fs::read_link(running.path(&format!("fd/{fd}"))).expect("is open");
    assert_eq!(target(null.as_raw_fd()), PathBuf::from("/dev/zero"));
    assert_eq!(target(zero.as_raw_fd()), PathBuf::from("/dev/null"));
}
