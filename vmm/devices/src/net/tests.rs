use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use proptest::prelude::*;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_virtio::mock::{self, Buffer, MockQueue, Raised};
use vmm_virtio::{Activation, ActiveQueue, VirtioDevice};

use super::header::{HEADER_BYTES, MAX_FRAME_BYTES};
use super::link::Link;
use super::tap::Tap;
use super::worker::{FRAMES_AT_A_TIME, Fault, Service};
use super::{Net, NetConfig, NetError};
use crate::event_loop::Events;
use crate::hostile;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const MTU: u16 = 1500;
/// Nothing in these tests takes that long; a test that hangs should say where.
const PATIENCE: Duration = Duration::from_secs(20);
const SIZE: u16 = 64;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x80_0000;
const TX_BUFFER: u64 = 0x2_0000;

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const SEGMENTS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
const STATUS: u64 = 1 << VIRTIO_NET_F_STATUS;

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("socketpair")
}

/// A driver, the device's side of its queues, and the other end of the "tap".
struct Guest {
    memory: GuestMemoryMmap,
    rx: MockQueue,
    tx: MockQueue,
    raised: mpsc::Receiver<Raised>,
    peer: OwnedFd,
    lost: mpsc::Receiver<io::Error>,
    rx_buffers: Vec<(u16, u64)>,
    rx_turn: u64,
}

impl Guest {
    /// Everything but the device, and what that is started with.
    fn new(features: u64) -> (Self, Link, Activation) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("memory");
        let rx = MockQueue::new(&memory, 0x1000, SIZE);
        let tx = MockQueue::new(&memory, 0x4000, SIZE);
        let (interrupt, raised) = mock::interrupt();
        let activation = Activation {
            memory: memory.clone(),
            features,
            queues: vec![rx.active(0, false), tx.active(1, false)],
            interrupt,
        };
        let (peer, ours) = pair();
        let (tell, lost) = mpsc::channel();
        let lose = Arc::new(move |error| drop(tell.send(error)));
        let link = Link::new(Tap::of_socket(ours).expect("tap"), lose);
        let guest = Self {
            memory,
            rx,
            tx,
            raised,
            peer,
            lost,
            rx_buffers: Vec::new(),
            rx_turn: 0,
        };
        (guest, link, activation)
    }

    fn start(features: u64) -> (Self, Net) {
        let (guest, link, activation) = Self::new(features);
        let mut net = Net {
            mac: MAC,
            mtu: MTU,
            link_up: link.up(),
            link: Some(link),
            worker: None,
        };
        net.activate(activation).expect("activates");
        (guest, net)
    }

    /// A device that works when it is told to.
    fn stepped(features: u64) -> (Self, Service, Events) {
        let (guest, link, activation) = Self::new(features);
        let service = Service::try_new("network", &mut Some(link), MTU, activation);
        let mut service = service.expect("queues");
        let events = Events::try_new().expect("epoll");
        service.prepare(&events).expect("watched");
        (guest, service, events)
    }

    fn offer_room(&mut self, length: u32) -> u16 {
        let address = RX_BUFFERS + 0x1_1000 * self.rx_turn;
        self.rx_turn = (self.rx_turn + 1) % u64::from(SIZE);
        let head = self.rx.offer(&[Buffer {
            address,
            length,
            writable: true,
        }]);
        self.rx_buffers.push((head, address));
        head
    }

    /// The next frame that the guest was given, without its header, and how
    /// many buffers it came in.
    fn received(&mut self) -> Option<(Vec<u8>, usize)> {
        let mut frame = Vec::new();
        let mut buffers = 0;
        loop {
            let Some((head, written)) = self.rx.take_used() else {
                assert_eq!(buffers, 0, "a frame of which a part is not there");
                return None;
            };
            let (expected, address) = self.rx_buffers.remove(0);
            assert_eq!(head, expected, "buffers in their order");
            let mut bytes = vec![0; written as usize];
            self.memory
                .read_slice(&mut bytes, GuestAddress(address))
                .expect("in memory");
            frame.extend(bytes);
            buffers += 1;
            if buffers == usize::from(u16::from_le_bytes([frame[10], frame[11]])) {
                return Some((frame.split_off(HEADER_BYTES), buffers));
            }
        }
    }

    /// Sends a frame in two pieces, with this header.
    fn send_with(&mut self, header: [u8; HEADER_BYTES], frame: &[u8]) -> u16 {
        let address = TX_BUFFERS + TX_BUFFER * (self.rx_turn % 16);
        self.rx_turn += 1;
        let bytes = [header.as_slice(), frame].concat();
        self.memory
            .write_slice(&bytes, GuestAddress(address))
            .expect("in memory");
        let split = bytes.len().min(20) as u32;
        let piece = |at: u32, length| Buffer {
            address: address + u64::from(at),
            length,
            writable: false,
        };
        self.tx
            .offer(&[piece(0, split), piece(split, bytes.len() as u32 - split)])
    }

    fn wait_for(&self, expected: Raised) {
        while self.raised.recv_timeout(PATIENCE).expect("in time") != expected {}
    }

    fn send_to_guest(&self, frame: &[u8]) {
        let bytes = [&[0; HEADER_BYTES], frame].concat();
        let sent = send(self.peer.as_raw_fd(), &bytes, MsgFlags::empty());
        assert_eq!(sent, Ok(bytes.len()));
    }

    /// What the host got: header and frame.
    fn sent(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut bytes = vec![0; MAX_FRAME_BYTES + 1];
        let length = recv(self.peer.as_raw_fd(), &mut bytes, MsgFlags::empty()).ok()?;
        bytes.truncate(length);
        let frame = bytes.split_off(HEADER_BYTES);
        Some((bytes, frame))
    }
}

