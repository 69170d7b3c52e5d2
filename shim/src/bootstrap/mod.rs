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
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::FlockOperation;
use thiserror::Error;

use crate::args::Invocation;
use crate::host::deadline::Deadline;
use crate::host::directory::{self, PodPaths};
use crate::host::{cleanup, pod};
use crate::spec::{self, Membership};

pub use params::{MAX_STDIN_BYTES, Params, Reply};
pub use socket::{dismiss, is_alive, socket_path};

/// Where containerd 1.6 and 1.7 find the shim after a restart, in the bundle.
const ADDRESS_FILE: &str = "address";
/// How often a pod that is there without a server may be cleaned up for its
/// name: a shim that is just leaving needs a moment.
const CLEANUP_ATTEMPTS: u32 = 3;
/// How long cleaning up after a dead shim may take: it has hooks to run, and the
/// client waits.
const STALE_TIMEOUT: Duration = Duration::from_mins(1);

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

/// What a `start` is about.
struct Start<'a> {
    paths: &'a PodPaths,
    membership: &'a Membership,
    invocation: &'a Invocation,
    params: &'a Params,
    bundle: &'a Path,
}

/// A pod's server, and whether it was made here.
#[derive(Debug, PartialEq, Eq)]
enum Server {
    Found,
    Made,
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
    let membership = match spec::read(&bundle) {
        Ok(spec) => Membership::of(&spec)?,
        // A sandbox's, which says what it is by CreateSandbox.
        Err(spec::Error::Absent { .. }) => Membership::Sandbox,
        Err(error) => return Err(error.into()),
    };
    let paths = PodPaths::try_new(&invocation.namespace, membership.pod_id(&invocation.id))?;
    directory::check_id(&invocation.id)?;

    let start = Start {
        paths: &paths,
        membership: &membership,
        invocation,
        params: &params,
        bundle: &bundle,
    };
    let server = find_or_make(&start, spawn_server)?;
    let mut stdout = io::stdout();
    let told = stdout
        .write_all(&params.reply(&address(&paths)))
        .and_then(|()| stdout.flush());
    if told.is_err() && server == Server::Made {
        // containerd does not know of it, and would never ask it to go.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::io("start a runtime"))?;
        runtime.block_on(dismiss(&socket_path(&paths), paths.id()));
    }
    told.map_err(Error::io("write the reply"))
}

fn address(paths: &PodPaths) -> String {
    format!("unix://{}", socket_path(paths).display())
}

