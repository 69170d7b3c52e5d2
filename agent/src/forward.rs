//! Connections that the host forwards to a port of the pod: each a vsock
//! connection, introduced by the port.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::Path,
    thread,
    time::Duration,
};

use agent_protocol::{POD_DIR, STREAM_ACCEPTED, STREAM_REFUSED};
use nix::{
    ifaddrs::getifaddrs,
    sched::{CloneFlags, setns},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    task::spawn_blocking,
};
use tokio_vsock::VsockStream;

/// How long one of the pod's own addresses may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves one connection to the forward port until both sides have ended.
///
/// # Errors
/// When nobody listens on the port, or a connection breaks.
pub async fn serve(mut connection: VsockStream) -> io::Result<()> {
    let port = connection.read_u16().await?;
    let connected = spawn_blocking(move || connect(port)).await?;
    let connected = connected.and_then(|stream| {
        stream.set_nonblocking(true)?;
        tokio::net::TcpStream::from_std(stream)
    });
    let mut stream = match connected {
        Ok(stream) => stream,
        Err(error) => {
            connection.write_all(&[STREAM_REFUSED]).await?;
            return Err(error);
        }
    };
    connection.write_all(&[STREAM_ACCEPTED]).await?;
    copy_bidirectional(&mut connection, &mut stream)
        .await
        .map(drop)
}

/// Connects to whoever listens in the pod's network namespace: on a loopback
/// address, where programs listen that are only meant for this, or on another of
/// its own.
fn connect(port: u16) -> io::Result<TcpStream> {
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            let namespace = File::open(Path::new(POD_DIR).join("ns/net"))?;
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            connect_here(port)
        });
        let panicked = || io::Error::other("the thread panicked");
        inside.join().unwrap_or_else(|_| Err(panicked()))
    })
}

fn connect_here(port: u16) -> io::Result<TcpStream> {
    let mut addresses = vec![
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ];
    addresses.extend(own_addresses()?);
    let mut refusal = io::ErrorKind::ConnectionRefused.into();
    for address in addresses {
        match TcpStream::connect_timeout(&SocketAddr::new(address, port), CONNECT_TIMEOUT) {
            Ok(stream) => return Ok(stream),
            Err(error) => refusal = error,
        }
    }
    Err(refusal)
}

/// Those of the calling thread's network namespace that can be connected to without
/// naming an interface.
fn own_addresses() -> io::Result<Vec<IpAddr>> {
    let own = getifaddrs()?.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    });
    Ok(own
        .filter(|address| match address {
            IpAddr::V4(v4) => !v4.is_loopback(),
            IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn connect_here_finds_who_listens_on_either_loopback_and_else_is_refused() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                println!("SKIP: no {address} on this machine");
                continue;
            };
            let port = listener.local_addr().expect("is bound").port();
            let stream = connect_here(port).expect("connects");
            let peer = stream.peer_addr().expect("has one");
            assert_eq!(peer, listener.local_addr().expect("is bound"));
            drop((stream, listener));
            connect_here(port).expect_err("nobody listens");
        }
    }
}
