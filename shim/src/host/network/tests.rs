//! In a network namespace of the test's own, with what the kernel of this machine
//! makes of it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::sched::unshare;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;

/// Before each frame of a tap: `struct virtio_net_hdr`, as the kernel has it until
/// it is told otherwise.
const HEADER_BYTES: usize = 10;
const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const POD: Ipv4Addr = Ipv4Addr::new(10, 8, 8, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 8, 8, 1);
const PEER: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 1);
/// An address that only the guest has: what is sent to one of the namespace's own
/// never leaves it.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 2);

/// Runs a test in a namespace with `eth0`, which has an address, and `peer0` at
/// its other end.
fn with_pod(test: impl FnOnce(&File, &mut Rtnetlink) + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
                println!("SKIP: a network namespace takes root: {errno}");
                return;
            }
            let namespace = File::open("/proc/thread-self/ns/net").expect("is there");
            let mut netlink = Rtnetlink::open().expect("opens");
            make_pair(&mut netlink);
            for (name, address) in [("eth0", POD), ("peer0", PEER)] {
                let index = tables::index_of(&mut netlink, name).expect("is there");
                set(
                    &mut netlink,
                    RouteNetlinkMessage::NewAddress(address_of(index, address)),
                );
            }
            let peer = tables::index_of(&mut netlink, "peer0").expect("is there");
            set(
                &mut netlink,
                RouteNetlinkMessage::NewNeighbour(neighbour_of(peer, GUEST, POD_MAC)),
            );
            test(&namespace, &mut netlink);
        });
        thread.join().expect("passes");
    });
}

fn set(netlink: &mut Rtnetlink, message: RouteNetlinkMessage) {
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    netlink.change(message, flags).expect("is taken");
}

fn make_pair(netlink: &mut Rtnetlink) {
    let end = |name: &str, mac: [u8; 6]| {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(mac.to_vec()),
            LinkAttribute::Mtu(1400),
        ];
        link
    };
    let mut link = end("eth0", POD_MAC);
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(end("peer0", PEER_MAC)))),
    ]));
    set(netlink, RouteNetlinkMessage::NewLink(link));
    for name in ["eth0", "peer0"] {
        let index = tables::index_of(netlink, name).expect("is there");
        tap::set_up(netlink, index, 1400).expect("is taken");
    }
}

fn address_of(index: u32, address: Ipv4Addr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = 24;
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(IpAddr::V4(address)),
        AddressAttribute::Address(IpAddr::V4(address)),
    ];
    message
}

fn neighbour_of(index: u32, address: Ipv4Addr, mac: [u8; 6]) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
    ];
    message
}

/// All there is but `eth0` counts as connected.
fn scan_eth0(namespace: &File, netlink: &mut Rtnetlink) -> (u32, Scan) {
    let eth0 = tables::index_of(netlink, "eth0").expect("is there");
    let peer = tables::index_of(netlink, "peer0").expect("is there");
    let scan = scan(namespace.as_fd(), &[peer].into()).expect("scans");
    (eth0, scan)
}

/// A UDP datagram from the pod to its peer, as the guest's device would send it.
fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_bytes = (8 + payload.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_bytes).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]); // no fragment, 64 hops, UDP, checksum
    ip.extend(GUEST.octets());
    ip.extend(PEER.octets());
    let words = ip
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend(PEER_MAC);
    frame.extend(POD_MAC);
    frame.extend([8, 0]); // IPv4
    frame.extend(ip);
    frame.extend(5555_u16.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend(udp_bytes.to_be_bytes());
    frame.extend([0, 0]); // no checksum
    frame.extend(payload);
    frame
}

#[test]
fn scan_connects_an_interface_both_ways_and_disconnect_takes_it_back() {
    with_pod(|namespace, netlink| {
        let (eth0, scan) = scan_eth0(namespace, netlink);
        let [(index, tap)] = <[_; 1]>::try_from(scan.taps).expect("one is new");
        assert_eq!(index, eth0);
        let mut tap = File::from(tap);

        let peer = UdpSocket::bind((PEER, 0)).expect("binds");
        peer.set_read_timeout(Some(Duration::from_secs(10)))
            .expect("is a socket");
        peer.send_to(b"to the pod", (GUEST, 7)).expect("sends");
        // Besides what the kernels of both ends say of themselves.
        let mut frame = vec![0; 2048];
        loop {
            assert!(is_readable(&tap, 10), "nothing has come");
            let bytes = tap.read(&mut frame).expect("reads");
            if frame[..bytes].ends_with(b"to the pod") {
                assert_eq!(frame[HEADER_BYTES..][..6], POD_MAC);
                break;
            }
        }

        let port = peer.local_addr().expect("is bound").port();
        tap.write_all(&datagram(port, b"from the pod"))
            .expect("writes");
        let mut payload = [0; 64];
        let (bytes, from) = peer.recv_from(&mut payload).expect("receives");
        assert_eq!(&payload[..bytes], b"from the pod");
        assert_eq!(from.ip(), IpAddr::V4(GUEST));

        drop(tap);
        disconnect(namespace.as_fd(), eth0).expect("disconnects");
        disconnect(namespace.as_fd(), eth0).expect("has nothing to do");
        let (_, again) = scan_eth0(namespace, netlink);
        assert_eq!(again.taps.len(), 1);
        disconnect(namespace.as_fd(), 4711).expect("has nothing to do");
    });
}

