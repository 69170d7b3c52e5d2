//! A running node.

use std::borrow::Borrow;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rootfs_builder::cache::{Cache, CacheError};

use crate::command::{NodeCommand, Output};
use crate::console;
use crate::golden::{Golden, GoldenError};
use crate::health::{self, Watch};
use crate::image::ImageError;
use crate::launcher::Lifetime;
use crate::network::{self, NetworkError};
use crate::qemu::Mode;
use crate::qmp::QmpError;
use crate::rundir::{self, Record, RunDir, RunDirError};
use crate::session::{Endpoint, Process, SessionError};
use crate::starting::Starting;

/// What can go wrong with a node.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The store cannot be opened.
    #[error("open the cache")]
    Cache(#[from] CacheError),
    /// The snapshot cannot be made.
    #[error("make a node to clone")]
    Golden(#[from] GoldenError),
    /// The product's disk cannot be made.
    #[error("make a disk of {prefix}")]
    Product {
        /// The prefix.
        prefix: PathBuf,
        /// The cause.
        #[source]
        source: ImageError,
    },
    /// The run directory cannot be used.
    #[error("use the node's run directory")]
    RunDir(#[from] RunDirError),
    /// The shared network cannot be joined.
    #[error("join a shared network")]
    Network(#[from] NetworkError),
    /// A file operation or QEMU's start failed.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// QEMU cannot be controlled. Its own words are included.
    #[error("control QEMU of node {name}{log}")]
    Qmp {
        /// The node.
        name: String,
        /// What QEMU printed.
        log: String,
        /// The cause.
        #[source]
        source: QmpError,
    },
    /// A session with its agent failed.
    #[error("node {name}")]
    Session {
        /// The node.
        name: String,
        /// The cause.
        #[source]
        source: SessionError,
    },
    /// Input could not be written or output not read.
    #[error("streams of {command} in node {name}")]
    Streams {
        /// The node.
        name: String,
        /// The command.
        command: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A command took too long, and was killed.
    #[error(
        "node {name}: {command} did not end within {seconds} s\nstdout: {stdout}\nstderr: {stderr}"
    )]
    TimedOut {
        /// The node.
        name: String,
        /// The command.
        command: String,
        /// Its limit.
        seconds: u64,
        /// What it had written.
        stdout: String,
        /// What it had written.
        stderr: String,
    },
    /// The node died, hangs, or its kernel complains.
    #[error("node {name} failed: {reason}\nthe end of its console:\n{console}")]
    Failed {
        /// The node.
        name: String,
        /// What was noticed.
        reason: String,
        /// The last lines of its console.
        console: String,
    },
}

pub(crate) fn failed<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> NodeError + 'a {
    move |source| NodeError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// What a node shall be.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    name: String,
    exact_name: bool,
    pub(crate) prefix: Option<PathBuf>,
    pub(crate) network: Option<String>,
    pub(crate) lifetime: Lifetime,
}

impl NodeOptions {
    /// A node for this process. Its name is `name`, this process's id and a number, so that tests may choose freely; it is
    /// also its host name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            exact_name: false,
            prefix: None,
            network: None,
            lifetime: Lifetime::Owner,
        }
    }

    /// Mounts a copy of this tree (`bin/containerd-shim-bulkhead-v2` and so on) at `/opt/bulkhead`, writable; what the node
    /// writes there is its own.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<PathBuf>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// Joins the network `network`, which two nodes can share: `eth1`, with the addresses 10.77.0.1/24 for whoever comes
    /// first and 10.77.0.2/24 for the other.
    #[must_use]
    pub fn network(mut self, network: impl Into<String>) -> Self {
        self.network = Some(network.into());
        self
    }

    /// Uses the name as it is, and lets the node live on when this process ends, until `bulkhead-node down`.
    #[must_use]
    pub fn detached(mut self) -> Self {
        self.exact_name = true;
        self.lifetime = Lifetime::Detached;
        self
    }

    fn unique_name(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if self.exact_name {
            return self.name.clone();
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        format!("{}-{}-{number}", self.name, std::process::id())
    }
}

/// A running node. All methods may be used from several threads at once.
#[derive(Debug)]
pub struct Node {
    record: Record,
    directory: PathBuf,
    watch: Watch,
    /// What this process must clean up: nothing for a detached node.
    owned: Option<Owned>,
}

