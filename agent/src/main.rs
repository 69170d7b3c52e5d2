//! The guest agent: PID 1 of a pod's VM. It creates the pod's containers,
//! relays their standard streams, reaps every process, and powers the guest off
//! when told. The same binary is the single-threaded helper that makes each
//! container, and the init of a PID namespace that they share.

mod apparmor;
mod clock;
mod containers;
mod cpus;
mod entropy;
mod forward;
mod guest;
mod guest_memory;
mod kernel_calls;
mod namespaces;
mod network;
mod nonblocking;
mod pid_namespaces;
mod pod;
mod reaper;
mod service;
mod stats;
mod status;
mod stdio;
mod streams;
mod sysctls;

use std::{
    env,
    ffi::OsStr,
    fs::File,
    io,
    os::fd::{AsFd, RawFd},
    sync::{Arc, Mutex},
    time::Duration,
};

use agent_protocol::{AGENT_PORT, FORWARD_PORT, READY_PORT, STREAM_PORT, service::create_agent};
use anyhow::{Context, Result, ensure};
use nix::{
    sys::{
        reboot::{RebootMode, reboot},
        socket::{VsockAddr as PeerAddress, getpeername},
    },
    unistd::{dup2_stderr, dup2_stdout, getpid, sync},
};
use tokio::{runtime, sync::Notify, task::spawn_blocking, time::sleep};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use ttrpc::{
    AcceptHook, ConnectionData, HookError, HookOutput,
    r#async::{Server, transport::Listener},
};

use crate::{
    containers::Containers, nonblocking::NonBlocking, reaper::Reaper, service::Service,
    stdio::StreamTable,
};

/// Ten years: a thread of the pool that has ended may not be had again.
const FOR_EVER: Duration = Duration::from_hours(10 * 365 * 24);
/// Pause after a failed accept, whose cause (descriptors or memory that ran out)
/// a while may cure.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

fn main() -> Result<()> {
    let mut arguments = env::args_os();
    match arguments.next().as_deref().and_then(OsStr::to_str) {
        Some(pid_namespaces::POD_INIT) => pid_namespaces::pod_init_main(),
        Some(namespaces::MAKER) => namespaces::maker_main(),
        _ => {}
    }
    if arguments
        .next()
        .is_some_and(|argument| argument == agent_container::HELPER_ARGUMENT)
    {
        agent_container::helper_main();
    }
    ensure!(
        getpid().as_raw() == 1,
        "bulkhead-agent is PID 1 of a pod's VM and runs nowhere else"
    );
    guest::leave_initramfs()?;
    guest::mount_own_file_systems()?;
    log_to_kernel().context("cannot write to /dev/kmsg")?;
    guest::raise_open_files()?;
    guest::prepare_cgroups()?;
    runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(FOR_EVER)
        .build()
        .context("cannot start the asynchronous runtime")?
        .block_on(serve())?;
    pod::leave();
    sync();
    reboot(RebootMode::RB_POWER_OFF).context("cannot power off")?;
    Ok(())
}

/// The kernel's log is where a guest's last lines are looked for, so the
/// agent's go there too, one record each.
fn log_to_kernel() -> io::Result<()> {
    let kernel_log = File::options().write(true).open("/dev/kmsg")?;
    dup2_stdout(&kernel_log)?;
    dup2_stderr(&kernel_log)?;
    tracing_subscriber::fmt()
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .with_writer(Mutex::new(kernel_log))
        .init();
    Ok(())
}

/// Serves its ports until the pod is to end.
async fn serve() -> Result<()> {
    // tokio panics when it needs a thread for blocking calls, cannot have one and
    // has none; with one, the calls wait for it. So the first is started
    // before there is anything that could take the guest's processes.
    spawn_blocking(|| ())
        .await
        .context("cannot start a thread for blocking calls")?;
    let reaper = Arc::new(Reaper::default());
    reaper.spawn().context("cannot listen for SIGCHLD")?;
    let streams = Arc::new(StreamTable::default());
    let containers = Arc::new(Containers::new(reaper, Arc::clone(&streams)));
    let shutdown = Arc::new(Notify::new());
    let service = Service::new(containers, Arc::clone(&shutdown));

    let stream_listener = listen(STREAM_PORT)?;
    let forward_listener = listen(FORWARD_PORT)?;
    let mut server = Server::new()
        .add_listener(Listener::from(listen(AGENT_PORT)?))
        .register_service(create_agent(Arc::new(service)))
        .set_accept_hook(HostOnly);
    server.start().await.context("cannot serve ttrpc")?;
    tokio::spawn(serve_each(stream_listener, move |connection| {
        serve_stream(Arc::clone(&streams), connection)
    }));
    tokio::spawn(serve_each(forward_listener, forward::serve));
    knock().await;

    shutdown.notified().await;
    server.shutdown().await.context("cannot stop serving")
}

fn listen(port: u32) -> Result<VsockListener> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .with_context(|| format!("cannot listen on vsock port {port}"))
}

async fn serve_stream(table: Arc<StreamTable>, connection: VsockStream) -> io::Result<()> {
    let descriptor = connection.as_fd().try_clone_to_owned()?;
    // Watched once, by what splices.
    drop(connection);
    let connection = NonBlocking::try_new(descriptor).map_err(|(_, error)| error)?;
    streams::serve(table, connection).await
}

/// Serves each connection of a listener by itself.
async fn serve_each<S>(listener: VsockListener, serve: impl Fn(VsockStream) -> S)
where
    S: Future<Output = io::Result<()>> + Send + 'static,
{
    loop {
        match listener.accept().await {
            Ok((_, peer)) if peer.cid() != VMADDR_CID_HOST => {
                tracing::warn!(%peer, "refused a connection from the guest itself");
            }
            Ok((connection, _)) => {
                let served = serve(connection);
                tokio::spawn(async move {
                    if let Err(error) = served.await {
                        tracing::warn!(%error, "stream ended");
                    }
                });
            }
            Err(error) => {
                tracing::error!(%error, "cannot accept a connection");
                sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
}

/// Lets only the host in. A container can connect to the guest's own ports as
/// soon as its kernel has a vsock loopback, and would own the pod.
#[derive(Debug)]
struct HostOnly;

impl AcceptHook for HostOnly {
    fn on_accept(&self, connection: RawFd) -> Result<HookOutput, HookError> {
        let peer =
            getpeername::<PeerAddress>(connection).map_err(|errno| HookError::Io(errno.into()))?;
        if peer.cid() == VMADDR_CID_HOST {
            Ok(HookOutput {
                data: ConnectionData::default(),
                payload_transform: None,
            })
        } else {
            Err(HookError::Rejected(format!("{peer} is not the host")))
        }
    }
}

/// Tells the monitor that all ports listen. It refuses the connection, as it
/// refuses every one from a guest: the attempt is the message.
async fn knock() {
    let refused = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, READY_PORT)).await;
    if refused.is_ok() {
        tracing::warn!("the host took a connection that it should refuse");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn on_accept_peer_that_is_not_the_host_is_refused() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("socket pair");
        assert!(HostOnly.on_accept(ours.as_raw_fd()).is_err());
    }
}
