//! What a network namespace has, as the guest is to be told it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use agent_protocol::rtnetlink::{self, Rtnetlink, encode};
use netlink_packet_core::NetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteNextHopFlags, RouteProtocol, RouteType,
};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Error, tap};

/// The loopback is the first interface of every namespace.
const LOOPBACK: u32 = 1;
/// `RT_TABLE_LOCAL` of `linux/rtnetlink.h`: routes that come with addresses.
const RT_TABLE_LOCAL: u32 = 255;
/// Priorities of the rules that every namespace has (ip-rule(8)).
const DEFAULT_RULES: [u32; 3] = [0, 32766, 32767];

/// An Ethernet interface that is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// In its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// In bytes.
    pub mtu: u32,
}

/// What a namespace has, but for what is ours and what every namespace has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables {
    /// By their indexes.
    pub interfaces: Vec<Interface>,
    /// Addresses, neighbours, routes and rules, in the order in which a kernel can
    /// take them (`SetNetworkRequest.messages` of `agent.proto`).
    pub messages: Vec<Vec<u8>>,
}

/// Reads the tables of the socket's namespace.
pub(super) fn read(netlink: &mut Rtnetlink) -> Result<Tables, Error> {
    let links = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let links = dump(netlink, "list interfaces", &links)?;
    let interfaces: Vec<_> = links.iter().filter_map(interface).collect();
    let of_these = interfaces.iter().map(|interface| interface.index);
    let known: BTreeSet<u32> = of_these.chain([LOOPBACK]).collect();

    let mut addresses = Vec::new();
    let mut neighbours = Vec::new();
    let mut routes = Vec::new();
    let mut rules = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = AddressMessage::default();
        request.header.family = family;
        let request = RouteNetlinkMessage::GetAddress(request);
        addresses.extend(dump(netlink, "list addresses", &request)?);

        let mut request = NeighbourMessage::default();
        request.header.family = family;
        let request = RouteNetlinkMessage::GetNeighbour(request);
        neighbours.extend(dump(netlink, "list neighbours", &request)?);

        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let request = RouteNetlinkMessage::GetRoute(request);
        routes.extend(dump(netlink, "list routes", &request)?);

        let mut request = RuleMessage::default();
        request.header.family = family;
        let request = RouteNetlinkMessage::GetRule(request);
        rules.extend(dump(netlink, "list rules", &request)?);
    }
    let mut messages = Vec::new();
    messages.extend(addresses.into_iter().filter_map(|m| address(m, &known)));
    messages.extend(neighbours.into_iter().filter_map(|m| neighbour(m, &known)));
    let mut routes: Vec<_> = routes
        .into_iter()
        .filter_map(|message| route(message, &known))
        .collect();
    // What a gateway is reached by comes before the gateway; the order is kept
    // otherwise.
    routes.sort_by_key(has_gateway);
    messages.extend(routes.into_iter().map(RouteNetlinkMessage::NewRoute));
    messages.extend(rules.into_iter().filter_map(rule));
    let messages = messages
        .into_iter()
        .map(|message| encode(NetlinkMessage::from(message)))
        .collect();
    Ok(Tables {
        interfaces,
        messages,
    })
}

/// The index of an interface of the socket's namespace.
pub(super) fn index_of(netlink: &mut Rtnetlink, name: &str) -> Result<u32, rtnetlink::Error> {
    let mut named = LinkMessage::default();
    named.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    let answers = netlink.look_up(RouteNetlinkMessage::GetLink(named))?;
    let index = answers.iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => Some(link.header.index),
        _ => None,
    });
    index.ok_or_else(|| rtnetlink::Error::Malformed {
        reason: format!("no interface in the answer about {name}"),
    })
}

fn dump(
    netlink: &mut Rtnetlink,
    operation: &'static str,
    request: &RouteNetlinkMessage,
) -> Result<Vec<RouteNetlinkMessage>, Error> {
    match netlink.dump(request) {
        // A kernel without IPv6.
        Err(error) if error.refusal() == Some(libc::EAFNOSUPPORT) => Ok(Vec::new()),
        other => other.map_err(|source| Error::Tables { operation, source }),
    }
}

/// One that frames can come from and go to.
fn interface(message: &RouteNetlinkMessage) -> Option<Interface> {
    let RouteNetlinkMessage::NewLink(link) = message else {
        return None;
    };
    let header = &link.header;
    if header.link_layer_type != LinkLayerType::Ether || !header.flags.contains(LinkFlags::Up) {
        return None;
    }
    let mut interface = Interface {
        index: header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 0,
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Address(mac) => interface.mac = mac.as_slice().try_into().ok()?,
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            _ => {}
        }
    }
    let ours = interface.name.strip_prefix(tap::PREFIX);
    let ours = ours.is_some_and(|index| index.parse::<u32>().is_ok());
    (!ours).then_some(interface)
}