#[derive(Debug)]
pub(crate) struct Owned {
    pub(crate) child: Child,
    pub(crate) run_dir: RunDir,
}

impl Node {
    /// Clones the golden node, which is built first when the cache does not have it: minutes, with progress on standard
    /// error. The clone itself takes about a second.
    ///
    /// # Errors
    /// Any [`NodeError`].
    pub fn up(options: impl Borrow<NodeOptions>) -> Result<Self, NodeError> {
        let options = options.borrow();
        let cache = Cache::open()?;
        let golden = Golden::or_build(&cache)?;
        let name = options.unique_name();
        let run_dir = RunDir::create(&name)?;
        let mut clone = Starting::start(&golden, options, &name, run_dir)?;
        let record = clone.adopt(&golden, options, name)?;
        Ok(clone.into_node(record, options.lifetime))
    }

    /// Finds a node that another process started, by its whole name.
    ///
    /// # Errors
    /// [`NodeError::RunDir`] when it is not up.
    pub fn attach(name: &str) -> Result<Self, NodeError> {
        let (directory, record) = rundir::find(name)?;
        Ok(Self::watched(record, directory, None))
    }

    /// The console log of a node by its whole name: of a running one, or of one that died since the last `up`.
    ///
    /// # Errors
    /// [`NodeError::RunDir`] when there is none, [`NodeError::File`].
    pub fn console_of(name: &str) -> Result<String, NodeError> {
        let path = rundir::directory(name)?.join(CONSOLE);
        console::read(&path).map_err(failed("read", &path))
    }

    pub(crate) fn watched(record: Record, directory: PathBuf, owned: Option<Owned>) -> Self {
        let endpoint = endpoint(&record);
        Self {
            watch: Watch::start(endpoint, record.mode, &directory.join(CONSOLE)),
            record,
            directory,
            owned,
        }
    }

    /// Its name, which is its host name too.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// How it runs guests.
    pub fn mode(&self) -> Mode {
        self.record.mode
    }

    /// What timeouts that are meant for hardware are to be multiplied by here.
    pub fn time_factor(&self) -> u32 {
        self.record.mode.time_factor()
    }

    /// Its address on the shared network, if it is on one.
    pub fn shared_address(&self) -> Option<&str> {
        self.record
            .network
            .as_ref()
            .map(|(_, address)| address.as_str())
    }

