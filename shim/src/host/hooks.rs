//! OCI hooks, run on the host in the runtime namespace (OCI runtime-spec,
//! config.md, "POSIX-platform Hooks").

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use oci_spec::runtime::Hook;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::Serialize;
use thiserror::Error;

use super::children;
use super::deadline::Deadline;

/// How much of a failed hook's output is told: its end.
const OUTPUT_BYTES: u64 = 4096;

/// How a hook failed.
#[derive(Debug, Error)]
pub enum Error {
    /// It cannot be run.
    #[error("run {kind} hook {path}")]
    Run {
        /// As in "createRuntime".
        kind: &'static str,
        /// Its program.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It ended with anything but 0.
    #[error("{kind} hook {path} ended with {status}; output: {output}")]
    Failed {
        /// As in "createRuntime".
        kind: &'static str,
        /// Its program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote.
        output: String,
    },
    /// It took longer than its timeout.
    #[error("{kind} hook {path} did not end within its timeout of {timeout:?}; output: {output}")]
    Timeout {
        /// As in "createRuntime".
        kind: &'static str,
        /// Its program.
        path: PathBuf,
        /// Its own limit.
        timeout: Duration,
        /// The end of what it wrote.
        output: String,
    },
    /// It did not end in the time that whoever ran it had.
    #[error(
        "{kind} hook {path} was stopped for want of time: it runs again with the next clean-up"
    )]
    OutOfTime {
        /// As in "poststop".
        kind: &'static str,
        /// Its program.
        path: PathBuf,
    },
}

/// The container's state on a hook's stdin (OCI runtime-spec, runtime.md,
/// "State").
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Of the spec.
    pub oci_version: String,
    /// The container's.
    pub id: String,
    /// As in "creating".
    pub status: Status,
    /// The stand-in's; left out once the container is stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The bundle's absolute path.
    pub bundle: PathBuf,
    /// The spec's annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named as in the specification")]
pub enum Status {
    Creating,
    Created,
    Running,
    Stopped,
}

/// The hooks of one moment in a container's life with all that they are told:
/// they may take their time, and need nothing of the pod meanwhile.
#[derive(Clone, Debug)]
pub struct Batch {
    /// As in "createRuntime".
    pub kind: &'static str,
    /// In their order.
    pub hooks: Vec<Hook>,
    /// For their stdin.
    pub state: State,
}

impl Batch {
    /// Runs them up to the first that fails. Blocks for as long as they run.
    pub fn run_until_failure(&self) -> Result<(), Error> {
        let mut hooks = self.hooks.iter();
        hooks.try_for_each(|hook| run(self.kind, hook, &self.state, Deadline::NONE))
    }

    /// Runs every one, failing ones too, and returns how they failed (OCI
    /// runtime-spec, runtime.md, "Lifecycle": log a warning and go on). Blocks
    /// for as long as they run, until `deadline` at most.
    ///
    /// # Errors
    /// [`Error::OutOfTime`]: the batch is to be run again.
    pub fn run_all(&self, deadline: Deadline) -> Result<Vec<Error>, Error> {
        let mut failures = Vec::new();
        for hook in &self.hooks {
            match run(self.kind, hook, &self.state, deadline) {
                Ok(()) => {}
                Err(error @ Error::OutOfTime { .. }) => return Err(error),
                Err(error) => failures.push(error),
            }
        }
        Ok(failures)
    }
}

