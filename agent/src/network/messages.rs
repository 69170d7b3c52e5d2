//! What the host's kernel told of its network, as ours is to be told it.

use std::collections::BTreeMap;

use agent_protocol::rtnetlink;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    route::{RouteAttribute, RouteMessage},
};
use thiserror::Error;

/// Our interface indexes by the host's.
pub type Indexes = BTreeMap<u32, u32>;

/// A message that is of no use here.
#[derive(Debug, Error)]
pub enum MessageError {
    /// It is none.
    #[error(transparent)]
    Malformed(#[from] rtnetlink::Error),
    /// Of another kind.
    #[error("only addresses, routes, neighbours and rules can be set")]
    Kind,
    /// About an interface that the pod does not have.
    #[error("the host's interface {index} is not one of the pod's")]
    Interface {
        /// Its index.
        index: u32,
    },
}

/// Reads a message, with our interfaces in it for the host's.
pub fn translate(bytes: &[u8], indexes: &Indexes) -> Result<RouteNetlinkMessage, MessageError> {
    let message: NetlinkMessage<RouteNetlinkMessage> = rtnetlink::decode(bytes)?;
    let NetlinkPayload::InnerMessage(mut message) = message.payload else {
        return Err(MessageError::Kind);
    };
    let ours = |index: &mut u32| match indexes.get(index) {
        Some(ours) => {
            *index = *ours;
            Ok(())
        }
        None => Err(MessageError::Interface { index: *index }),
    };
    match &mut message {
        RouteNetlinkMessage::NewAddress(address) => ours(&mut address.header.index)?,
        RouteNetlinkMessage::NewNeighbour(neighbour) => ours(&mut neighbour.header.ifindex)?,
        RouteNetlinkMessage::NewRoute(route) => translate_route(route, ours)?,
        // They name interfaces, and names are the same.
        RouteNetlinkMessage::NewRule(_) => {}
        _ => return Err(MessageError::Kind),
    }
    Ok(message)
}

fn translate_route(
    route: &mut RouteMessage,
    ours: impl Fn(&mut u32) -> Result<(), MessageError>,
) -> Result<(), MessageError> {
    for attribute in &mut route.attributes {
        match attribute {
            RouteAttribute::Oif(index) | RouteAttribute::Iif(index) => ours(index)?,
            RouteAttribute::MultiPath(hops) => {
                for hop in hops {
                    ours(&mut hop.interface_index)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The message that takes away what this one adds. Only of what [`translate`]
/// gives.
pub fn reverse(message: RouteNetlinkMessage) -> RouteNetlinkMessage {
    use RouteNetlinkMessage as M;
    match message {
        M::NewAddress(address) => M::DelAddress(address),
        M::NewNeighbour(neighbour) => M::DelNeighbour(neighbour),
        M::NewRoute(route) => M::DelRoute(route),
        M::NewRule(rule) => M::DelRule(rule),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::{address::AddressMessage, link::LinkMessage, route::RouteNextHop};
    use proptest::prelude::*;

    fn bytes(message: RouteNetlinkMessage) -> Vec<u8> {
        rtnetlink::encode(NetlinkMessage::from(message))
    }

    fn indexes() -> Indexes {
        [(1, 1), (7, 3)].into()
    }

    #[test]
    fn translate_puts_our_index_for_the_hosts() {
        let mut address = AddressMessage::default();
        address.header.index = 7;
        let message = bytes(RouteNetlinkMessage::NewAddress(address));
        let translated = translate(&message, &indexes()).expect("is known");
        assert!(matches!(
            translated,
            RouteNetlinkMessage::NewAddress(address) if address.header.index == 3
        ));
    }

    #[test]
    fn translate_of_an_interface_that_is_not_the_pods_is_refused() {
        let mut route = RouteMessage::default();
        let mut hop = RouteNextHop::default();
        hop.interface_index = 8;
        route.attributes = vec![RouteAttribute::Oif(7), RouteAttribute::MultiPath(vec![hop])];
        let message = bytes(RouteNetlinkMessage::NewRoute(route));
        let error = translate(&message, &indexes()).expect_err("is unknown");
        assert!(matches!(error, MessageError::Interface { index: 8 }));
    }

    #[test]
    fn translate_of_a_link_is_refused() {
        let message = bytes(RouteNetlinkMessage::NewLink(LinkMessage::default()));
        let error = translate(&message, &indexes()).expect_err("is refused");
        assert!(matches!(error, MessageError::Kind));
    }

    proptest! {
        #[test]
        fn translate_any_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            let _ = translate(&bytes, &indexes());
        }
    }
}
