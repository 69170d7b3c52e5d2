//! The pod's network: the interfaces, addresses and routes that it has on the
//! host, in its network namespace here.

mod devices;
mod messages;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::fd::{AsRawFd, RawFd},
    path::{Path, PathBuf},
    thread,
};

use agent_protocol::{
    POD_DIR,
    api::{NetworkInterface, SetNetworkRequest},
    rtnetlink::{self, Rtnetlink},
};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage},
};
use nix::sched::{CloneFlags, setns};
use thiserror::Error;

use devices::DeviceError;
use messages::{Indexes, MessageError, reverse, translate};

/// The loopback is the first interface of every namespace.
const LOOPBACK: u32 = 1;
/// `IFNAMSIZ` of Linux, with its terminating NUL.
const IFNAMSIZ: usize = 16;
/// Bytes of an Ethernet address (`ETH_ALEN`).
const ETH_ALEN: usize = 6;

/// Why the pod has not got the network it was to have.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// An interface that cannot be one.
    #[error(
        "interface {name:?} with an Ethernet address of {mac_bytes} bytes: need a file name of 1 to 15 bytes, and 6 bytes"
    )]
    Interface {
        /// As asked for.
        name: String,
        /// As asked for.
        mac_bytes: usize,
    },
    /// A slot.
    #[error("interface {name}")]
    Device {
        /// Its name.
        name: String,
        /// Why there is no device.
        #[source]
        source: DeviceError,
    },
    /// A message.
    #[error("the host's description of the network cannot be used")]
    Message(#[from] MessageError),
    /// A thread or a namespace.
    #[error("{operation} the pod's network namespace")]
    Namespace {
        /// As in "enter".
        operation: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused.
    #[error("{operation}")]
    Kernel {
        /// As in "set up interface eth0".
        operation: String,
        /// Why.
        #[source]
        source: rtnetlink::Error,
    },
    /// A setting.
    #[error("write to {path}")]
    Setting {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn kernel(operation: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::Kernel {
        operation: operation.into(),
        source,
    }
}

/// What the host has given the pod so far.
#[derive(Debug, Default)]
pub struct Network {
    /// By slot: the name of the interface, which is in the pod's namespace.
    plugged: BTreeMap<u32, String>,
    /// The messages that hold, in their order.
    applied: Vec<Vec<u8>>,
}

impl Network {
    /// [`SetNetworkRequest`]; blocks.
    ///
    /// # Errors
    /// What the kernel refused, or what is no description of a network. What has
    /// been done until then is remembered.
    pub fn set(&mut self, request: &SetNetworkRequest) -> Result<(), NetworkError> {
        for interface in &request.interfaces {
            check(interface)?;
        }
        self.unplug_others(&request.interfaces)?;
        let namespace = Path::new(POD_DIR).join("ns/net");
        let namespace = File::open(namespace).map_err(namespace_failed("open"))?;
        for interface in &request.interfaces {
            self.plug(interface, namespace.as_raw_fd())?;
        }
        // In the namespace whose own tables it is about; the thread's end leaves it.
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&namespace, CloneFlags::CLONE_NEWNET)
                    .map_err(|errno| namespace_failed("enter")(errno.into()))?;
                self.set_inside(request)
            });
            let panicked = || namespace_failed("work in")(io::Error::other("the thread panicked"));
            inside.join().unwrap_or_else(|_| Err(panicked()))
        })
    }

    /// Lets go of the devices that the host is about to take away.
    fn unplug_others(&mut self, wanted: &[NetworkInterface]) -> Result<(), NetworkError> {
        let wanted: BTreeSet<u32> = wanted.iter().map(|interface| interface.slot).collect();
        let gone = self.plugged.keys().filter(|slot| !wanted.contains(slot));
        for slot in gone.copied().collect::<Vec<_>>() {
            let name = self.plugged.remove(&slot).unwrap_or_default();
            devices::unplug(slot).map_err(|source| NetworkError::Device { name, source })?;
        }
        Ok(())
    }

    /// Brings an interface that is new into the pod's namespace, with its name.
    fn plug(&mut self, interface: &NetworkInterface, namespace: RawFd) -> Result<(), NetworkError> {
        if self.plugged.contains_key(&interface.slot) {
            return Ok(());
        }
        let name = interface.name.clone();
        let index = devices::plug(interface.slot).map_err(|source| NetworkError::Device {
            name: name.clone(),
            source,
        })?;
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = vec![
            LinkAttribute::NetNsFd(namespace),
            LinkAttribute::IfName(name.clone()),
        ];
        let moved = Rtnetlink::open()
            .and_then(|mut netlink| netlink.change(RouteNetlinkMessage::SetLink(link), 0));
        if let Err(source) = moved {
            // It would be in the way of the next attempt.
            let _ = devices::unplug(interface.slot);
            return Err(kernel(format!("bring interface {name} into the pod"))(
                source,
            ));
        }
        self.plugged.insert(interface.slot, name);
        Ok(())
    }

    fn set_inside(&mut self, request: &SetNetworkRequest) -> Result<(), NetworkError> {
        let mut netlink = Rtnetlink::open().map_err(kernel("open a socket"))?;
        let mut indexes = Indexes::from([(LOOPBACK, LOOPBACK)]);
        for interface in &request.interfaces {
            let known = self.plugged.get_mut(&interface.slot);
            let index = set_interface(&mut netlink, known, interface)?;
            indexes.insert(interface.host_index, index);
        }
        self.set_tables(&mut netlink, &request.messages, &indexes)
    }

    /// Takes away what is no longer wanted, and adds what is new.
    fn set_tables(
        &mut self,
        netlink: &mut Rtnetlink,
        wanted: &[Vec<u8>],
        indexes: &Indexes,
    ) -> Result<(), NetworkError> {
        // Routes before the addresses that they are from.
        for index in (0..self.applied.len()).rev() {
            if wanted.contains(&self.applied[index]) {
                continue;
            }
            let bytes = self.applied.remove(index);
            // One of an interface that has gone has gone with it; and the pod may
            // have taken it away itself.
            if let Ok(message) = translate(&bytes, indexes) {
                let _ = netlink.change(reverse(message), 0);
            }
        }
        for bytes in wanted {
            if self.applied.contains(bytes) {
                continue;
            }
            let message = translate(bytes, indexes)?;
            let what = describe(&message);
            netlink
                .change(message, NLM_F_CREATE | NLM_F_REPLACE)
                .map_err(kernel(format!("add {what}")))?;
            self.applied.push(bytes.clone());
        }
        Ok(())
    }
}

