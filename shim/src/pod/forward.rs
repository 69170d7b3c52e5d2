//! Port-forward: connections to the loopback of the pod's network namespace on the
//! host go to the same port in the guest.

use std::io;
use std::time::Duration;

use agent_protocol::{FORWARD_PORT, STREAM_ACCEPTED};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, warn};

use super::host_side::HostSide;
use super::vsock::{self, Vsock};
use super::{Error, Pod, chain};
use crate::host::loopback::Loopback;

/// Pause after a failed accept, whose cause (descriptors that ran out) a while may
/// cure.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Why a connection is not forwarded.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    /// The way into the guest.
    #[error(transparent)]
    Vsock(#[from] vsock::Error),
    /// Either stream.
    #[error(transparent)]
    Stream(#[from] io::Error),
    /// The guest's agent.
    #[error("nothing in the pod listens there")]
    Refused,
}

impl Pod {
    /// Forwards connections to the pod's loopback from now on, until its VM has
    /// ended. A pod for which that does not work is a pod all the same: it is
    /// logged.
    pub async fn forward_ports(&self) {
        if let Err(error) = self.try_forward_ports().await {
            warn!("port-forward does not work: {}", chain(&error));
        }
    }

    async fn try_forward_ports(&self) -> Result<(), Error> {
        let listening = self.on_host(HostSide::listen_on_loopback).await?;
        let Some(loopback) = listening.transpose()? else {
            return Ok(());
        };
        let listener = loopback.listener.try_clone();
        let listener = listener.and_then(TcpListener::from_std);
        let listener = listener.map_err(Error::Forward)?;
        let pod = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = pod.machine.ended() => {}
                () = serve(&pod.vsock, &listener, &loopback) => {}
            }
        });
        Ok(())
    }
}

/// Connections come as long as `_loopback` is there.
async fn serve(vsock: &Vsock, listener: &TcpListener, _loopback: &Loopback) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                tokio::spawn(forward(vsock.clone(), client));
            }
            Err(error) => {
                warn!("port-forward: {error}");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
}

async fn forward(vsock: Vsock, mut client: TcpStream) {
    // Nothing is rewritten on the way: what it was connected to is its own address.
    let port = client.local_addr().map_or(0, |address| address.port());
    if let Err(error) = relay(&vsock, &mut client, port).await {
        debug!(port, "port-forward: {}", chain(&error));
        // The client sees what it would have seen of the port itself.
        let _ = client.set_zero_linger();
    }
}

async fn relay(vsock: &Vsock, client: &mut TcpStream, port: u16) -> Result<(), ForwardError> {
    let mut guest = vsock.connect(FORWARD_PORT).await?;
    guest.write_u16(port).await?;
    if guest.read_u8().await? != STREAM_ACCEPTED {
        return Err(ForwardError::Refused);
    }
    copy_bidirectional(client, &mut guest).await?;
    Ok(())
}
