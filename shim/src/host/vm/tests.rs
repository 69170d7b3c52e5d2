//! What `/proc` says of the real file server and monitor, and how the server
//! serves what is mounted later. They need the directory that `virtiofsd` and
//! `bulkhead-vmm` are installed in, named by `BULKHEAD_TEST_LIBEXEC`, and say
//! SKIP without.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use super::*;
use crate::host::cgroup::tests::hierarchy;
use crate::host::mounts::tests::private_mounts;
use crate::host::mounts::{Access, RootFs};
use crate::host::share::Share;
use crate::host::source::Source;
use crate::host::volumes::{Below, Volumes, Wanted};

struct Cgroup(PathBuf);

impl Drop for Cgroup {
    fn drop(&mut self) {
        fs::remove_dir(&self.0).expect("no process is left in the cgroup");
    }
}

fn cgroup(hierarchy: &Path, name: &str) -> Cgroup {
    let name = format!("bulkhead-test-{name}-{}", std::process::id());
    let cgroup = Cgroup(hierarchy.join(name));
    fs::create_dir(&cgroup.0).expect("makes");
    cgroup
}

fn installed(name: &str) -> Option<File> {
    let directory = std::env::var_os("BULKHEAD_TEST_LIBEXEC");
    if directory.is_none() {
        eprintln!("SKIP: needs BULKHEAD_TEST_LIBEXEC, a directory with a static {name}");
    }
    Some(File::open(PathBuf::from(directory?).join(name)).expect("the program is there"))
}

fn status(pid: u32) -> BTreeMap<String, String> {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .expect("runs")
        .lines()
        .filter_map(|line| line.split_once(":\t"))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// Asks for the vhost-user features (`VHOST_USER_GET_FEATURES`, 1) and reads
/// the answer: then the server has set itself up completely.
fn await_server(socket: &OwnedFd) {
    let request: Vec<u8> = [1_u32, 1, 0]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    rustix::io::write(socket, &request).expect("writes");
    let mut answer = [0_u8; 20];
    let length = rustix::io::read(socket, &mut answer).expect("reads");
    assert_eq!(length, 20, "the server answers");
}

#[test]
fn start_of_the_file_server_jails_it_and_shows_later_mounts() {
    let Some(program) = installed("virtiofsd") else {
        return;
    };
    let Some(hierarchy) = hierarchy() else { return };
    let Some(base) = private_mounts() else { return };
    let cgroup = Cgroup(hierarchy.join(format!("bulkhead-test-server-{}", std::process::id())));
    fs::create_dir(&cgroup.0).expect("makes");
    let cgroup_fd = File::open(&cgroup.0).expect("opens");
    let share = Share::create(&base.path().join("share")).expect("creates");
    let place = Place {
        directory: base.path(),
        share: share.path(),
        remote_shares: &[],
        cgroup: cgroup_fd.as_fd(),
        uid: 2_000_000_009,
    };
    let (mut server, socket) = FileServer::start(place, program.as_fd()).expect("starts");
    await_server(&socket);

    let status = status(server.pid());
    // CHOWN DAC_OVERRIDE FOWNER FSETID SETGID SETUID SETFCAP.
    for set in ["CapPrm", "CapEff"] {
        assert_eq!(status[set], "00000000800000db", "{set}");
    }
    for set in ["CapInh", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    assert_eq!(status["Seccomp"], "2");
    let root = PathBuf::from(format!("/proc/{}/root", server.pid()));
    let mut names: Vec<_> = fs::read_dir(&root)
        .expect("lists")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["containers", "volumes"]);
    let table = fs::read_to_string(format!("/proc/{}/mountinfo", server.pid())).expect("table");
    assert_eq!(
        table.lines().count(),
        1,
        "only the share, seen from its root: {table}"
    );
    assert!(table.contains(" / ro,nosuid,nodev,noexec"), "{table}");

    let source = base.path().join("source");
    fs::create_dir(&source).expect("makes");
    fs::write(source.join("file"), "x").expect("writes");
    share
        .add_container("c1", &RootFs::Premounted(source))
        .expect("adds");
    assert!(
        root.join("containers/c1/rootfs/file").exists(),
        "a later mount appears"
    );
    crate::host::share::remove_container(share.path(), "c1").expect("removes");
    assert!(!root.join("containers/c1").exists(), "and disappears");

    let mut volumes = Volumes::new(share.path());
    let pidfd = server.pidfd().try_clone_to_owned().expect("duplicates");
    volumes.set_servers([pidfd].into_iter());
    let volume = Source::open(&base.path().join("source")).expect("opens");
    for (access, shown) in [
        (Access::ReadOnly, " /volumes/0 ro,"),
        (Access::Writable, " /volumes/0 rw,"),
    ] {
        volumes
            .place(&volume, &Wanted::unmapped(access, Below::Now))
            .expect("places");
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", server.pid()));
        let table = table.expect("table");
        assert!(
            table.contains(shown),
            "{access:?} in its own mounts: {table}"
        );
    }

    drop(socket);
    let timeout = Timespec::try_from(Duration::from_secs(10)).expect("fits");
    let pidfd = server.pidfd();
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout));
    assert_eq!(ended, Ok(1), "ends with its connection");
    server.kill().expect("is collected");
    let log = server.log.take().expect("its log");
    let mut text = [0_u8; 4096];
    let length = rustix::io::read(&log, &mut text).expect("reads");
    assert_eq!(
        String::from_utf8_lossy(&text[..length]),
        "",
        "has nothing to warn of"
    );
    assert!(log.as_raw_fd() > 2);
}

#[test]
fn start_with_a_kernel_that_is_none_reports_it_from_the_jail() {
    let Some(vmm) = installed("bulkhead-vmm") else {
        return;
    };
    let Some(virtiofsd) = installed("virtiofsd") else {
        return;
    };
    let Some(hierarchy) = hierarchy() else { return };
    let Some(base) = private_mounts() else { return };
    let cgroup = cgroup(&hierarchy, "monitor");
    let cgroup_fd = File::open(&cgroup.0).expect("opens");
    let share = Share::create(&base.path().join("share")).expect("creates");
    let place = Place {
        directory: base.path(),
        share: share.path(),
        remote_shares: &[],
        cgroup: cgroup_fd.as_fd(),
        uid: 2_000_000_010,
    };
    let jailed = Monitor::start(place, vmm.as_fd()).expect("starts");
    let status = status(jailed.pid());
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    let root = fs::read_dir(format!("/proc/{}/root", jailed.pid())).expect("lists");
    assert_eq!(root.count(), 0);
    drop(jailed);

    let null = || OwnedFd::from(File::open("/dev/null").expect("opens"));
    let installed = Opened {
        vmm: vmm.into(),
        virtiofsd: virtiofsd.into(),
        kernel: null(),
        initramfs: null(),
    };
    let listener = std::os::unix::net::UnixListener::bind(base.path().join("v")).expect("binds");
    let request = VmRequest {
        vcpus: Vcpus { boot: 1, max: 1 },
        memory: Memory {
            size_mib: 64,
            max_mib: 64,
        },
        command_line: String::new(),
        vsock_listener: listener.into(),
        console: None,
    };
    // Neither is /dev/null a KVM: whichever the monitor meets first, it says.
    let vm = Vm::start(place, installed, null(), request).expect("both start");
    let event = vm
        .monitor
        .wait_event(Duration::from_secs(30))
        .expect("is told");
    assert!(
        matches!(&event, Received::Event(vmm_config::control::Event::Failed { error })
            if !error.is_empty()),
        "{event:?}"
    );
}
