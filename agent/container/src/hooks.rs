//! `hooks.startContainer`: programs of the container's that run in it before its own
//! (OCI runtime specification, config.md, "startContainer hooks").
//!
//! Each is a child of the init's, with the user, privileges and seccomp filter
//! that the program will have.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, execve, setpgid};
use oci_spec::runtime::{Hook, Hooks, Spec};
use serde::Serialize;

use crate::Unsupported;
use crate::kernel_calls::{Cloned, clone_child, close_on_exec_from};
use crate::user_namespace::wait_for;

/// How much of a failed hook's output is told: its end.
const OUTPUT_BYTES: u64 = 4096;

/// How a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("cannot prepare startContainer hook {path}")]
    Prepare {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot run startContainer hook {path}")]
    Run {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("startContainer hook {path} ended with {code} (-1: by a signal); output: {output}")]
    Failed {
        path: PathBuf,
        code: i32,
        output: String,
    },
    #[error(
        "startContainer hook {path} did not end within its timeout of {seconds} s; output: {output}"
    )]
    Timeout {
        path: PathBuf,
        seconds: u64,
        output: String,
    },
}

/// What a hook reads on its standard input (runtime.md, "State").
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct State {
    oci_version: String,
    id: String,
    status: &'static str,
    /// In the container's PID namespace, so known only once the init is there.
    pid: u32,
    bundle: PathBuf,
    annotations: HashMap<String, String>,
}

/// A hook with its open streams.
#[derive(Debug)]
struct Ready {
    path: PathBuf,
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    timeout: Option<Duration>,
    input: File,
    output: File,
}

/// The hooks of a container that is about to start.
#[derive(Debug, Default)]
pub struct StartHooks {
    hooks: Vec<Ready>,
    /// What they are told; nothing when there are none.
    state: Option<State>,
}

/// Refuses a hook that cannot be meant.
pub fn check(hooks: &Hooks) -> Result<(), Unsupported> {
    for (index, hook) in hooks.start_container().iter().flatten().enumerate() {
        let refuse = |field: &str, reason: String| {
            Err(Unsupported::new(
                format!("hooks.startContainer[{index}].{field}"),
                reason,
            ))
        };
        if !hook.path().is_absolute() {
            let path = hook.path().display().to_string();
            return refuse("path", format!("{path:?} is not an absolute path"));
        }
        if let Some(seconds) = hook.timeout().filter(|seconds| *seconds <= 0) {
            return refuse("timeout", format!("{seconds} is not greater than zero"));
        }
    }
    Ok(())
}

fn memory_file() -> io::Result<File> {
    Ok(File::from(memfd_create("hook", MFdFlags::MFD_CLOEXEC)?))
}

impl StartHooks {
    /// Those of `spec`, for its init to run.
    pub fn prepare(spec: &Spec, id: &str, bundle: &Path) -> Result<Self, HookError> {
        let hooks = spec.hooks().as_ref();
        let hooks = hooks.and_then(|hooks| hooks.start_container().as_ref());
        let hooks = hooks.into_iter().flatten().map(|hook| {
            Ready::try_new(hook).map_err(|source| HookError::Prepare {
                path: hook.path().clone(),
                source,
            })
        });
        let hooks: Vec<_> = hooks.collect::<Result<_, _>>()?;
        let state = (!hooks.is_empty()).then(|| State {
            oci_version: spec.version().clone(),
            id: id.to_owned(),
            status: "created",
            pid: 0,
            bundle: bundle.to_owned(),
            annotations: spec.annotations().clone().unwrap_or_default(),
        });
        Ok(Self { hooks, state })
    }

    /// Runs them up to the first that fails; `confine` makes the calling process,
    /// a child of the caller's, what the container's program will be. The caller
    /// is the container's init.
    pub fn run(&mut self, confine: impl Fn() -> bool) -> Result<(), HookError> {
        let Some(state) = &mut self.state else {
            return Ok(());
        };
        state.pid = std::process::id();
        self.hooks
            .iter_mut()
            .try_for_each(|hook| hook.run(state, &confine))
    }
}

