//! `start`: find the server of a container's pod, or make it.
//!
//! containerd runs this with the bundle as working directory, merges standard
//! error into standard output, and waits until both are closed: nothing but the
//! reply may be written, and the server must hold neither.

mod params;
mod socket;

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::FlockOperation;
use thiserror::Error;

use crate::args::Invocation;
use crate::host::directory::{self, PodPaths};
use crate::host::{cleanup, pod};
use crate::spec::{self, Membership};

pub use params::{MAX_STDIN_BYTES, Params, Reply};
pub use socket::{is_alive, socket_path};

/// Why no server can be offered.
#[derive(Debug, Error)]
pub enum Error {
    /// containerd's words on standard input.
    #[error(transparent)]
    Params(#[from] params::Error),
    /// The container's configuration.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// The pod's directory.
    #[error(transparent)]
    Directory(#[from] directory::Error),
    /// What a dead predecessor left could not be removed.
    #[error("clean up after an earlier shim of pod {pod_id}")]
    Stale {
        /// The pod.
        pod_id: String,
        /// What stays.
        #[source]
        source: pod::Error,
    },
    /// The pod of a container is not there.
    #[error(
        "pod {sandbox_id} of this container has no running shim: its VM is gone; remove the pod and create it again"
    )]
    NoPod {
        /// The sandbox.
        sandbox_id: String,
    },
    /// Something on the host failed.
    #[error("{operation}")]
    Io {
        /// What was tried, with the path.
        operation: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Error {
    fn io(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Io { operation, source }
    }
}

/// Does `start` and writes the reply to standard output.
pub fn start(invocation: &Invocation) -> Result<(), Error> {
    let mut stdin = Vec::new();
    io::stdin()
        .lock()
        .take(MAX_STDIN_BYTES + 1)
        .read_to_end(&mut stdin)
        .map_err(Error::io("read standard input"))?;
    let environment = std::env::var("TTRPC_ADDRESS").ok();
    let params = Params::parse(&stdin, environment, invocation)?;
    let bundle = std::env::current_dir().map_err(Error::io("read the working directory"))?;
    let membership = Membership::of(&spec::read(&bundle)?)?;
    let paths = PodPaths::try_new(&invocation.namespace, membership.pod_id(&invocation.id))?;
    directory::check_id(&invocation.id)?;

    let socket = find_or_make(&paths, &membership, invocation, &params, &bundle)?;
    let address = format!("unix://{}", socket.display());
    // containerd 1.6 and 1.7 find the shim by this file after a restart.
    let address_file = bundle.join("address");
    fs::write(&address_file, &address)
        .map_err(Error::io(format!("write {}", address_file.display())))?;
    io::stdout()
        .write_all(&params.reply(&address))
        .map_err(Error::io("write the reply"))
}

/// The socket of a live server of the pod.
fn find_or_make(
    paths: &PodPaths,
    membership: &Membership,
    invocation: &Invocation,
    params: &Params,
    bundle: &Path,
) -> Result<PathBuf, Error> {
    // One `start` at a time on this host: whoever comes second finds the
    // socket of the first, not half a pod.
    let _turn = take_turn(paths.root())?;
    let socket = socket_path(paths);
    if is_alive(&socket) {
        return Ok(socket);
    }
    if let Membership::Member { sandbox_id } = membership {
        return Err(Error::NoPod {
            sandbox_id: sandbox_id.clone(),
        });
    }
    if paths.directory().exists() {
        cleanup::cleanup(paths.root(), paths.namespace(), paths.id()).map_err(|source| {
            Error::Stale {
                pod_id: paths.id().to_owned(),
                source,
            }
        })?;
    }
    let lock = paths.create_and_lock()?;
    let listener =
        socket::bind(&socket).map_err(Error::io(format!("listen on {}", socket.display())))?;
    if let Err(error) = spawn_server(
        paths,
        invocation,
        params,
        bundle,
        listener,
        lock.into_descriptor(),
    ) {
        // Best effort: the error to tell is the first.
        let _ = fs::remove_file(&socket);
        let _ = fs::remove_dir(paths.directory());
        return Err(error);
    }
    Ok(socket)
}

/// Waits for the other `start`s of this host.
pub fn take_turn(root: &Path) -> Result<File, Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .map_err(Error::io(format!("create {}", root.display())))?;
    let directory = File::open(root).map_err(Error::io(format!("open {}", root.display())))?;
    rustix::fs::flock(&directory, FlockOperation::LockExclusive)
        .map_err(|errno| Error::io(format!("lock {}", root.display()))(errno.into()))?;
    Ok(directory)
}

/// Starts the server: this program again, with the listening socket as standard
/// input and the pod's lock as standard output, which it moves out of the way.
fn spawn_server(
    paths: &PodPaths,
    invocation: &Invocation,
    params: &Params,
    bundle: &Path,
    listener: UnixListener,
    lock: OwnedFd,
) -> Result<(), Error> {
    raise_oom_score()?;
    let name = std::env::args_os().next().unwrap_or_default();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(name)
        .args(["-namespace", paths.namespace(), "-id", paths.id()])
        .args(["-address", &invocation.address])
        .args(["-publish-binary", &invocation.publish_binary])
        .args([OsStr::new("-bundle"), bundle.as_os_str()])
        .args(params.debug.then_some("-debug"))
        .arg("serve")
        .env("TTRPC_ADDRESS", &params.ttrpc_address)
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::from(lock))
        .stderr(Stdio::null());
    if std::env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty()) {
        share_no_core_with_others()?;
    }
    command
        .spawn()
        .map(drop)
        .map_err(Error::io("start the server"))
}

/// Makes the server a little likelier to be killed than containerd: the score
/// is inherited, so that it must be set here, before there is a server.
fn raise_oom_score() -> Result<(), Error> {
    const PATH: &str = "/proc/self/oom_score_adj";
    /// `OOM_SCORE_ADJ_MAX` of Linux.
    const MOST: i32 = 1000;
    let score = fs::read_to_string(PATH).map_err(Error::io(format!("read {PATH}")))?;
    let score: i32 = score.trim().parse().unwrap_or(0);
    fs::write(PATH, (score + 1).min(MOST).to_string()).map_err(Error::io(format!("write {PATH}")))
}

/// containerd's `SCHED_CORE`: a cookie of the pod's own, inherited by all its
/// processes, so that no foreign thread runs on a sibling hardware thread.
fn share_no_core_with_others() -> Result<(), Error> {
    use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};
    create_core_scheduling_cookie(rustix::process::getpid(), CoreSchedulingScope::ThreadGroup)
        .map_err(|errno| {
            Error::io("make a core scheduling cookie (SCHED_CORE is set)")(errno.into())
        })
}
