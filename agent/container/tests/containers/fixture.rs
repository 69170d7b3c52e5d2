//! A stand-in for the guest: a private mount namespace, a share, a pod's
//! directory and a parent cgroup.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use agent_container::{
    Container, ContainerStdio, CreateError, CreateOptions, ExecError, Process, create, parse,
    parse_process,
};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

/// Every privilege that this machine may lack is left to the caller; the rest
/// of the guest is made here.
pub struct Host {
    directory: tempfile::TempDir,
    pub cgroup_root: PathBuf,
    mounts_before: String,
}

/// What a container printed and how it ended.
pub struct Outcome {
    pub output: String,
    pub status: ExitStatus,
    pub warnings: Vec<String>,
}

impl Outcome {
    /// What one of the container's commands printed.
    pub fn of(&self, line: &str) -> &str {
        let sections: HashMap<&str, &str> = self
            .output
            .split("== ")
            .filter_map(|section| section.split_once('\n'))
            .collect();
        sections
            .get(line)
            .unwrap_or_else(|| panic!("no {line:?} in {}", self.output))
            .trim_end_matches('\n')
    }
}

fn cgroup2_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        (*fields.get(2)? == "cgroup2").then(|| PathBuf::from(fields[1]))
    })
}

fn build_payload(to: &Path) -> Result<(), String> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata/payload.rs");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let built = Command::new(&rustc)
        .args(["--edition", "2024", "-C", "target-feature=+crt-static"])
        .args(["-C", "panic=abort", "-o"])
        .arg(to)
        .arg(source)
        .status();
    match built {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("{rustc} cannot build a static program: {other:?}")),
    }
}