/// Works until there is nothing more to do.
fn settle(service: &mut Service, events: &Events) -> Result<(), Fault> {
    for _ in 0..2 {
        let mut turns = 0;
        while service.work(events)? {
            turns += 1;
            assert!(turns < 100, "a device that never comes to rest");
        }
        service
            .wait(events, Some(Duration::ZERO))
            .expect("the host lets it wait");
    }
    Ok(())
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length)
        .map(|index| ((index + seed) * 31 % 253) as u8)
        .collect()
}

fn positions(queue: &ActiveQueue) -> (u16, u16) {
    let state = queue.queue.state();
    (state.next_avail, state.next_used)
}

#[test]
fn frames_go_both_ways_on_the_thread() {
    let (mut guest, mut net) = Guest::start(0);
    guest.offer_room(2000);
    guest.rx.kick();
    guest.send_to_guest(&pattern(60, 1));
    guest.wait_for(Raised::Used(0));
    assert_eq!(guest.received(), Some((pattern(60, 1), 1)));
    let head = guest.send_with([0; HEADER_BYTES], &pattern(1514, 2));
    guest.tx.kick();
    guest.wait_for(Raised::Used(1));
    assert_eq!(guest.tx.take_used(), Some((head, 0)));
    assert_eq!(guest.sent().map(|(_, frame)| frame), Some(pattern(1514, 2)));
    // Going on after a pause loses nothing that came meanwhile.
    let queues = net.pause();
    assert_eq!(
        queues.iter().map(positions).collect::<Vec<_>>(),
        [(1, 1); 2]
    );
    guest.send_to_guest(&pattern(70, 3));
    let (interrupt, raised) = mock::interrupt();
    guest.raised = raised;
    net.activate(Activation {
        memory: guest.memory.clone(),
        features: 0,
        queues,
        interrupt,
    })
    .expect("activates");
    guest.offer_room(2000);
    guest.rx.kick();
    guest.wait_for(Raised::Used(0));
    assert_eq!(guest.received(), Some((pattern(70, 3), 1)));
}