/// One that somebody has set, not one that the kernel made of a router's
/// advertisement: the guest hears those itself.
fn address(message: RouteNetlinkMessage, known: &BTreeSet<u32>) -> Option<RouteNetlinkMessage> {
    let RouteNetlinkMessage::NewAddress(mut address) = message else {
        return None;
    };
    let is_permanent = address.header.flags.contains(AddressHeaderFlags::Permanent);
    let comes_with_the_loopback = |attribute: &AddressAttribute| {
        matches!(attribute, AddressAttribute::Address(ip)
            if *ip == IpAddr::V4(Ipv4Addr::LOCALHOST) || *ip == IpAddr::V6(Ipv6Addr::LOCALHOST))
    };
    if !known.contains(&address.header.index)
        || !is_permanent
        || address.attributes.iter().any(comes_with_the_loopback)
    {
        return None;
    }
    // It has been found to be nobody else's here; and of the routes that come with
    // an address the namespace has those that it is to have.
    let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
    address.header.flags = AddressHeaderFlags::empty();
    for attribute in &mut address.attributes {
        if let AddressAttribute::CacheInfo(times) = attribute {
            (times.cstamp, times.tstamp) = (0, 0);
        }
    }
    address.attributes.retain(|attribute| {
        !matches!(
            attribute,
            AddressAttribute::Flags(_) | AddressAttribute::TargetNetNsId(_)
        )
    });
    address.attributes.push(AddressAttribute::Flags(flags));
    Some(RouteNetlinkMessage::NewAddress(address))
}

/// One that somebody has set.
fn neighbour(message: RouteNetlinkMessage, known: &BTreeSet<u32>) -> Option<RouteNetlinkMessage> {
    let RouteNetlinkMessage::NewNeighbour(mut neighbour) = message else {
        return None;
    };
    if !known.contains(&neighbour.header.ifindex)
        || neighbour.header.state != NeighbourState::Permanent
    {
        return None;
    }
    neighbour.attributes.retain(|attribute| {
        !matches!(
            attribute,
            NeighbourAttribute::CacheInfo(_) | NeighbourAttribute::Probes(_)
        )
    });
    Some(RouteNetlinkMessage::NewNeighbour(neighbour))
}

/// One that somebody has set, or that came with an address.
fn route(message: RouteNetlinkMessage, known: &BTreeSet<u32>) -> Option<RouteMessage> {
    let RouteNetlinkMessage::NewRoute(mut route) = message else {
        return None;
    };
    let header = &route.header;
    let is_learned = matches!(
        header.protocol,
        RouteProtocol::Ra | RouteProtocol::IcmpRedirect
    );
    let is_for_packets = matches!(
        header.kind,
        RouteType::Unicast
            | RouteType::BlackHole
            | RouteType::Unreachable
            | RouteType::Prohibit
            | RouteType::Throw
    );
    if is_learned
        || !is_for_packets
        || header.flags.contains(RouteFlags::Cloned)
        || table_of(&route) == RT_TABLE_LOCAL
        || !interfaces_of(&route).is_subset(known)
    {
        return None;
    }
    // The rest tells how it is at the moment.
    route.header.flags &= RouteFlags::Onlink;
    route.attributes.retain(|attribute| {
        !matches!(
            attribute,
            RouteAttribute::CacheInfo(_) | RouteAttribute::Expires(_) | RouteAttribute::NhId(_)
        )
    });
    for attribute in &mut route.attributes {
        if let RouteAttribute::MultiPath(hops) = attribute {
            for hop in hops {
                hop.flags &= RouteNextHopFlags::Onlink;
            }
        }
    }
    Some(route)
}

fn table_of(route: &RouteMessage) -> u32 {
    let named = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        });
    named.unwrap_or(route.header.table.into())
}

fn interfaces_of(route: &RouteMessage) -> BTreeSet<u32> {
    let mut interfaces = BTreeSet::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) | RouteAttribute::Iif(index) => {
                interfaces.insert(*index);
            }
            RouteAttribute::MultiPath(hops) => {
                interfaces.extend(hops.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    interfaces
}

fn has_gateway(route: &RouteMessage) -> bool {
    route.attributes.iter().any(|attribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
        )
    })
}

/// One that not every namespace has.
fn rule(message: RouteNetlinkMessage) -> Option<RouteNetlinkMessage> {
    let RouteNetlinkMessage::NewRule(rule) = message else {
        return None;
    };
    let priority = rule
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RuleAttribute::Priority(priority) => Some(*priority),
            _ => None,
        });
    let is_default = DEFAULT_RULES.contains(&priority.unwrap_or_default());
    (!is_default).then_some(RouteNetlinkMessage::NewRule(rule))
}
