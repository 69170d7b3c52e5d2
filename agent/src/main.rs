//! The guest agent: PID 1 of a pod's VM. It creates the pod's containers,
//! relays their standard streams, reaps every process, and powers the guest off
//! when told. The same binary is the single-threaded helper that makes each
//! container.

mod clock;
mod containers;
mod entropy;
mod guest;
mod kernel_calls;
mod nonblocking;
mod pod;
mod reaper;
mod service;
mod stdio;
mod streams;

use std::{
    env,
    fs::File,
    io,
    sync::{Arc, Mutex},
};

use agent_protocol::{AGENT_PORT, READY_PORT, STREAM_PORT, service::create_agent};
use anyhow::{Context, Result, ensure};
use nix::{
    sys::reboot::{RebootMode, reboot},
    unistd::{dup2_stderr, dup2_stdout, getpid, sync},
};
use tokio::{runtime, sync::Notify};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::{Server, transport::Listener};

use crate::{containers::Containers, reaper::Reaper, service::Service, stdio::StreamTable};

fn main() -> Result<()> {
    if env::args_os()
        .nth(1)
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
    guest::prepare_cgroups()?;
    runtime::Builder::new_current_thread()
        .enable_all()
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

/// Serves both ports until the pod is to end.
async fn serve() -> Result<()> {
    let reaper = Arc::new(Reaper::default());
    reaper.spawn().context("cannot listen for SIGCHLD")?;
    let streams = Arc::new(StreamTable::default());
    let containers = Arc::new(Containers::new(reaper, Arc::clone(&streams)));
    let shutdown = Arc::new(Notify::new());
    let service = Service::new(containers, Arc::clone(&shutdown));

    let stream_listener = listen(STREAM_PORT)?;
    let mut server = Server::new()
        .add_listener(Listener::from(listen(AGENT_PORT)?))
        .register_service(create_agent(Arc::new(service)));
    server.start().await.context("cannot serve ttrpc")?;
    tokio::spawn(serve_streams(stream_listener, streams));
    knock().await;

    shutdown.notified().await;
    server.shutdown().await.context("cannot stop serving")
}

fn listen(port: u32) -> Result<VsockListener> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .with_context(|| format!("cannot listen on vsock port {port}"))
}

async fn serve_streams(listener: VsockListener, table: Arc<StreamTable>) {
    loop {
        match listener.accept().await {
            Ok((connection, _)) => {
                let table = Arc::clone(&table);
                tokio::spawn(async move {
                    if let Err(error) = streams::serve(table, connection).await {
                        tracing::warn!(%error, "stream ended");
                    }
                });
            }
            Err(error) => {
                tracing::error!(%error, "cannot accept streams");
                return;
            }
        }
    }
}

/// Tells the monitor that both ports listen. It refuses the connection, as it
/// refuses every one from a guest: the attempt is the message.
async fn knock() {
    let refused = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, READY_PORT)).await;
    if refused.is_ok() {
        tracing::warn!("the host took a connection that it should refuse");
    }
}
