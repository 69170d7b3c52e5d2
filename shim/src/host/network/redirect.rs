//! Traffic control: what arrives at one interface leaves by another.

use agent_protocol::rtnetlink::{self, Rtnetlink};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

/// What to check when it cannot be had.
pub(super) const HINT: &str =
    "check that the host's kernel has the modules sch_ingress, cls_u32 and act_mirred";

/// The queueing discipline that stands before an interface's receiving side.
const QDISC: &str = "ingress";
/// Its handle, by which filters name it as their parent (`ffff:` of tc(8)).
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};
/// `ETH_P_ALL` of `linux/if_ether.h`: frames of all kinds.
const ETH_P_ALL: u16 = 0x0003;

/// Sends what arrives at `from` out by `to`, and keeps it from the stack: a copy
/// would be answered by both.
///
/// # Errors
/// What the kernel said, as when there is a filter of somebody else's.
pub(super) fn add(netlink: &mut Rtnetlink, from: u32, to: u32) -> Result<(), rtnetlink::Error> {
    let qdisc = RouteNetlinkMessage::NewQueueDiscipline(qdisc(from));
    netlink.change(qdisc, NLM_F_CREATE | NLM_F_EXCL)?;
    let filter = RouteNetlinkMessage::NewTrafficFilter(filter(from, to));
    netlink.change(filter, NLM_F_CREATE | NLM_F_EXCL)
}

/// Takes back what [`add`] did to `from`. Does nothing for an interface that has
/// gone, or where there is nothing to take back.
pub(super) fn remove(netlink: &mut Rtnetlink, from: u32) -> Result<(), rtnetlink::Error> {
    match netlink.change(RouteNetlinkMessage::DelQueueDiscipline(qdisc(from)), 0) {
        Err(error)
            if matches!(
                error.refusal(),
                Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn qdisc(interface: u32) -> TcMessage {
    let mut message = TcMessage::with_index(interface.cast_signed());
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = INGRESS;
    message.attributes = vec![TcAttribute::Kind(QDISC.to_owned())];
    message
}

/// A filter that takes every frame.
fn filter(from: u32, to: u32) -> TcMessage {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    // One key whose mask is zero.
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];

    let mut message = TcMessage::with_index(from.cast_signed());
    message.header.parent = INGRESS;
    message.header.info = TcHandle {
        // Its preference among filters.
        major: 1,
        minor: ETH_P_ALL.to_be(),
    }
    .into();
    message.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    message
}
