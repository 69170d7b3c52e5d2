//! What a file server may try.

use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_virtio::Activation;
use vmm_virtio::mock::{self, Buffer, MockQueue, Raised};

use super::*;

const REPLY: u64 = 0x8000;
const ROOM: u32 = 200;
const UNIQUE: u64 = 0x1122_3344_5566;

struct Bench {
    relay: Relay,
    guest: Guest,
    driver: MockQueue,
    memory: GuestMemoryMmap,
    _raised: mpsc::Receiver<Raised>,
    _server: UnixStream,
}

/// A relay that has passed a `FUSE_GETATTR` to a file server.
fn bench() -> Bench {
    let (socket, server) = UnixStream::pair().expect("pair");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let driver = MockQueue::new(&memory, 0x2000, 64);
    let (interrupt, raised) = mock::interrupt();
    let activation = Activation {
        memory: memory.clone(),
        features: 0,
        queues: vec![
            MockQueue::new(&memory, 0x1000, 16).active(0, false),
            driver.active(1, false),
        ],
        interrupt,
    };
    let mut bench = Bench {
        relay: Relay::new(Server::try_new(socket).expect("server")),
        guest: Guest::new(activation).expect("both queues"),
        driver,
        memory,
        _raised: raised,
        _server: server,
    };
    let mut request = vec![0; 56];
    request[0] = 56;
    request[4] = 3;
    request[8..16].copy_from_slice(&UNIQUE.to_le_bytes());
    bench
        .memory
        .write_slice(&request, GuestAddress(0x7000))
        .expect("in memory");
    let buffer = |address, length, writable| Buffer {
        address,
        length,
        writable,
    };
    bench
        .driver
        .offer(&[buffer(0x7000, 56, false), buffer(REPLY, ROOM, true)]);
    bench
        .relay
        .take_requests(&mut bench.guest, true)
        .expect("passed on");
    bench
}

impl Bench {
    fn slot(&self) -> u16 {
        let taken = self.relay.in_flight.iter().position(Option::is_some);
        taken.expect("in flight") as u16
    }

    fn reply_part(&self) -> Part {
        let in_flight = self.relay.in_flight[usize::from(self.slot())].as_ref();
        in_flight.and_then(|it| it.reply).expect("has a reply")
    }

    /// The file server writes these bytes as the reply, and returns the request.
    fn answer(&mut self, reply: &[u8], id: u32, written: u32) -> Result<(), Fault> {
        let at = self.reply_part().address;
        let bounce = self.relay.server.bounce.memory();
        bounce
            .write_slice(reply, GuestAddress(at))
            .expect("in memory");
        self.relay.server.queues[1].pretend_used(bounce, 0, id, written);
        self.relay.take_replies(&mut self.guest)
    }

    fn guest_sees(&self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(REPLY))
            .expect("in memory");
        bytes
    }
}

fn reply(length: u32, error: i32, unique: u64, body: usize) -> Vec<u8> {
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend_from_slice(&error.to_le_bytes());
    bytes.extend_from_slice(&unique.to_le_bytes());
    bytes.resize(16 + body, 0x5a);
    bytes
}

#[test]
fn take_replies_gives_a_sound_reply_to_the_guest() {
    let mut bench = bench();
    let sound = reply(120, 0, UNIQUE, 104);
    let id = u32::from(2 * bench.slot());
    bench.answer(&sound, id, 120).expect("sound");
    assert_eq!(bench.driver.take_used(), Some((0, 120)));
    assert_eq!(bench.guest_sees(120), sound);
    assert!(!bench.relay.has_in_flight());
}

#[test]
fn take_replies_gives_a_sound_error_to_the_guest() {
    let mut bench = bench();
    let id = u32::from(2 * bench.slot());
    bench
        .answer(&reply(16, -2, UNIQUE, 0), id, 16)
        .expect("sound");
    assert_eq!(bench.driver.take_used(), Some((0, 16)));
}

#[test]
fn take_replies_refuses_what_is_no_reply_and_writes_nothing_to_the_guest() {
    let wrong = [
        ("another request's", reply(120, 0, UNIQUE + 1, 104), 120),
        ("a length of its own", reply(119, 0, UNIQUE, 104), 120),
        ("longer than it may be", reply(121, 0, UNIQUE, 105), 121),
        ("far too long", reply(u32::MAX, 0, UNIQUE, 0), u32::MAX),
        ("no header", reply(15, 0, UNIQUE, 0), 15),
        ("nothing", reply(0, 0, UNIQUE, 0), 0),
        ("a positive error", reply(16, 2, UNIQUE, 0), 16),
        ("an error beyond Linux's", reply(16, -512, UNIQUE, 0), 16),
        ("the least error", reply(16, i32::MIN, UNIQUE, 0), 16),
        ("an error with a body", reply(120, -2, UNIQUE, 104), 120),
    ];
    for (what, bytes, written) in wrong {
        let mut bench = bench();
        let id = u32::from(2 * bench.slot());
        let outcome = bench.answer(&bytes, id, written);
        assert!(
            matches!(outcome, Err(Fault::Server(Trouble::Protocol(_)))),
            "{what}: {outcome:?}"
        );
        assert_eq!(bench.guest_sees(200), [0; 200], "{what}");
        assert_eq!(bench.driver.take_used(), None, "{what}");
    }
}

#[test]
fn take_replies_refuses_a_slot_that_is_free() {
    let mut bench = bench();
    let other = u32::from(2 * (bench.slot() - 1));
    let outcome = bench.answer(&reply(120, 0, UNIQUE, 104), other, 120);
    assert!(matches!(outcome, Err(Fault::Server(Trouble::Protocol(_)))));
}

proptest! {
    /// The guest gets a reply to its request or nothing.
    #[test]
    fn take_replies_of_anything_never_panics_and_never_misleads_the_guest(
        bytes in prop::collection::vec(any::<u8>(), 16..130),
        sound_header: bool,
        id in 0u32..200,
        written in prop_oneof![0u32..140, any::<u32>()],
    ) {
        let mut bench = bench();
        let mut bytes = bytes;
        if sound_header {
            bytes[..16].copy_from_slice(&reply(written, 0, UNIQUE, 0));
        }
        let right = u32::from(2 * bench.slot());
        let id = if id < 100 { right } else { id };
        let outcome = bench.answer(&bytes, id, written);
        match bench.driver.take_used() {
            Some((head, length)) => {
                prop_assert!(outcome.is_ok());
                prop_assert_eq!((head, length, id), (0, written, right));
                prop_assert!((16..=120).contains(&length));
                let seen = bench.guest_sees(16);
                prop_assert_eq!(&seen[8..], &UNIQUE.to_le_bytes());
            }
            None => prop_assert!(outcome.is_err()),
        }
    }
}
