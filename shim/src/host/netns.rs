//! The pod's network namespace on the host.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};
use thiserror::Error;

/// Why the network namespace cannot be had.
#[derive(Debug, Error)]
pub enum Error {
    /// The spec has no network namespace: the host's network is asked for.
    #[error(
        "host network is not supported: a pod's network ends at its VM; give the container a network namespace"
    )]
    HostNetwork,
    /// A step failed.
    #[error("{operation} {path}")]
    Io {
        /// As in "open network namespace".
        operation: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn failed<E: Into<io::Error>>(operation: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
    move |source| Error::Io {
        operation,
        path: path.to_owned(),
        source: source.into(),
    }
}

/// What the spec asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// A namespace of our making.
    New,
    /// One that exists, by path.
    Existing(PathBuf),
}

impl Network {
    /// Reads `linux.namespaces` (OCI runtime-spec, config-linux.md,
    /// "Namespaces": a type that is not listed is the runtime's own).
    pub fn from_spec(spec: &Spec) -> Result<Self, Error> {
        let namespaces = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref());
        let network = namespaces
            .into_iter()
            .flatten()
            .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
            .ok_or(Error::HostNetwork)?;
        Ok(match network.path() {
            Some(path) if !path.as_os_str().is_empty() => Self::Existing(path.clone()),
            _ => Self::New,
        })
    }
}

/// Opens an existing network namespace.
pub fn open_existing(path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let opened =
        open(path, flags, Mode::empty()).map_err(failed("open network namespace", path))?;
    let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    let theirs = fstat(&opened).map_err(failed("open network namespace", path))?;
    let ours = rustix::fs::stat("/proc/self/ns/net").map_err(failed("look at", path))?;
    if identity(theirs) == identity(ours) {
        return Err(Error::HostNetwork);
    }
    Ok(opened)
}

/// Makes a network namespace with its loopback up and binds it at `path`,
/// where it lives until [`remove`].
pub fn create(path: &Path) -> Result<OwnedFd, Error> {
    File::create_new(path).map_err(failed("make the file of network namespace", path))?;
    let made = on_thread_of_new_namespace(|| {
        raise_loopback().map_err(failed("bring up the loopback of network namespace", path))?;
        mount_bind("/proc/thread-self/ns/net", path)
            .map_err(failed("bind network namespace at", path))
    });
    made.and_then(|()| open_existing(path)).inspect_err(|_| {
        let _ = remove(path);
    })
}

/// Runs `work` on a thread with a network namespace of its own; the rest of
/// this process stays where it is.
fn on_thread_of_new_namespace(
    work: impl FnOnce() -> Result<(), Error> + Send,
) -> Result<(), Error> {
    let own = Path::new("of this thread");
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(failed("make network namespace", own))?;
            work()
        });
        worker
            .join()
            .unwrap_or_else(|_| Err(failed("make network namespace", own)(Errno::IO)))
    })
}

/// Sets `IFF_UP` on the loopback, which is always the first link of a
/// namespace, by one netlink request (rtnetlink(7), `RTM_NEWLINK`).
pub(super) fn raise_loopback() -> Result<(), Errno> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const NLM_F_ACK: u16 = 4;
    const IFF_UP: u32 = 1;
    const LOOPBACK_INDEX: i32 = 1;
    /// `struct nlmsghdr` and `struct ifinfomsg`, 16 bytes each.
    const BYTES: u32 = 32;

    let mut request = Vec::with_capacity(BYTES as usize);
    request.extend(BYTES.to_ne_bytes());
    request.extend(RTM_NEWLINK.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    request.extend([0; 8]); // sequence, port
    request.extend([0; 4]); // family, padding, device type
    request.extend(LOOPBACK_INDEX.to_ne_bytes());
    request.extend(IFF_UP.to_ne_bytes());
    request.extend(IFF_UP.to_ne_bytes()); // which flags change

    // Protocol 0 of this family is NETLINK_ROUTE.
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )?;
    send(&socket, &request, SendFlags::empty())?;
    let mut answer = [0_u8; 256];
    let (length, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    // `struct nlmsgerr`: the negative errno comes first, 0 means done.
    let error = answer[..length]
        .get(16..20)
        .and_then(|bytes| bytes.try_into().ok());
    match error.map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(errno) => Err(Errno::from_raw_os_error(-errno)),
        None => Err(Errno::PROTO),
    }
}

/// Lets go of a network namespace bound at `path`. Idempotent.
pub fn remove(path: &Path) -> Result<(), Error> {
    match unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(source) => return Err(failed("unmount network namespace", path)(source)),
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(failed("remove the file of network namespace", path)(source))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::mounts::tests::private_mounts;
    use nix::sched::setns;

    #[test]
    fn create_makes_a_namespace_with_loopback_up_and_leaves_ours() {
        let Some(base) = private_mounts() else { return };
        let path = base.path().join("netns");
        let before = fs::read_link("/proc/thread-self/ns/net").expect("ours");
        let made = create(&path).expect("creates");
        assert_eq!(
            fs::read_link("/proc/thread-self/ns/net").expect("ours"),
            before
        );
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                setns(&made, CloneFlags::CLONE_NEWNET).expect("enters");
                std::net::UdpSocket::bind("127.0.0.1:0")
                    .and_then(|socket| socket.connect("127.0.0.1:9"))
                    .expect("the loopback routes");
            });
            worker.join().expect("no panic");
        });
        remove(&path).expect("removes");
        remove(&path).expect("removes what is not there");
        assert!(!path.exists());
    }

    #[test]
    fn open_existing_of_the_hosts_own_is_refused() {
        let error = open_existing(Path::new("/proc/self/ns/net")).expect_err("is refused");
        assert!(matches!(error, Error::HostNetwork), "{error:?}");
    }

    #[test]
    fn from_spec_without_a_network_namespace_is_the_hosts_and_refused() {
        let spec = |namespaces: &str| -> Spec {
            let text =
                format!(r#"{{"ociVersion":"1.2.0","linux":{{"namespaces":[{namespaces}]}}}}"#);
            serde_json::from_str(&text).expect("is a spec")
        };
        let none = spec(r#"{"type":"pid"}"#);
        assert!(matches!(Network::from_spec(&none), Err(Error::HostNetwork)));
        let new = spec(r#"{"type":"network"}"#);
        assert_eq!(Network::from_spec(&new).expect("is new"), Network::New);
        let path = spec(r#"{"type":"network","path":"/run/netns/x"}"#);
        let existing = Network::Existing(PathBuf::from("/run/netns/x"));
        assert_eq!(Network::from_spec(&path).expect("is there"), existing);
    }
}