/// Sees to it that the pod has a live server, for which containerd finds the
/// bundle's `address`. `spawn` makes it of the socket and the pod's lock.
fn find_or_make(
    start: &Start<'_>,
    spawn: impl FnOnce(&Start<'_>, UnixListener, OwnedFd) -> Result<(), Error>,
) -> Result<Server, Error> {
    let paths = start.paths;
    for _ in 0..CLEANUP_ATTEMPTS {
        // One `start` at a time on this host: whoever comes second finds the
        // socket of the first, not half a pod.
        let turn = take_turn(paths.root())?;
        if is_alive(&socket_path(paths)) {
            write_address(start)?;
            return Ok(Server::Found);
        }
        if let Membership::Member { sandbox_id } = start.membership {
            return Err(Error::NoPod {
                sandbox_id: sandbox_id.clone(),
            });
        }
        if !paths.directory().exists() {
            return make(start, spawn).map(|()| Server::Made);
        }
        drop(turn);
        clean_up(paths)?;
    }
    Err(directory::Error::Held {
        path: paths.directory(),
    }
    .into())
}

/// Removes what a dead predecessor left. It may run hooks, so nobody else's
/// `start` waits for it: the pod's own lock keeps two from doing it at once.
fn clean_up(paths: &PodPaths) -> Result<(), Error> {
    let deadline = Deadline::after(STALE_TIMEOUT);
    cleanup::cleanup(paths.root(), paths.namespace(), paths.id(), deadline)
        .map(drop)
        .map_err(|source| Error::Stale {
            pod_id: paths.id().to_owned(),
            source,
        })
}

/// Makes the pod's directory, socket and server; after an error none is there.
fn make(
    start: &Start<'_>,
    spawn: impl FnOnce(&Start<'_>, UnixListener, OwnedFd) -> Result<(), Error>,
) -> Result<(), Error> {
    let paths = start.paths;
    let socket = socket_path(paths);
    let lock = paths.create_and_lock()?;
    let made = socket::bind(&socket)
        .map_err(Error::io(format!("listen on {}", socket.display())))
        .and_then(|listener| {
            // Before there is a server that would be left without it.
            write_address(start)?;
            // A copy: the directory is to be removed while it is ours.
            let lock = lock.try_clone().map_err(Error::io("copy the pod's lock"))?;
            spawn(start, listener, lock.into_descriptor())
        });
    if made.is_err() {
        // Best effort: the error to tell is the first.
        let _ = fs::remove_file(&socket);
        let _ = fs::remove_file(start.bundle.join(ADDRESS_FILE));
        let _ = paths.remove();
    }
    made
}

fn write_address(start: &Start<'_>) -> Result<(), Error> {
    let path = start.bundle.join(ADDRESS_FILE);
    fs::write(&path, address(start.paths)).map_err(Error::io(format!("write {}", path.display())))
}

/// Waits for the other `start`s of this host.
fn take_turn(root: &Path) -> Result<File, Error> {
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

/// Removes the socket of a pod that is gone. One with a short name lies outside
/// of the pod's directory, where nobody removes it after a kill.
pub fn remove_dead_socket(paths: &PodPaths) {
    let socket = socket_path(paths);
    if socket == paths.shim_socket() {
        return;
    }
    // A `start` that is under way may be making it anew.
    if let Ok(_turn) = take_turn(paths.root())
        && !is_alive(&socket)
    {
        let _ = fs::remove_file(socket);
    }
}

/// Starts the server: this program again, with the listening socket as standard
/// input and the pod's lock as standard output, which it moves out of the way.
fn spawn_server(start: &Start<'_>, listener: UnixListener, lock: OwnedFd) -> Result<(), Error> {
    let Start {
        paths,
        invocation,
        params,
        bundle,
        ..
    } = start;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::record::{Container, Process, Record};
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    struct Place {
        root: tempfile::TempDir,
        paths: PodPaths,
        invocation: Invocation,
        params: Params,
    }

    impl Place {
        fn new() -> Self {
            let root = tempfile::tempdir().expect("directory");
            let invocation = Invocation {
                namespace: "default".to_owned(),
                id: "c".to_owned(),
                ..Invocation::default()
            };
            fs::create_dir(root.path().join("bundle")).expect("makes");
            Self {
                paths: PodPaths::below(&root.path().join("run"), "default", "c").expect("is an id"),
                params: Params::parse(b"", None, &invocation).expect("parses"),
                invocation,
                root,
            }
        }

        fn bundle(&self) -> PathBuf {
            self.root.path().join("bundle")
        }

        fn find_or_make(
            &self,
            spawn: impl FnOnce(UnixListener, OwnedFd) -> Result<(), Error>,
        ) -> Result<Server, Error> {
            let start = Start {
                paths: &self.paths,
                membership: &Membership::Alone,
                invocation: &self.invocation,
                params: &self.params,
                bundle: &self.bundle(),
            };
            find_or_make(&start, |_, listener, lock| spawn(listener, lock))
        }
    }

    #[test]
    fn find_or_make_server_finds_the_address_written_and_the_next_finds_it() {
        let place = Place::new();
        let mut server = None;
        let made = place.find_or_make(|listener, lock| {
            assert!(place.bundle().join(ADDRESS_FILE).exists());
            server = Some((listener, lock));
            Ok(())
        });
        assert_eq!(made.expect("makes"), Server::Made);
        assert!(place.paths.is_held().expect("looks"));
        let found = place.find_or_make(|_, _| panic!("there is one"));
        assert_eq!(found.expect("finds"), Server::Found);
    }

    #[test]
    fn find_or_make_that_fails_leaves_nothing() {
        let place = Place::new();
        let failed = place.find_or_make(|_, _| Err(Error::io("fail")(io::ErrorKind::Other.into())));
        failed.expect_err("fails");
        assert_eq!(fs::read_dir(place.paths.root()).expect("lists").count(), 0);
        assert_eq!(fs::read_dir(place.bundle()).expect("lists").count(), 0);
    }

    #[test]
    fn find_or_make_over_a_dead_pod_runs_its_hooks_without_the_turn() {
        let place = Place::new();
        drop(place.paths.create_and_lock().expect("is free"));
        let fifo = place.root.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, 0o600.into()).expect("makes a FIFO");
        let hook = serde_json::from_value(serde_json::json!({
            "path": "/bin/sh",
            "args": ["sh", "-c", format!("read -r line <{}", fifo.display())],
        }));
        let own = Process::of(std::process::id());
        let mut record = Record::new();
        record.shim = Some(Process {
            start_ticks: own.start_ticks - 1,
            ..own
        });
        let container = Container {
            bundle: place.bundle(),
            oci_version: String::new(),
            annotations: BTreeMap::new(),
            poststop: vec![hook.expect("is a hook")],
            poststop_due: true,
            stand_ins: BTreeMap::new(),
            exit: None,
        };
        record.containers.insert("c".to_owned(), container);
        record.write(&place.paths.record()).expect("writes");

        std::thread::scope(|scope| {
            let starting = scope.spawn(|| place.find_or_make(|_, _| Ok(())));
            // Opens once the hook reads: it is running.
            let mut hook = File::options().write(true).open(&fifo).expect("opens");
            let root = File::open(place.paths.root()).expect("opens");
            let turn = rustix::fs::flock(&root, FlockOperation::NonBlockingLockExclusive);
            turn.expect("another start has its turn");
            drop(root);
            hook.write_all(b"go\n").expect("writes");
            drop(hook);
            let made = starting.join().expect("is no panic");
            assert_eq!(made.expect("makes"), Server::Made);
        });
    }
}
