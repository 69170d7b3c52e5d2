//! The interfaces of the pod's network namespace, and the way of their traffic
//! into the VM.
//!
//! Whatever configured the namespace (CNI, `nerdctl`'s hooks, docker) put
//! interfaces with addresses and routes into it. Each Ethernet interface gets a tap,
//! and whatever arrives at either of the two is sent out by the other, before the
//! namespace's own stack sees it. The guest gets an interface of the same name,
//! address and MTU at the other end of the tap, and the same tables. What the
//! namespace has stays there, for those who look it up, but is deaf.

mod redirect;
mod tables;
mod tap;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use agent_protocol::rtnetlink::{self, Rtnetlink};
use nix::sched::{CloneFlags, setns};
use thiserror::Error;

pub use tables::{Interface, Tables};

/// Multicast groups of rtnetlink(7), `linux/rtnetlink.h`: links, neighbours,
/// and of both families addresses, routes and rules.
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];

/// Why the pod's network cannot be had.
#[derive(Debug, Error)]
pub enum Error {
    /// The namespace.
    #[error("enter the pod's network namespace")]
    Enter(#[source] io::Error),
    /// Its tables.
    #[error("{operation} in the pod's network namespace")]
    Tables {
        /// As in "list interfaces".
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
    /// A tap.
    #[error("make a tap for interface {interface}: {}", tap::HINT)]
    Tap {
        /// The namespace's interface.
        interface: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The way between the two.
    #[error("{operation} interface {interface} and the VM: {}", redirect::HINT)]
    Redirect {
        /// As in "connect".
        operation: &'static str,
        /// The namespace's interface.
        interface: String,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
}

/// What the pod's namespace has, and what is new to the VM.
#[derive(Debug)]
pub struct Scan {
    /// All of it.
    pub tables: Tables,
    /// For each interface that was not connected, by its index: the tap that it is
    /// connected to now. When the last descriptor of a tap is closed it is gone;
    /// [`disconnect`] then is due.
    pub taps: Vec<(u32, OwnedFd)>,
}

/// Reads the namespace's tables, and connects those interfaces to taps that
/// `connected` does not name by their indexes.
///
/// # Errors
/// What the kernel refused; nothing is connected then that was not before.
pub fn scan(namespace: BorrowedFd<'_>, connected: &BTreeSet<u32>) -> Result<Scan, Error> {
    inside(namespace, |netlink| {
        let tables = tables::read(netlink)?;
        let mut taps = Vec::new();
        for interface in &tables.interfaces {
            if connected.contains(&interface.index) {
                continue;
            }
            match connect(netlink, interface) {
                Ok(tap) => taps.push((interface.index, tap)),
                Err(error) => {
                    for (index, _) in &taps {
                        let _ = redirect::remove(netlink, *index);
                    }
                    return Err(error);
                }
            }
        }
        Ok(Scan { tables, taps })
    })
}

/// Lets an interface's traffic reach the namespace's own stack again. Does nothing
/// for one that has gone.
pub fn disconnect(namespace: BorrowedFd<'_>, index: u32) -> Result<(), Error> {
    inside(namespace, |netlink| {
        redirect::remove(netlink, index).map_err(|source| Error::Redirect {
            operation: "separate",
            interface: format!("number {index}"),
            source,
        })
    })
}

/// A non-blocking socket that is readable when something of the namespace's
/// tables has changed.
pub fn watch(namespace: BorrowedFd<'_>) -> Result<Rtnetlink, Error> {
    inside(namespace, |_| {
        let watched = Rtnetlink::open().and_then(|netlink| {
            netlink.subscribe(&GROUPS)?;
            netlink.set_nonblocking()?;
            Ok(netlink)
        });
        watched.map_err(|source| Error::Tables {
            operation: "listen for changes",
            source,
        })
    })
}

fn connect(netlink: &mut Rtnetlink, interface: &Interface) -> Result<OwnedFd, Error> {
    let failed = |source| Error::Redirect {
        operation: "connect",
        interface: interface.name.clone(),
        source,
    };
    let tap = tap::Tap::open(interface.index).map_err(|source| Error::Tap {
        interface: interface.name.clone(),
        source,
    })?;
    tap::silence(&tap.name);
    let index = tables::index_of(netlink, &tap.name).map_err(failed)?;
    tap::set_up(netlink, index, interface.mtu).map_err(failed)?;
    redirect::add(netlink, interface.index, index)
        .and_then(|()| redirect::add(netlink, index, interface.index))
        .inspect_err(|_| {
            let _ = redirect::remove(netlink, interface.index);
        })
        .map_err(failed)?;
    Ok(tap.descriptor)
}

/// Runs `work` on a thread in the namespace, with a socket to its tables; the rest
/// of this process stays where it is.
fn inside<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce(&mut Rtnetlink) -> Result<T, Error> + Send,
) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWNET)
                .map_err(|errno| Error::Enter(errno.into()))?;
            let mut netlink = Rtnetlink::open().map_err(|source| Error::Tables {
                operation: "open a socket",
                source,
            })?;
            work(&mut netlink)
        });
        let panicked = || Error::Enter(io::Error::other("its thread panicked"));
        worker.join().unwrap_or_else(|_| Err(panicked()))
    })
}