/// Runs one hook to its end. Blocks for as long as it runs, until `deadline`
/// at most.
///
/// Its environment is `env` of the hook, or this process's where it has none;
/// its working directory is the bundle where that still exists. What it leaves
/// running stays running.
fn run(kind: &'static str, hook: &Hook, state: &State, deadline: Deadline) -> Result<(), Error> {
    let path = hook.path().clone();
    let failed = |source: io::Error| Error::Run {
        kind,
        path: path.clone(),
        source,
    };
    let left = deadline.left();
    if left == Some(Duration::ZERO) {
        return Err(Error::OutOfTime { kind, path });
    }
    // Files in memory and not pipes: a hook may leave a process behind that
    // holds them open, and may write and read as much and as late as it likes.
    let mut output = memory_file("hook-output").map_err(failed)?;
    let mut input = memory_file("hook-state").map_err(failed)?;
    serde_json::to_writer(&mut input, state).map_err(|error| failed(error.into()))?;
    input.seek(SeekFrom::Start(0)).map_err(failed)?;

    let mut command = command(hook, &state.bundle);
    command
        .stdin(input)
        .stdout(output.try_clone().map_err(failed)?)
        .stderr(output.try_clone().map_err(failed)?);
    let child = children::spawn_command(&mut command).map_err(failed)?;
    let timeout = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map(Duration::from_secs);
    let bound = [timeout, left].into_iter().flatten().min();
    match wait(child, bound).map_err(failed)? {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(Error::Failed {
            kind,
            path,
            status,
            output: end_of(&mut output),
        }),
        None => Err(match timeout {
            Some(timeout) if bound == Some(timeout) => Error::Timeout {
                kind,
                path,
                timeout,
                output: end_of(&mut output),
            },
            _ => Error::OutOfTime { kind, path },
        }),
    }
}

fn command(hook: &Hook, bundle: &Path) -> Command {
    let mut command = Command::new(hook.path());
    if let Some((name, arguments)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(arguments);
    }
    if let Some(variables) = hook.env() {
        command.env_clear();
        command.envs(
            variables
                .iter()
                .filter_map(|variable| variable.split_once('=')),
        );
    }
    // A group of its own, so that a timeout ends what it started too.
    command.process_group(0);
    // It may be gone by the time of a late `delete`.
    command.current_dir(if bundle.is_dir() {
        bundle
    } else {
        Path::new("/")
    });
    command
}

/// Waits for the child, `None` when it had to be killed after `timeout`.
fn wait(mut child: Child, timeout: Option<Duration>) -> io::Result<Option<ExitStatus>> {
    let pid = child.id();
    let process = Pid::from_child(&child);
    // No other process can have its number: nobody else reaps it.
    let ended = pidfd_open(process, PidfdFlags::empty())
        .map_err(io::Error::from)
        .and_then(|pidfd| wait_readable(&pidfd, timeout));
    if !matches!(ended, Ok(true)) {
        let _ = kill_process_group(process, Signal::KILL);
    }
    let status = child.wait();
    children::forget(pid);
    Ok(if ended? { Some(status?) } else { None })
}

