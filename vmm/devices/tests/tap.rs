//! The network device on a tap of the kernel's, in a network namespace of its
//! own: what the host's IP makes of the guest's frames, and the guest of its.
//!
//! Needs root, `/dev/net/tun` and `ip`; without them each test says SKIP.
#![expect(unsafe_code, reason = "an interface is made by an ioctl")]

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_devices::{Net, NetConfig, NetError};
use vmm_virtio::mock::{self, Buffer, MockQueue, Raised};
use vmm_virtio::{Activation, VirtioDevice};

const PATIENCE: Duration = Duration::from_secs(20);
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HOST: [u8; 6] = [2, 0, 0, 0, 0, 2];
const GUEST_IP: [u8; 4] = [10, 1, 2, 2];
const HOST_IP: [u8; 4] = [10, 1, 2, 1];
const HEADER: usize = 12;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFER: u64 = 0x8_0000;
/// `VIRTIO_NET_F_CSUM`, `VIRTIO_NET_F_GUEST_CSUM`, TSO for IPv4 and IPv6 in both
/// directions, ECN, `VIRTIO_NET_F_MRG_RXBUF`, `VIRTIO_NET_F_STATUS`.
const FEATURES: u64 = 0x3 | 0x3 << 7 | 1 << 9 | 0x3 << 11 | 1 << 13 | 1 << 15 | 1 << 16;
const QUEUE: u16 = 64;

/// Leaves this thread in a network namespace with one tap, `tap0`, or tells why
/// there is none.
fn tap(flags: libc::c_int) -> Option<OwnedFd> {
    let alone = unshare(CloneFlags::CLONE_NEWNET).is_ok();
    let device = File::options().read(true).write(true).open("/dev/net/tun");
    let has_ip = Command::new("ip").arg("-V").output().is_ok();
    let (true, Ok(device), true) = (alone, device, has_ip) else {
        println!("SKIP: needs root, /dev/net/tun and ip of iproute2");
        return None;
    };
    // SAFETY: all zeros are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: `TUNSETIFF` reads and writes one `ifreq`, a live one of ours.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    Some(device.into())
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.expect("iproute2").success(), "ip {arguments}");
}

struct Guest {
    memory: GuestMemoryMmap,
    rx: MockQueue,
    tx: MockQueue,
    raised: mpsc::Receiver<Raised>,
    lost: mpsc::Receiver<()>,
    net: Net,
}

fn start(features: u64) -> Option<Guest> {
    let tap = tap(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
    ip("link set tap0 address 02:00:00:00:00:02 up");
    ip("address add 10.1.2.1/24 dev tap0");
    ip("neighbour replace 10.1.2.2 lladdr 02:00:00:00:00:01 dev tap0");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("memory");
    let rx = MockQueue::new(&memory, 0x1000, QUEUE);
    let tx = MockQueue::new(&memory, 0x4000, QUEUE);
    let (interrupt, raised) = mock::interrupt();
    let (tell, lost) = mpsc::channel();
    let mut net = Net::try_new(NetConfig {
        mac: GUEST,
        mtu: 1500,
        tap,
        lost: Arc::new(move |_| {
            let _ = tell.send(());
        }),
    })
    .expect("a tap");
    net.activate(Activation {
        memory: memory.clone(),
        features,
        queues: vec![rx.active(0, false), tx.active(1, false)],
        interrupt,
    })
    .expect("activates");
    let mut guest = Guest {
        memory,
        rx,
        tx,
        raised,
        lost,
        net,
    };
    for index in 0..QUEUE {
        guest.rx.offer(&[Buffer {
            address: RX_BUFFERS + 0x1000 * u64::from(index),
            length: 0x1000,
            writable: true,
        }]);
    }
    guest.rx.kick();
    Some(guest)
}

impl Guest {
    /// The next frame of IPv4, header first; the host's kernel also talks of
    /// IPv6.
    fn receive(&mut self) -> Vec<u8> {
        loop {
            let Some((head, written)) = self.rx.take_used() else {
                self.raised.recv_timeout(PATIENCE).expect("a frame");
                continue;
            };
            let mut bytes = vec![0; written as usize];
            let address = RX_BUFFERS + 0x1000 * u64::from(head);
            self.memory
                .read_slice(&mut bytes, GuestAddress(address))
                .expect("in memory");
            if bytes[HEADER + 12..HEADER + 14] == [8, 0] {
                return bytes;
            }
        }
    }

    fn send(&mut self, header: [u8; HEADER], frame: &[u8]) {
        let bytes = [header.as_slice(), frame].concat();
        self.memory
            .write_slice(&bytes, GuestAddress(TX_BUFFER))
            .expect("in memory");
        self.tx.offer(&[Buffer {
            address: TX_BUFFER,
            length: bytes.len() as u32,
            writable: false,
        }]);
        self.tx.kick();
        loop {
            match self.tx.take_used() {
                Some(_) => return,
                None => drop(self.raised.recv_timeout(PATIENCE).expect("taken")),
            }
        }
    }
}

/// Sum of 16-bit words, as IP has it.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2);
    let sum = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)))
        .sum::<u32>();
    (sum & 0xffff) + (sum >> 16)
}

fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// What the sum of an UDP datagram begins with.
fn pseudo_header(length: usize) -> u32 {
    sum(&GUEST_IP) + sum(&HOST_IP) + 17 + length as u32
}

/// A UDP datagram from the guest to the host, its checksum left to the device.
fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len();
    let mut ip = vec![0x45, 0];
    ip.extend((20 + length as u16).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(GUEST_IP);
    ip.extend(HOST_IP);
    let checksum = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = [HOST, GUEST].concat();
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(7u16.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend((length as u16).to_be_bytes());
    frame.extend(fold(pseudo_header(length)).to_be_bytes());
    frame.extend(payload);
    frame
}

#[test]
fn datagrams_go_both_ways_with_checksums_left_to_the_other_side() {
    let Some(mut guest) = start(FEATURES) else {
        return;
    };
    let socket = UdpSocket::bind("10.1.2.1:5000").expect("bind");
    socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    socket.send_to(b"to the guest", "10.1.2.2:7").expect("send");
    let frame = guest.receive();
    // NEEDS_CSUM from the UDP header on, at offset 6 of it; one buffer.
    assert_eq!(frame[..HEADER], [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 1, 0]);
    assert!(frame.ends_with(b"to the guest"));
    let needs_checksum = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    guest.send(needs_checksum, &datagram(5000, b"to the host"));
    let mut bytes = [0; 100];
    let (length, from) = socket.recv_from(&mut bytes).expect("in time");
    assert_eq!(&bytes[..length], b"to the host");
    assert_eq!(from.to_string(), "10.1.2.2:7");
    // What the kernel refuses, and what comes while the interface is down, is dropped.
    let beyond = [1, 0, 0, 0, 0, 0, 0xff, 0xff, 6, 0, 0, 0];
    guest.send(beyond, &datagram(5000, b"malformed"));
    ip("link set tap0 down");
    guest.send(needs_checksum, &datagram(5000, b"unheard"));
    ip("link set tap0 up");
    guest.send(needs_checksum, &datagram(5000, b"at last"));
    let length = socket.recv(&mut bytes).expect("in time");
    assert_eq!(&bytes[..length], b"at last");
}

#[test]
fn driver_without_checksums_gets_frames_with_nothing_left_to_do() {
    let Some(mut guest) = start(0) else { return };
    let socket = UdpSocket::bind("10.1.2.1:5000").expect("bind");
    socket.send_to(b"to the guest", "10.1.2.2:7").expect("send");
    let frame = guest.receive();
    assert_eq!(frame[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    let udp = &frame[HEADER + 34..];
    assert_eq!(fold(pseudo_header(udp.len()) + sum(udp)), 0xffff);
}

#[test]
fn interface_that_is_deleted_takes_the_link_down() {
    let Some(mut guest) = start(FEATURES) else {
        return;
    };
    ip("link delete tap0");
    guest.lost.recv_timeout(PATIENCE).expect("told");
    while guest.raised.recv_timeout(PATIENCE).expect("told") != Raised::Config {}
    let mut status = [0xff; 2];
    guest.net.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    guest.send([0; HEADER], &datagram(5000, b"unheard"));
}

#[test]
fn interface_that_is_deleted_before_the_driver_starts_is_no_failure() {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let Some(tap) = tap(flags) else { return };
    let (tell, lost) = mpsc::channel();
    let mut net = Net::try_new(NetConfig {
        mac: GUEST,
        mtu: 1500,
        tap,
        lost: Arc::new(move |error| drop(tell.send(error))),
    })
    .expect("a tap");
    ip("link delete tap0");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let queues = [0x1000, 0x4000].map(|base| MockQueue::new(&memory, base, QUEUE));
    net.activate(Activation {
        memory,
        features: FEATURES,
        queues: (0..)
            .zip(&queues)
            .map(|(index, queue)| queue.active(index, false))
            .collect(),
        interrupt: mock::interrupt().0,
    })
    .expect("activates");
    let error = lost.recv_timeout(PATIENCE).expect("told");
    assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
}

#[test]
fn interface_of_another_kind_is_refused() {
    let Some(tap) = tap(libc::IFF_TAP | libc::IFF_NO_PI) else {
        return;
    };
    let refused = Net::try_new(NetConfig {
        mac: GUEST,
        mtu: 1500,
        tap,
        lost: Arc::new(|_| ()),
    });
    assert!(matches!(refused.map(drop), Err(NetError::Flags { .. })));
}
