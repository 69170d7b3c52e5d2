//! The loopback of the pod's network namespace, on which nothing listens: the
//! pod's programs are in the guest. Who connects there (containerd, to forward a
//! port) is given to one listener of ours, whatever the port.
//!
//! A program of type `BPF_PROG_TYPE_SK_LOOKUP` names the listener for each
//! connection to 127.0.0.0/8 or `::1`. Nothing is translated, so that the socket
//! still knows to what port it was opened, and nothing is opened to the pod's
//! network, whose frames do not reach the namespace's stack.

mod program;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use thiserror::Error;

/// Why the loopback cannot be listened on.
#[derive(Debug, Error)]
#[error(
    "{operation} on the loopback of the pod's network namespace: check that the host's kernel has CONFIG_BPF_SYSCALL and CONFIG_INET"
)]
pub struct Error {
    /// As in "listen".
    operation: &'static str,
    /// What the kernel said.
    #[source]
    source: io::Error,
}

fn failed(operation: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error { operation, source }
}

/// A listener for all TCP connections to a namespace's loopback.
#[derive(Debug)]
pub struct Loopback {
    /// Non-blocking. A connection's own address is the one that it was opened to.
    pub listener: TcpListener,
    /// While it is open, connections come to the listener.
    _program: OwnedFd,
}

impl Loopback {
    /// Listens on a namespace's loopback.
    pub fn listen(namespace: BorrowedFd<'_>) -> Result<Self, Error> {
        let listener = std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                listener()
            });
            let panicked = || io::Error::other("its thread panicked");
            worker.join().unwrap_or_else(|_| Err(panicked()))
        });
        let listener = listener.map_err(failed("listen"))?;
        let program = program::steer(listener.as_fd(), namespace)
            .map_err(failed("steer connections to a listener"))?;
        Ok(Self {
            listener,
            _program: program,
        })
    }
}

/// Of any address and some port, since the program decides what comes to it; for
/// both families, where there are two.
fn listener() -> io::Result<TcpListener> {
    let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    let listener = TcpListener::bind(both)
        .or_else(|_| TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::net::TcpStream;

    use nix::sched::unshare;

    use crate::host::netns;

    #[test]
    fn connection_to_any_port_of_the_loopback_comes_to_the_listener_and_to_no_other_address() {
        std::thread::scope(|scope| {
            let test = scope.spawn(|| {
                if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
                    println!("SKIP: a network namespace takes root: {errno}");
                    return;
                }
                netns::raise_loopback().expect("comes up");
                let namespace = File::open("/proc/thread-self/ns/net").expect("is there");
                let refused = TcpStream::connect("127.0.0.1:7000").expect_err("nobody listens");
                assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);

                let loopback = Loopback::listen(namespace.as_fd()).expect("listens");
                for address in ["127.0.0.1:7000", "127.9.9.9:1", "[::1]:65535"] {
                    let wanted: SocketAddr = address.parse().expect("is one");
                    let _client = TcpStream::connect(wanted).expect("connects");
                    let (accepted, _) = loopback.listener.accept().expect("is there");
                    let own = accepted.local_addr().expect("has one");
                    assert_eq!(own.ip().to_canonical(), wanted.ip());
                    assert_eq!(own.port(), wanted.port());
                }
                drop(loopback);
                TcpStream::connect("127.0.0.1:7000").expect_err("nobody listens any more");
            });
            test.join().expect("passes");
        });
    }
}