impl Host {
    pub fn prepare() -> Result<Self, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("needs root".into());
        }
        let cgroup2 = cgroup2_mount().ok_or("needs a cgroup2 mount")?;
        unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| format!("unshare: {errno}"))?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
            .map_err(|errno| format!("mount: {errno}"))?;
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        for name in ["share/containers", "share/volumes", "pod/ns", "pod/shm"] {
            fs::create_dir_all(directory.path().join(name)).map_err(|error| error.to_string())?;
        }
        build_payload(&directory.path().join("payload"))?;
        let cgroup_root = cgroup2.join(format!("agent-container-test-{}", std::process::id()));
        fs::create_dir(&cgroup_root)
            .map_err(|error| format!("{}: {error}", cgroup_root.display()))?;
        let mounts_before = fs::read_to_string("/proc/self/mountinfo").unwrap();
        Ok(Self {
            directory,
            cgroup_root,
            mounts_before,
        })
    }

    pub fn finish(self) {
        let _ = fs::remove_dir(&self.cgroup_root);
    }

    pub fn share(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    pub fn pod(&self) -> PathBuf {
        self.directory.path().join("pod")
    }

    /// Whether the parent cgroup has a controller to give.
    pub fn has_controller(&self, name: &str) -> bool {
        let file = self.cgroup_root.join("cgroup.controllers");
        fs::read_to_string(file).is_ok_and(|all| all.split_whitespace().any(|one| one == name))
    }

    /// Nothing but the parent cgroup may be left, and no process.
    pub fn assert_clean(&self) {
        let left: Vec<_> = fs::read_dir(&self.cgroup_root)
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.file_type().unwrap().is_dir())
            .map(|entry| entry.file_name())
            .collect();
        assert!(left.is_empty(), "cgroups left: {left:?}");
        assert_eq!(
            fs::read_to_string("/proc/self/mountinfo").unwrap(),
            self.mounts_before,
            "mounts are left"
        );
        // Helpers and inits that nobody has reaped yet have ended, or are about
        // to; the alarm ends a test run in which one has not.
        nix::unistd::alarm::set(60);
        while nix::sys::wait::waitpid(None, None) != Err(Errno::ECHILD) {}
        nix::unistd::alarm::cancel();
    }

    /// A root file system that holds the program and nothing else.
    pub fn rootfs(&self, id: &str) -> PathBuf {
        let rootfs = self.share().join("containers").join(id).join("rootfs");
        let _ = fs::remove_dir_all(&rootfs);
        fs::create_dir_all(&rootfs).unwrap();
        fs::copy(
            self.directory.path().join("payload"),
            rootfs.join("payload"),
        )
        .unwrap();
        rootfs
    }

    /// `ctr`'s default specification, for this machine, with the commands to run.
    pub fn spec(&self, id: &str, lines: &[&str]) -> Value {
        let mut spec: Value = serde_json::from_str(include_str!("../testdata/ctr.json")).unwrap();
        spec["root"]["path"] = json!(self.rootfs(id));
        let mut args = vec!["/payload"];
        args.extend(lines);
        spec["process"]["args"] = json!(args);
        spec["process"]["user"]["additionalGids"] = json!([]);
        spec["linux"]["cgroupsPath"] = json!(format!("group/{id}"));
        spec
    }

    pub fn create_with(
        &self,
        id: &str,
        spec: &Value,
        stdio: ContainerStdio,
    ) -> Result<Container, CreateError> {
        let spec = parse(spec.to_string().as_bytes()).unwrap();
        create(CreateOptions {
            id,
            bundle: Path::new("/the/bundle"),
            spec: &spec,
            stdio,
            share_dir: &self.share(),
            pod_dir: &self.pod(),
            cgroup_root: &self.cgroup_root,
        })
    }

    /// Creates a container whose output is read from the returned file.
    pub fn create(&self, id: &str, spec: &Value) -> Result<(Container, File), CreateError> {
        let (reader, writer) = pipe();
        let (stdin, end) = pipe();
        drop(end);
        let stdio = ContainerStdio::Streams {
            stdin,
            stdout: writer.try_clone().unwrap(),
            stderr: writer,
        };
        self.create_with(id, spec, stdio)
            .map(|container| (container, File::from(reader)))
    }

    /// The process of a specification of [`Self::spec`], with other commands.
    pub fn process(spec: &Value, lines: &[&str]) -> Value {
        let mut process = spec["process"].clone();
        let mut args = vec!["/payload"];
        args.extend(lines);
        process["args"] = json!(args);
        process
    }

    /// Creates a process in a container whose output is read from the returned file.
    pub fn exec(
        container: &Container,
        process: &Value,
    ) -> Result<(Process, File, Vec<String>), ExecError> {
        let (reader, writer) = pipe();
        let (stdin, end) = pipe();
        drop(end);
        let stdio = ContainerStdio::Streams {
            stdin,
            stdout: writer.try_clone().unwrap(),
            stderr: writer,
        };
        let process = parse_process(process.to_string().as_bytes()).unwrap();
        let (process, warnings) = container.exec(&process, stdio)?;
        Ok((process, File::from(reader), warnings))
    }

    /// Runs a process in a container to its end.
    pub fn run_exec(container: &Container, process: &Value) -> Outcome {
        let (process, mut reader, warnings) =
            Self::exec(container, process).unwrap_or_else(|error| panic!("{error}"));
        process.start().unwrap_or_else(|error| panic!("{error}"));
        let mut output = String::new();
        reader.read_to_string(&mut output).unwrap();
        Outcome {
            output,
            status: wait(process.pid()),
            warnings,
        }
    }

    /// The error that creating must end with.
    pub fn create_error(&self, id: &str, spec: &Value) -> String {
        match self.create(id, spec) {
            Ok((container, _)) => {
                container.delete().unwrap();
                panic!("the container was created");
            }
            Err(error) => error.to_string(),
        }
    }

    /// Runs a container to its end.
    pub fn run(&self, id: &str, spec: &Value) -> Outcome {
        let (container, mut reader) = self
            .create(id, spec)
            .unwrap_or_else(|error| panic!("{error}"));
        container
            .init()
            .start()
            .unwrap_or_else(|error| panic!("{error}"));
        let mut output = String::new();
        reader.read_to_string(&mut output).unwrap();
        let status = wait(container.init().pid());
        let warnings = container.warnings().to_vec();
        container.delete().unwrap();
        Outcome {
            output,
            status,
            warnings,
        }
    }
}

pub fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap()
}

/// Reaps an init, as the agent's reaper does.
pub fn wait(pid: i32) -> ExitStatus {
    use nix::sys::wait::{WaitStatus, waitpid};
    loop {
        match waitpid(nix::unistd::Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, code)) => return ExitStatus::from_raw(code << 8),
            Ok(WaitStatus::Signaled(_, signal, _)) => return ExitStatus::from_raw(signal as i32),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => panic!("waitpid {pid}: {errno}"),
        }
    }
}

/// Reads until a text has come.
pub fn read_until(reader: &mut File, text: &str) -> String {
    let mut read = String::new();
    let mut buffer = [0; 4096];
    while !read.contains(text) {
        let len = reader.read(&mut buffer).unwrap();
        assert!(len > 0, "ended before {text:?}: {read}");
        read.push_str(&String::from_utf8_lossy(&buffer[..len]));
    }
    read
}

pub fn write_file(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    File::create(path)
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
}

/// A container's processes, once there are so many: the helper that made it may still be on
/// its way out.
pub fn pids(container: &Container, count: usize) -> Vec<i32> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let pids = container.pids().unwrap();
        if pids.len() == count || Instant::now() > deadline {
            return pids;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