fn wait_readable(pidfd: &OwnedFd, timeout: Option<Duration>) -> io::Result<bool> {
    let end = timeout.map(|timeout| std::time::Instant::now() + timeout);
    loop {
        let left = end.map(|end| end.saturating_duration_since(std::time::Instant::now()));
        let left = left.map(|left| Timespec::try_from(left).unwrap_or_default());
        match poll(
            &mut [PollFd::new(&pidfd.as_fd(), PollFlags::IN)],
            left.as_ref(),
        ) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn memory_file(name: &str) -> io::Result<File> {
    Ok(memfd_create(name, MemfdFlags::CLOEXEC).map(File::from)?)
}

/// The end of what a hook wrote. Its descriptor shares our offset, so we seek.
fn end_of(output: &mut File) -> String {
    let mut text = Vec::new();
    let length = output.metadata().map_or(0, |metadata| metadata.len());
    let from = length.saturating_sub(OUTPUT_BYTES);
    let read = output
        .seek(SeekFrom::Start(from))
        .and_then(|_| output.read_to_end(&mut text));
    match read {
        Ok(0) | Err(_) => "none".to_owned(),
        Ok(_) => String::from_utf8_lossy(&text).trim().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let text = serde_json::json!({
            "path": "/bin/sh",
            "args": ["sh", "-c", script],
            "env": ["A=b"],
        });
        let mut hook: Hook = serde_json::from_value(text).expect("is a hook");
        hook.set_timeout(timeout);
        hook
    }

    fn state(bundle: &Path) -> State {
        State {
            oci_version: "1.2.0".to_owned(),
            id: "c1".to_owned(),
            status: Status::Creating,
            pid: Some(42),
            bundle: bundle.to_owned(),
            annotations: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
        }
    }

    fn run_script(script: &str, timeout: Option<i64>, bundle: &Path) -> Result<(), Error> {
        let hook = hook(script, timeout);
        run("createRuntime", &hook, &state(bundle), Deadline::NONE)
    }

    #[test]
    fn run_gives_the_state_and_only_its_own_environment() {
        let bundle = tempfile::tempdir().expect("directory");
        run_script("cat >state; echo \"$A$HOME\" >env", None, bundle.path()).expect("runs");
        let state: serde_json::Value =
            serde_json::from_slice(&fs::read(bundle.path().join("state")).expect("reads"))
                .expect("is JSON");
        assert_eq!(
            state,
            serde_json::json!({
                "ociVersion": "1.2.0", "id": "c1", "status": "creating", "pid": 42,
                "bundle": bundle.path(), "annotations": {"k": "v"},
            })
        );
        assert_eq!(fs::read(bundle.path().join("env")).expect("reads"), b"b\n");
    }

    #[test]
    fn run_of_a_failing_hook_tells_its_status_and_output() {
        let bundle = tempfile::tempdir().expect("directory");
        let error = run_script("echo out; echo err >&2; exit 3", None, bundle.path())
            .expect_err("fails")
            .to_string();
        assert!(
            error.contains("exit status: 3") && error.contains("out\nerr"),
            "{error}"
        );
    }

    #[test]
    fn run_beyond_its_timeout_kills_what_it_started() {
        let bundle = tempfile::tempdir().expect("directory");
        let script = "sleep 1000 & echo $! >pid; echo waiting; wait";
        let error = run_script(script, Some(1), bundle.path()).expect_err("takes too long");
        assert!(
            matches!(&error, Error::Timeout { output, .. } if output == "waiting"),
            "{error}"
        );
        let pid = fs::read_to_string(bundle.path().join("pid")).expect("reads");
        let pid = Pid::from_raw(pid.trim().parse().expect("number")).expect("pid");
        // Killed, though perhaps not yet gone: another process inherits it.
        if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) {
            let soon = Some(Duration::from_secs(10));
            assert!(wait_readable(&pidfd, soon).expect("waits"), "is killed");
        }
    }

    #[test]
    fn run_of_a_hook_that_leaves_a_process_behind_does_not_wait_for_it() {
        let bundle = tempfile::tempdir().expect("directory");
        run_script("sleep 1000 & echo $! >pid", None, bundle.path()).expect("runs");
        let pid = fs::read_to_string(bundle.path().join("pid")).expect("reads");
        let pid = Pid::from_raw(pid.trim().parse().expect("number")).expect("pid");
        rustix::process::kill_process(pid, Signal::KILL).expect("is alive");
    }

    #[test]
    fn run_of_what_is_not_there_names_it() {
        let bundle = tempfile::tempdir().expect("directory");
        let mut hook = hook("", None);
        hook.set_path(PathBuf::from("/nonexistent/hook"));
        let error = run("poststop", &hook, &state(bundle.path()), Deadline::NONE)
            .expect_err("is not there");
        assert!(error.to_string().contains("/nonexistent/hook"), "{error}");
    }

    #[test]
    fn run_all_goes_on_after_a_failure_and_stops_at_the_deadline() {
        let bundle = tempfile::tempdir().expect("directory");
        let batch = |scripts: &[&str]| Batch {
            kind: "poststop",
            hooks: scripts.iter().map(|script| hook(script, None)).collect(),
            state: state(bundle.path()),
        };
        let failures = batch(&["exit 1", "touch ran"]).run_all(Deadline::NONE);
        assert_eq!(failures.expect("runs all").len(), 1);
        assert!(bundle.path().join("ran").exists());

        let late = batch(&["sleep 1000", "touch late"]);
        let error = late.run_all(Deadline::after(Duration::from_millis(50)));
        assert!(matches!(error, Err(Error::OutOfTime { .. })), "{error:?}");
        let error = late.run_all(Deadline::after(Duration::ZERO));
        assert!(matches!(error, Err(Error::OutOfTime { .. })), "{error:?}");
        assert!(!bundle.path().join("late").exists());
    }
}