impl Ready {
    fn try_new(hook: &Hook) -> io::Result<Self> {
        let strings = |texts: &[String]| {
            let texts = texts.iter().map(|text| CString::new(text.as_str()));
            texts
                .collect::<Result<Vec<_>, _>>()
                .map_err(io::Error::from)
        };
        let program = CString::new(hook.path().as_os_str().as_encoded_bytes())?;
        let mut arguments = strings(hook.args().as_deref().unwrap_or_default())?;
        if arguments.is_empty() {
            arguments.push(program.clone());
        }
        Ok(Self {
            path: hook.path().clone(),
            program,
            arguments,
            environment: strings(hook.env().as_deref().unwrap_or_default())?,
            timeout: hook
                .timeout()
                .and_then(|seconds| u64::try_from(seconds).ok())
                .map(Duration::from_secs),
            input: memory_file()?,
            output: memory_file()?,
        })
    }

    fn tell(&mut self, state: &State) -> io::Result<()> {
        serde_json::to_writer(&mut self.input, state)?;
        self.input.seek(SeekFrom::Start(0)).map(drop)
    }

    fn run(&mut self, state: &State, confine: &impl Fn() -> bool) -> Result<(), HookError> {
        let failed = |path: &Path, source| HookError::Run {
            path: path.to_owned(),
            source,
        };
        self.tell(state)
            .map_err(|error| failed(&self.path, error))?;
        let cloned = clone_child(nix::sched::CloneFlags::empty());
        let (pid, pidfd) = match cloned.map_err(|error| failed(&self.path, error))? {
            Cloned::Child => self.become_it(confine),
            Cloned::Parent { pid, pidfd } => (pid, pidfd),
        };
        let ended = wait_until(self.timeout, pidfd.as_fd());
        if !ended.map_err(|error| failed(&self.path, error))? {
            // Its group, which it made before anything else; if it has not yet, itself.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
            let _ = wait_for(pid);
            return Err(HookError::Timeout {
                path: self.path.clone(),
                seconds: self.timeout.map_or(0, |timeout| timeout.as_secs()),
                output: self.end_of_output(),
            });
        }
        match wait_for(pid).map_err(|error| failed(&self.path, error))? {
            0 => Ok(()),
            code => Err(HookError::Failed {
                path: self.path.clone(),
                code,
                output: self.end_of_output(),
            }),
        }
    }

    fn become_it(&self, confine: &impl Fn() -> bool) -> ! {
        let streams = || {
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            dup2_stdin(&self.input)?;
            dup2_stdout(&self.output)?;
            dup2_stderr(&self.output)
        };
        if streams().is_ok() && close_on_exec_from(3).is_ok() && confine() {
            let error = execve(&self.program, &self.arguments, &self.environment);
            let error = error.err().unwrap_or(Errno::UnknownErrno);
            let _ = writeln!(&self.output, "{error}");
        }
        // As shells tell that a program cannot be executed.
        std::process::exit(126);
    }

    fn end_of_output(&mut self) -> String {
        let mut text = Vec::new();
        let len = self.output.metadata().map_or(0, |status| status.len());
        let start = len.saturating_sub(OUTPUT_BYTES);
        let read = self
            .output
            .seek(SeekFrom::Start(start))
            .and_then(|_| (&self.output).take(OUTPUT_BYTES).read_to_end(&mut text));
        let _ = read;
        String::from_utf8_lossy(&text).trim_end().to_owned()
    }
}

/// Whether the process has ended in time.
fn wait_until(timeout: Option<Duration>, process: std::os::fd::BorrowedFd<'_>) -> io::Result<bool> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let bound = match left {
            None => PollTimeout::NONE,
            Some(left) => PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
        };
        match poll(&mut [PollFd::new(process, PollFlags::POLLIN)], bound) {
            Ok(0) if left.is_some_and(|left| left < Duration::from_millis(1)) => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}