fn namespace_failed(operation: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Namespace { operation, source }
}

/// The name becomes part of a path.
fn check(interface: &NetworkInterface) -> Result<(), NetworkError> {
    let NetworkInterface { name, mac, .. } = interface;
    let fits = (1..IFNAMSIZ).contains(&name.len())
        && !name.contains(['/', '\0'])
        && !matches!(name.as_str(), "." | "..");
    if fits && mac.len() == ETH_ALEN {
        return Ok(());
    }
    Err(NetworkError::Interface {
        name: name.clone(),
        mac_bytes: mac.len(),
    })
}

/// Gives an interface of this namespace its name, address and MTU, and brings it
/// up. Returns its index.
fn set_interface(
    netlink: &mut Rtnetlink,
    known: Option<&mut String>,
    interface: &NetworkInterface,
) -> Result<u32, NetworkError> {
    let name = &interface.name;
    let failed = |source| kernel(format!("set up interface {name}"))(source);
    let present = known
        .as_ref()
        .map_or(name.clone(), |known| (*known).clone());
    let mut named = LinkMessage::default();
    named.attributes = vec![LinkAttribute::IfName(present.clone())];
    let index = netlink
        .look_up(RouteNetlinkMessage::GetLink(named))
        .map_err(failed)?
        .into_iter()
        .find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link.header.index),
            _ => None,
        })
        .ok_or_else(|| NetworkError::Device {
            name: name.clone(),
            source: DeviceError::NoInterface {
                slot: interface.slot,
            },
        })?;
    // The host has its link-local address, which comes with the others: one of the
    // kernel's own would have to be tried out first.
    let setting = Path::new("/proc/sys/net/ipv6/conf")
        .join(&present)
        .join("addr_gen_mode");
    if setting.exists() {
        const IN6_ADDR_GEN_MODE_NONE: &str = "1";
        fs::write(&setting, IN6_ADDR_GEN_MODE_NONE).map_err(|source| NetworkError::Setting {
            path: setting,
            source,
        })?;
    }
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes = vec![
        LinkAttribute::Address(interface.mac.clone()),
        LinkAttribute::Mtu(interface.mtu),
    ];
    if present != *name {
        link.attributes.push(LinkAttribute::IfName(name.clone()));
    }
    netlink
        .change(RouteNetlinkMessage::SetLink(link), 0)
        .map_err(failed)?;
    if let Some(known) = known {
        known.clone_from(name);
    }
    Ok(index)
}

/// For an error: what it is that cannot be added.
fn describe(message: &RouteNetlinkMessage) -> String {
    match message {
        RouteNetlinkMessage::NewAddress(address) => format!("address {:?}", address.attributes),
        RouteNetlinkMessage::NewNeighbour(neighbour) => {
            format!("neighbour {:?}", neighbour.attributes)
        }
        RouteNetlinkMessage::NewRoute(route) => format!("route {:?}", route.attributes),
        RouteNetlinkMessage::NewRule(rule) => format!("rule {:?}", rule.attributes),
        _ => "something else".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_name_that_would_leave_its_directory_is_refused() {
        let interface = |name: &str, mac_bytes| NetworkInterface {
            name: name.to_owned(),
            mac: vec![2; mac_bytes],
            ..NetworkInterface::default()
        };
        check(&interface("eth0", 6)).expect("is a name");
        for (name, mac_bytes) in [
            ("", 6),
            (".", 6),
            ("..", 6),
            ("a/b", 6),
            ("0123456789abcdef", 6),
            ("eth0", 5),
        ] {
            assert!(check(&interface(name, mac_bytes)).is_err(), "{name:?}");
        }
    }
}