    /// Its console log so far.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn console(&self) -> io::Result<String> {
        console::read(&self.directory.join(CONSOLE))
    }

    /// Runs a command to its end, with its standard input from [`NodeCommand::stdin`]. A status other than 0 is no error.
    ///
    /// # Errors
    /// [`NodeError::TimedOut`], [`NodeError::Failed`], [`NodeError::Session`] when the program cannot be started.
    pub fn run(&self, command: impl Borrow<NodeCommand>) -> Result<Output, NodeError> {
        let command = command.borrow();
        let mut process = self.spawn(command)?;
        let (stdin, stdout, stderr) = (
            process.stdin.take(),
            process.stdout.take(),
            process.stderr.take(),
        );
        let limit = command.timeout.map(|timeout| timeout * self.time_factor());
        let (stdout, stderr, status) = thread::scope(|scope| {
            let read = |stream: Option<crate::ProcessOutput>| {
                let mut bytes = Vec::new();
                let result = stream.map_or(Ok(0), |mut stream| stream.read_to_end(&mut bytes));
                (bytes, result)
            };
            let stdout = scope.spawn(move || read(stdout));
            let stderr = scope.spawn(move || read(stderr));
            scope.spawn(|| {
                // A command that does not want its input closes it; that is its business.
                if let Some(mut stdin) = stdin {
                    let _ = stdin.write_all(&command.stdin);
                }
            });
            let status = match limit {
                None => process.wait().map(Some),
                Some(limit) => process.wait_timeout(limit),
            };
            if matches!(status, Ok(None)) {
                process.cutter().cut();
            }
            let join = |handle: thread::ScopedJoinHandle<'_, _>| {
                handle
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            (join(stdout), join(stderr), status)
        });
        let Some(status) = status.map_err(|source| self.explain(source))? else {
            let text = |bytes: &[u8]| console::tail(&String::from_utf8_lossy(bytes), 40);
            return Err(NodeError::TimedOut {
                name: self.name().to_owned(),
                command: command.to_string(),
                seconds: limit.unwrap_or_default().as_secs(),
                stdout: text(&stdout.0),
                stderr: text(&stderr.0),
            });
        };
        for (_, result) in [&stdout, &stderr] {
            if result.is_err() {
                return Err(self.explain(SessionError::Lost));
            }
        }
        Ok(Output {
            status,
            stdout: stdout.0,
            stderr: stderr.0,
        })
    }

    /// Starts a command with its streams open to the caller, in the manner of [`std::process::Command::spawn`] with pipes.
    ///
    /// # Errors
    /// [`NodeError::Failed`], [`NodeError::Session`] when the program cannot be started.
    pub fn spawn(&self, command: impl Borrow<NodeCommand>) -> Result<Process, NodeError> {
        let command = command.borrow();
        let process = endpoint(&self.record)
            .open(health::patience(self.mode()))
            .and_then(|stream| Process::start(stream, command.exec(self.time_factor())))
            .map_err(|source| self.explain(source))?;
        self.watch.guard(process.cutter());
        Ok(process)
    }

    /// Whether all is well so far: the agent answers and the kernel does not complain.
    ///
    /// # Errors
    /// [`NodeError::Failed`].
    pub fn check(&self) -> Result<(), NodeError> {
        let fault = self
            .console()
            .ok()
            .as_deref()
            .and_then(console::first_fault);
        match self.watch.failure().or(fault) {
            None => Ok(()),
            Some(reason) => Err(self.failure(reason)),
        }
    }

    /// Ends the node, whoever started it, and says whether all was well until then.
    ///
    /// # Errors
    /// [`NodeError::Failed`] when its kernel has complained; what went wrong in ending it.
    pub fn down(mut self) -> Result<(), NodeError> {
        let verdict = self.check();
        self.end()?;
        verdict
    }

    fn end(&mut self) -> Result<(), NodeError> {
        match self.owned.take() {
            Some(mut owned) => {
                // It cannot have been reaped, so this is no stranger.
                let _ = owned.child.kill();
                let _ = owned.child.wait();
                network::sweep()?;
                Ok(owned.run_dir.remove()?)
            }
            None => end_detached(&self.record),
        }
    }

    /// What a failed [`Process`] call means for the node: a lost connection is told as what the node died of, with the end of its
    /// console. Blocks for up to 2 s, until that is known.
    pub fn explain(&self, source: SessionError) -> NodeError {
        let died = matches!(
            source,
            SessionError::Lost | SessionError::Connect { .. } | SessionError::Wire(_)
        );
        if died {
            // The watch notices within a moment, and knows more.
            let deadline = Instant::now() + Duration::from_secs(2);
            while Instant::now() < deadline {
                if let Some(reason) = self.watch.failure() {
                    return self.failure(reason);
                }
                thread::sleep(Duration::from_millis(50));
            }
        }
        NodeError::Session {
            name: self.name().to_owned(),
            source,
        }
    }

    fn failure(&self, reason: String) -> NodeError {
        NodeError::Failed {
            name: self.name().to_owned(),
            reason,
            console: console::tail(&self.console().unwrap_or_default(), 80),
        }
    }
}

impl Drop for Node {
    /// Ends a node that this process owns.
    ///
    /// # Panics
    /// When its kernel has complained, so that the test fails; not while the thread panics already.
    fn drop(&mut self) {
        if self.owned.is_none() {
            return;
        }
        let verdict = self.check();
        let ended = self.end();
        if let Err(error) = verdict.and(ended) {
            if thread::panicking() {
                eprintln!("{error}");
            } else {
                panic!("{error}");
            }
        }
    }
}

pub(crate) const CONSOLE: &str = "console.log";
pub(crate) const LOG: &str = "qemu.log";

pub(crate) fn endpoint(record: &Record) -> Endpoint {
    Endpoint {
        port: record.port,
        token: record.token,
    }
}

/// Ends a node that has no owner. Its lock is free when QEMU has gone, and the next `up` sweeps; but nothing shall wait for that.
fn end_detached(record: &Record) -> Result<(), NodeError> {
    let directory = rundir::base()?.join(&record.name);
    if rundir::start_time(record.pid).is_ok_and(|start| start == record.start_time) {
        match kill(Pid::from_raw(record.pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => return Err(failed("end QEMU of", &directory)(errno.into())),
        }
    }
    rundir::remove_when_free(&directory)?;
    Ok(network::sweep()?)
}