#[test]
fn frames_of_any_size_arrive_whole_and_in_order_in_merged_buffers() {
    let (mut guest, mut service, events) = Guest::stepped(MERGEABLE | SEGMENTS);
    for _ in 0..SIZE {
        guest.offer_room(2048);
    }
    let sizes = [60, 2036, 2037, 65_554 - 18, 14, 9000, 2048 * 3 - 12, 1];
    for (seed, size) in sizes.into_iter().enumerate() {
        guest.send_to_guest(&pattern(size, seed));
    }
    let mut expected = sizes.into_iter().enumerate();
    while expected.len() > 0 {
        settle(&mut service, &events).expect("sound");
        while let Some((frame, buffers)) = guest.received() {
            let (seed, size) = expected.next().expect("no more than were sent");
            assert!(frame == pattern(size, seed), "{} of {size}", frame.len());
            assert_eq!(buffers, (size + HEADER_BYTES).div_ceil(2048));
            // As many again.
            for _ in 0..buffers {
                guest.offer_room(2048);
            }
        }
    }
    assert_eq!(service.dropped, 0);
}

#[test]
fn frame_waits_until_there_is_room_for_the_largest() {
    let (mut guest, mut service, events) = Guest::stepped(MERGEABLE);
    guest.send_to_guest(&pattern(1000, 1));
    guest.send_to_guest(&pattern(1001, 2));
    settle(&mut service, &events).expect("sound");
    assert_eq!(guest.received(), None);
    guest.offer_room(1024);
    settle(&mut service, &events).expect("sound");
    // It would fit, but the device cannot know that.
    assert_eq!(guest.received(), None);
    guest.offer_room(1024);
    settle(&mut service, &events).expect("sound");
    assert_eq!(guest.received(), Some((pattern(1000, 1), 1)));
    assert_eq!(guest.received(), None);
    guest.offer_room(1024);
    settle(&mut service, &events).expect("sound");
    assert_eq!(guest.received(), Some((pattern(1001, 2), 1)));
    assert_eq!(service.dropped, 0);
}

#[test]
fn queue_too_small_for_the_largest_frame_takes_what_fits() {
    let (mut guest, mut service, events) = Guest::stepped(MERGEABLE | SEGMENTS);
    for _ in 0..SIZE {
        guest.offer_room(20);
    }
    guest.send_to_guest(&pattern(2000, 1));
    guest.send_to_guest(&pattern(100, 2));
    settle(&mut service, &events).expect("sound");
    assert_eq!(guest.received(), Some((pattern(100, 2), 6)));
    assert_eq!(service.dropped, 1);
}

#[test]
fn frame_longer_than_the_one_buffer_is_dropped_and_the_next_fits() {
    let (mut guest, mut service, events) = Guest::stepped(0);
    guest.offer_room(112);
    guest.send_to_guest(&pattern(101, 1));
    guest.send_to_guest(&pattern(100, 2));
    settle(&mut service, &events).expect("sound");
    assert_eq!(guest.received(), Some((pattern(100, 2), 1)));
    assert_eq!(service.dropped, 1);
}

#[test]
fn pause_puts_back_the_buffers_that_no_frame_has_come_for() {
    let (mut guest, mut service, events) = Guest::stepped(MERGEABLE);
    for _ in 0..5 {
        guest.offer_room(1024);
    }
    guest.send_to_guest(&pattern(1500, 1));
    guest.send_with([0; HEADER_BYTES], &pattern(60, 2));
    settle(&mut service, &events).expect("sound");
    assert_eq!(guest.received(), Some((pattern(1500, 1), 2)));
    let (_, queues) = service.into_parts();
    assert_eq!(queues.each_ref().map(positions), [(2, 2), (1, 1)]);
}

#[test]
fn receive_buffer_without_room_for_a_header_is_a_fault() {
    for features in [0, MERGEABLE] {
        let (mut guest, mut service, events) = Guest::stepped(features);
        guest.offer_room(11);
        let settled = settle(&mut service, &events);
        assert!(matches!(settled, Err(Fault::NoRoom { bytes: 11, .. })));
    }
}

