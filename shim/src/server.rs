//! The pod's server: what `start` leaves running.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{info, warn};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::args::Invocation;
use crate::bootstrap::{remove_dead_socket, socket_path};
use crate::events::Events;
use crate::host::deadline::Deadline;
use crate::host::directory::{self, PodLock, PodPaths};
use crate::host::{children, cleanup};
use crate::log;
use crate::pod::{chain, host_side, log_hooks};
use crate::service::{Shim, rpc, sandbox_rpc};

/// Threads for what waits; what blocks has threads of its own, which go again.
const WORKER_THREADS: usize = 2;
/// How long the last events may take: containerd is about to hang up.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the shim outlives its pod without a word from containerd.
const LINGER: Duration = Duration::from_secs(30);
/// How long the last answers may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a dead shim's pod is left to the `delete` that containerd runs for
/// it: twice what that has.
const SWEEP_GRACE: Duration = Duration::from_secs(10);
/// How long the rest of it may take, hooks and all.
const SWEEP_TIMEOUT: Duration = Duration::from_mins(1);

/// Why there is no server.
#[derive(Debug, Error)]
pub enum Error {
    /// The pod's directory.
    #[error(transparent)]
    Directory(#[from] directory::Error),
    /// Something that a server needs of the host.
    #[error("{operation}")]
    Io {
        /// As in "watch for signals".
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The library's part.
    #[error("serve containerd")]
    Serve(#[source] ttrpc::Error),
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Io {
        operation,
        source: source.into(),
    }
}

/// Serves until containerd wants the shim to go, and leaves nothing behind.
/// Standard input is the listening socket, standard output the pod's lock.
pub fn serve(invocation: &Invocation) -> Result<(), Error> {
    let inherit = failed("take the inherited descriptors");
    let (listener, lock) = take_descriptors().map_err(inherit)?;
    let bundle = invocation
        .bundle
        .clone()
        .unwrap_or_else(|| PathBuf::from("."));
    log::init(&bundle, invocation.debug);
    // Out of containerd's session, and the parent of whatever hooks leave.
    rustix::process::setsid().map_err(failed("begin a session"))?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(failed("become a subreaper"))?;
    let paths = PodPaths::try_new(&invocation.namespace, &invocation.id)?;
    let served = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .enable_all()
        .build()
        .map_err(failed("start a runtime"))?
        .block_on(run(&paths, listener, PodLock::from_descriptor(lock)));
    if let Err(error) = &served {
        tracing::error!("{}", chain(error));
    }
    served
}

/// Moves the descriptors of `start` away from the standard streams, which
/// become `/dev/null` before any child can inherit them.
fn take_descriptors() -> io::Result<(UnixListener, OwnedFd)> {
    let listener = io::stdin().as_fd().try_clone_to_owned()?;
    let lock = io::stdout().as_fd().try_clone_to_owned()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok((UnixListener::from(listener), lock))
}

async fn run(paths: &PodPaths, listener: UnixListener, lock: PodLock) -> Result<(), Error> {
    let watch = |kind| signal(kind).map_err(failed("watch for signals"));
    let mut terminate = watch(SignalKind::terminate())?;
    let mut interrupt = watch(SignalKind::interrupt())?;
    tokio::spawn(reap(watch(SignalKind::child())?));

    let ttrpc_address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let events = Events::start(&ttrpc_address, paths.namespace());
    let shim = Shim::new(paths.clone(), events, host_side::maker(paths.clone(), lock));
    let listener = Listener::try_from(listener).map_err(failed("listen"))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(rpc::services(&shim))
        .register_service(sandbox_rpc::services(&shim));
    server.start().await.map_err(Error::Serve)?;
    spawn_sweep(paths);
    info!(pod = paths.id(), "serving");

    tokio::select! {
        () = shim.done(LINGER) => {}
        _ = terminate.recv() => shim.terminate().await,
        _ = interrupt.recv() => shim.terminate().await,
    }
    shim.events().flush(FLUSH_TIMEOUT).await;
    if tokio::time::timeout(CLOSE_TIMEOUT, server.shutdown())
        .await
        .is_err()
    {
        warn!("containerd still waits for an answer; leaving");
    }
    if shim.is_unused().await {
        remove_directory(paths);
    }
    info!(pod = paths.id(), "done");
    Ok(())
}

/// Reaps what hooks leave behind, without waiting for it.
async fn reap(mut ended: Signal) {
    while ended.recv().await.is_some() {
        children::reap_orphans();
    }
}

/// Cleans up, in the background, what a `delete` that was cut short has left in
/// this namespace: containerd runs it only once.
fn spawn_sweep(paths: &PodPaths) {
    let (root, namespace) = (paths.root().to_owned(), paths.namespace().to_owned());
    // A thread, since the runtime would wait for a blocking task at its end,
    // and a sweep can be cut short as well.
    let spawned = std::thread::Builder::new()
        .name("sweep".to_owned())
        .spawn(move || sweep(&root, &namespace, SWEEP_GRACE));
    if let Err(error) = spawned {
        warn!("what dead shims have left is not looked for: {error}");
    }
}

fn sweep(root: &Path, namespace: &str, grace: Duration) {
    let orphans = cleanup::orphans(root, namespace);
    if orphans.is_empty() {
        return;
    }
    std::thread::sleep(grace);
    for orphan in orphans {
        let pod = orphan.pod.id();
        match orphan.remove(Deadline::after(SWEEP_TIMEOUT)) {
            Ok(None) => {}
            Ok(Some(failures)) => {
                info!(pod, "removed what a dead shim had left");
                log_hooks(failures);
                remove_dead_socket(&orphan.pod);
            }
            Err(error) => warn!(pod, "what a dead shim has left stays: {}", chain(&error)),
        }
    }
}

/// Removes what `start` made for a pod that never was. Its lock is still ours:
/// nobody else's socket has that name.
fn remove_directory(paths: &PodPaths) {
    let _ = fs::remove_file(socket_path(paths));
    if let Err(error) = paths.remove() {
        warn!("the pod's directory stays: {}", chain(&error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::record::{Process, Record};

    #[test]
    fn remove_directory_of_the_only_pod_takes_its_namespaces_along() {
        let root = tempfile::tempdir().expect("directory");
        let paths = PodPaths::below(root.path(), "default", "c").expect("is an id");
        let _lock = paths.create_and_lock().expect("is free");
        let _listener = UnixListener::bind(socket_path(&paths)).expect("binds");
        remove_directory(&paths);
        assert_eq!(fs::read_dir(root.path()).expect("lists").count(), 0);
    }

    #[test]
    fn sweep_removes_the_pods_of_dead_shims_only() {
        let root = tempfile::tempdir().expect("directory");
        let own = Process::of(std::process::id());
        let dead = Process {
            start_ticks: own.start_ticks - 1,
            ..own
        };
        let directory = |id: &str, shim: Process| {
            let paths = PodPaths::below(root.path(), "default", id).expect("is an id");
            drop(paths.create_and_lock().expect("is free"));
            let mut record = Record::new();
            record.shim = Some(shim);
            record.write(&paths.record()).expect("writes");
            paths.directory()
        };
        let (alive, dead) = (directory("alive", own), directory("dead", dead));
        sweep(root.path(), "default", Duration::ZERO);
        assert!(alive.exists() && !dead.exists());
    }
}