#[test]
fn scan_of_an_interface_that_somebody_redirects_already_is_an_error_and_leaves_it() {
    with_pod(|namespace, netlink| {
        let (eth0, first) = scan_eth0(namespace, netlink);
        let peer = tables::index_of(netlink, "peer0").expect("is there");
        let error = scan(namespace.as_fd(), &[peer].into()).expect_err("is taken");
        // The tap's name is, to begin with.
        assert!(matches!(error, Error::Tap { .. }), "{error:?}");
        drop(first);
        let error = scan(namespace.as_fd(), &[peer].into()).expect_err("is taken");
        let said = error.to_string();
        assert!(
            said.contains("eth0") && said.contains("sch_ingress"),
            "{said}"
        );
        disconnect(namespace.as_fd(), eth0).expect("disconnects");
    });
}

#[test]
fn tables_have_what_was_set_and_neither_taps_nor_what_is_always_there() {
    with_pod(|namespace, netlink| {
        let eth0 = tables::index_of(netlink, "eth0").expect("is there");
        let mut route = RouteMessage::default();
        route.header.address_family = AddressFamily::Inet;
        route.header.table = 254;
        route.header.protocol = RouteProtocol::Static;
        route.header.scope = RouteScope::Universe;
        route.header.kind = RouteType::Unicast;
        route.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(GATEWAY))];
        set(netlink, RouteNetlinkMessage::NewRoute(route));
        set(
            netlink,
            RouteNetlinkMessage::NewNeighbour(neighbour_of(eth0, GATEWAY, PEER_MAC)),
        );

        let (_, scan) = scan_eth0(namespace, netlink);
        let (_, second) = (eth0, super::scan(namespace.as_fd(), &all(&scan.tables)));
        assert_eq!(second.expect("scans").tables, scan.tables, "it is steady");
        let names = scan
            .tables
            .interfaces
            .iter()
            .map(|found| found.name.as_str());
        let mut names: Vec<_> = names.collect();
        names.sort_unstable();
        assert_eq!(names, ["eth0", "peer0"]);
        let found = scan
            .tables
            .interfaces
            .iter()
            .find(|found| found.index == eth0);
        let found = found.expect("is there");
        assert_eq!((found.mac, found.mtu), (POD_MAC, 1400));

        let mut of_eth0 = Vec::new();
        for bytes in &scan.tables.messages {
            let message = rtnetlink::decode::<RouteNetlinkMessage>(bytes).expect("is one");
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(address)) => {
                    if address.header.index == eth0 && address.header.family == AddressFamily::Inet
                    {
                        of_eth0.push("address");
                    }
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(neighbour)) => {
                    if neighbour.header.ifindex == eth0 {
                        of_eth0.push("neighbour");
                    }
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => {
                    let has = |wanted: &RouteAttribute| route.attributes.contains(wanted);
                    if has(&RouteAttribute::Gateway(RouteAddress::Inet(GATEWAY))) {
                        of_eth0.push("gateway");
                    } else if has(&RouteAttribute::PrefSource(RouteAddress::Inet(POD))) {
                        of_eth0.push("subnet");
                    }
                }
                other => panic!("unexpected: {other:?}"),
            }
        }
        assert_eq!(of_eth0, ["address", "neighbour", "subnet", "gateway"]);
    });
}

fn is_readable(descriptor: &impl AsFd, seconds: i64) -> bool {
    let mut events = [PollFd::new(descriptor, PollFlags::IN)];
    let patience = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    poll(&mut events, Some(&patience)).expect("waits") == 1
}

fn all(tables: &Tables) -> BTreeSet<u32> {
    tables.interfaces.iter().map(|found| found.index).collect()
}

#[test]
fn watch_is_readable_after_a_change_and_not_before() {
    with_pod(|namespace, netlink| {
        let watch = watch(namespace.as_fd()).expect("listens");
        watch.discard_news().expect("reads");
        let eth0 = tables::index_of(netlink, "eth0").expect("is there");
        set(
            netlink,
            RouteNetlinkMessage::NewAddress(address_of(eth0, Ipv4Addr::new(10, 9, 9, 3))),
        );
        assert!(is_readable(&watch, 10));
        watch.discard_news().expect("reads");
        assert!(!is_readable(&watch, 0));
    });
}