#[test]
fn frame_that_is_none_or_not_negotiated_is_dropped_and_given_back() {
    let features = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;
    let (mut guest, mut service, events) = Guest::stepped(features);
    let none = [0; HEADER_BYTES];
    let checksum = [1, 0, 0, 0, 0, 0, 14, 0, 6, 0, 0, 0];
    let udp = [1, 5, 14, 0, 100, 0, 14, 0, 6, 0, 0, 0];
    guest.send_with(none, &[0; 13]);
    guest.send_with(none, &pattern(MAX_FRAME_BYTES - HEADER_BYTES + 1, 0));
    guest.send_with(udp, &pattern(100, 0));
    guest.tx.offer(&[Buffer {
        address: TX_BUFFERS,
        length: 100,
        writable: true,
    }]);
    // Unknown flags and the count of buffers are not for the tap.
    let mut odd = checksum;
    odd[0] = 0xff;
    odd[10..].fill(0xff);
    guest.send_with(odd, &pattern(100, 1));
    settle(&mut service, &events).expect("sound");
    assert_eq!(guest.sent(), Some((checksum.to_vec(), pattern(100, 1))));
    assert_eq!(guest.sent(), None);
    assert_eq!(service.dropped, 4);
    let returned = std::iter::from_fn(|| guest.tx.take_used()).count();
    assert_eq!(returned, 5);
}

#[test]
fn frames_that_the_tap_has_no_room_for_wait_and_keep_their_order() {
    let (mut guest, mut service, events) = Guest::stepped(0);
    let mut next = 0;
    let mut taken = 0;
    for _ in 0..20 {
        while guest.tx.take_used().is_some() {}
        for _ in 0..10 {
            guest.send_with([0; HEADER_BYTES], &pattern(60_000, next));
            next += 1;
        }
        // No more in the ring than it has entries, two for each.
        loop {
            settle(&mut service, &events).expect("sound");
            let (offered, _) = positions(service.tx());
            if usize::from(offered) == next {
                break;
            }
            let (_, frame) = guest.sent().expect("the socket is full");
            assert!(frame == pattern(60_000, taken), "frame {taken}");
            taken += 1;
        }
    }
    while let Some((_, frame)) = guest.sent() {
        assert!(frame == pattern(60_000, taken), "frame {taken}");
        taken += 1;
    }
    assert_eq!((taken, service.dropped), (next, 0));
}

#[test]
fn tap_that_ends_takes_the_link_down_and_what_is_sent_is_dropped() {
    let (mut guest, mut net) = Guest::start(STATUS);
    let status = |net: &Net| {
        let mut status = [0; 2];
        net.read_config(6, &mut status);
        u16::from_le_bytes(status)
    };
    assert_eq!(status(&net), 1);
    guest.offer_room(2000);
    guest.rx.kick();
    let (ours, _) = pair();
    drop(std::mem::replace(&mut guest.peer, ours));
    guest.wait_for(Raised::Config);
    assert_eq!(status(&net), 0);
    guest.lost.recv_timeout(PATIENCE).expect("told");
    let head = guest.send_with([0; HEADER_BYTES], &pattern(60, 1));
    guest.tx.kick();
    guest.wait_for(Raised::Used(1));
    assert_eq!(guest.tx.take_used(), Some((head, 0)));
    // It stays down for the next driver, whom it does not keep from starting.
    let queues = net.pause();
    net.reset();
    let (interrupt, raised) = mock::interrupt();
    net.activate(Activation {
        memory: guest.memory.clone(),
        features: STATUS,
        queues,
        interrupt,
    })
    .expect("activates");
    assert_eq!(status(&net), 0);
    assert!(guest.lost.try_recv().is_err());
    drop(net);
    assert!(raised.try_iter().all(|raised| raised == Raised::Config));
}

#[test]
fn queue_that_is_broken_asks_for_reset_and_the_device_can_be_started_again() {
    let (mut guest, mut net) = Guest::start(0);
    guest.tx.corrupt_available_index(5000);
    guest.tx.kick();
    guest.wait_for(Raised::GuestFault);
    net.reset();
    let (rx, tx) = (
        MockQueue::new(&guest.memory, 0x1000, SIZE),
        MockQueue::new(&guest.memory, 0x4000, SIZE),
    );
    guest
        .memory
        .write_slice(&vec![0; 0x6000], GuestAddress(0x1000))
        .expect("in memory");
    let (interrupt, raised) = mock::interrupt();
    net.activate(Activation {
        memory: guest.memory.clone(),
        features: 0,
        queues: vec![rx.active(0, false), tx.active(1, false)],
        interrupt,
    })
    .expect("activates");
    (guest.rx, guest.tx, guest.raised) = (rx, tx, raised);
    guest.send_with([0; HEADER_BYTES], &pattern(60, 1));
    guest.tx.kick();
    guest.wait_for(Raised::Used(1));
    assert_eq!(guest.sent().map(|(_, frame)| frame), Some(pattern(60, 1)));
}

#[test]
fn one_direction_does_not_starve_the_other() {
    let (mut guest, mut service, events) = Guest::stepped(0);
    guest.offer_room(2000);
    guest.send_to_guest(&pattern(60, 1));
    for _ in 0..FRAMES_AT_A_TIME {
        guest.tx.offer(&[Buffer {
            address: TX_BUFFERS,
            length: 72,
            writable: false,
        }]);
    }
    // The transmit queue may hold more; what is to be received has its turn first.
    assert!(service.work(&events).expect("sound"));
    assert_eq!(guest.received(), Some((pattern(60, 1), 1)));
}

#[test]
fn device_without_both_queues_does_not_start_and_keeps_its_tap() {
    let (_guest, link, mut activation) = Guest::new(0);
    let mut link = Some(link);
    activation.queues.pop();
    assert!(Service::try_new("network", &mut link, MTU, activation).is_err());
    assert!(link.is_some());
}

#[test]
fn descriptor_that_is_no_tap_is_refused() {
    let (tap, _peer) = pair();
    let refused = Net::try_new(NetConfig {
        mac: MAC,
        mtu: MTU,
        tap,
        lost: Arc::new(|_| ()),
    });
    assert!(matches!(refused.map(drop), Err(NetError::NotAttached(_))));
}

#[test]
fn config_space_holds_address_status_pairs_and_mtu() {
    let (_guest, net) = Guest::start(0);
    let mut space = [0xaa; 14];
    net.read_config(0, &mut space);
    assert_eq!(space, [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0xdc, 5, 0, 0]);
}

#[test]
fn restore_of_another_network_is_refused() {
    let (_guest, mut net) = Guest::start(0);
    let (_other, mut other) = Guest::start(0);
    other.mac = [2, 0, 0, 0, 0, 8];
    net.reset();
    let state = net.save();
    net.restore(&state).expect("its own");
    assert!(net.restore(&other.save()).is_err());
    assert!(net.restore(&[]).is_err());
    assert!(net.restore(&[state.as_slice(), &[0]].concat()).is_err());
}

proptest! {
    /// Whatever a guest does with its queues: it gets back what it gave, with
    /// no more bytes than it has room for and no more than were sent to it, or
    /// the device is at an end; and the host gets sound frames only.
    #[test]
    fn queues_of_any_content_never_panic_and_lead_to_sound_frames_only(
        acts in prop::collection::vec((any::<bool>(), hostile::act(SIZE)), 1..60),
        mergeable: bool,
        segments: bool,
        lengths in prop::collection::vec(0usize..3000, 1..8),
    ) {
        let features = if mergeable { MERGEABLE } else { 0 } | if segments { SEGMENTS } else { 0 };
        let (mut guest, mut service, events) = Guest::stepped(features);
        let mut lengths = lengths.into_iter().cycle();
        for (to_rx, act) in acts {
            let length = lengths.next().unwrap_or_default();
            let frame = [&[0; HEADER_BYTES], pattern(length, 0).as_slice()].concat();
            let _ = send(guest.peer.as_raw_fd(), &frame, MsgFlags::empty());
            let queue = if to_rx { &mut guest.rx } else { &mut guest.tx };
            act.perform(queue, 0x10_0000);
            let settled = settle(&mut service, &events);
            while let Some((header, frame)) = guest.sent() {
                prop_assert!(header[0] == 0 && header[1] == 0 && header[10..] == [0, 0]);
                prop_assert!(frame.len() >= 14 && frame.len() + HEADER_BYTES <= MAX_FRAME_BYTES);
            }
            if settled.is_err() {
                return Ok(());
            }
            let mut written = 0;
            while let Some((_, bytes)) = guest.rx.take_used() {
                prop_assert!(bytes > 0);
                written += bytes as usize;
            }
            prop_assert!(written <= 60 * 3012);
            while let Some((_, bytes)) = guest.tx.take_used() {
                prop_assert_eq!(bytes, 0);
            }
        }
    }
}
