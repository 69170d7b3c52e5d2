//! What a file server may try, and what a guest may.

use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_virtio::Activation;
use vmm_virtio::mock::{self, Buffer, MockQueue, Raised};

use super::*;
use crate::hostile::{self, Act, BUFFER, BUFFERS};

/// Buffers of the guest lie beyond its rings.
const REQUEST: u64 = 0x4_0000;
const REPLY: u64 = 0x4_8000;
const ROOM: u32 = 200;
const UNIQUE: u64 = 0x1122_3344_5566;

struct Bench {
    relay: Relay,
    guest: Guest,
    priority: MockQueue,
    driver: MockQueue,
    memory: GuestMemoryMmap,
    _raised: mpsc::Receiver<Raised>,
    _server: UnixStream,
}

/// A relay that has passed a `FUSE_GETATTR` to a file server.
fn bench() -> Bench {
    let (socket, server) = UnixStream::pair().expect("pair");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("memory");
    let priority = MockQueue::new(&memory, 0x1000, 16);
    let driver = MockQueue::new(&memory, 0x2000, 1024);
    let (interrupt, raised) = mock::interrupt();
    let activation = Activation {
        memory: memory.clone(),
        features: 0,
        queues: vec![priority.active(0, false), driver.active(1, false)],
        interrupt,
    };
    let mut bench = Bench {
        relay: Relay::new(Server::try_new(socket).expect("server")),
        guest: Guest::new(activation).expect("both queues"),
        priority,
        driver,
        memory,
        _raised: raised,
        _server: server,
    };
    bench.put(REQUEST, &request(GETATTR, &[0; 16]));
    bench
        .driver
        .offer(&[buffer(REQUEST, 56, false), buffer(REPLY, ROOM, true)]);
    bench.take_requests().expect("passed on");
    bench
}

fn buffer(address: u64, length: u32, writable: bool) -> Buffer {
    Buffer {
        address,
        length,
        writable,
    }
}

const GETATTR: u32 = 3;

fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
    let mut request = vec![0; IN_HEADER_BYTES];
    let length = (IN_HEADER_BYTES + body.len()) as u32;
    request[0..4].copy_from_slice(&length.to_le_bytes());
    request[4..8].copy_from_slice(&opcode.to_le_bytes());
    request[8..16].copy_from_slice(&UNIQUE.to_le_bytes());
    request.extend_from_slice(body);
    request
}

impl Bench {
    fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("in memory");
    }

    fn take_requests(&mut self) -> Result<bool, Fault> {
        self.relay.take_requests(&mut self.guest, true)
    }

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

#[test]
fn take_requests_of_many_takes_some_at_a_time_and_says_that_there_are_more() {
    let mut bench = bench();
    let unknown = request(4095, &[]);
    bench.put(REQUEST, &unknown);
    for _ in 0..200 {
        bench
            .driver
            .offer(&[buffer(REQUEST, 40, false), buffer(REPLY, 16, true)]);
    }
    let mut answered = Vec::new();
    for _ in 0..2 {
        let more = bench.take_requests().expect("sound");
        let count = std::iter::from_fn(|| bench.driver.take_used()).count();
        answered.push((more, count));
    }
    assert_eq!(answered, [(true, 128), (false, 72)]);
}

#[test]
fn take_requests_refuses_one_that_is_scattered_more_than_any_need_be() {
    for (room, expected) in [(MAX_DESCRIPTORS - 1, 0), (MAX_DESCRIPTORS, -22)] {
        let mut bench = bench();
        bench.put(REQUEST, &request(GETATTR, &[0; 16]));
        let mut buffers = vec![buffer(REQUEST, 56, false)];
        buffers.extend((0..room as u64).map(|at| buffer(REPLY + at, 1, true)));
        bench.driver.offer(&buffers);
        bench.take_requests().expect("sound");
        // What is passed on is not answered yet.
        let answered = bench.driver.take_used().is_some();
        assert_eq!(answered, expected != 0, "{room}");
        assert_eq!(bench.guest_sees(8)[4..], i32::to_le_bytes(expected));
    }
}

/// A turn of a guest or of a file server.
#[derive(Clone, Debug)]
enum Step {
    /// A request, sound but for its content and how much room it has.
    Request {
        queue: usize,
        opcode: u32,
        body: Vec<u8>,
        room: u32,
    },
    /// Something else that its driver does.
    Act(usize, Act),
    /// The file server returns one of the requests that it has, with a reply
    /// that is one or an error.
    Answer {
        which: prop::sample::Index,
        error: bool,
    },
    /// It returns anything.
    Return { queue: usize, id: u32, written: u32 },
}

fn step() -> impl Strategy<Value = Step> {
    let opcode = prop_oneof![
        4 => prop::sample::select(vec![1u32, 2, 3, 15, 15, 16, 26, 36, 38, 42]),
        1 => 0u32..60,
    ];
    let bytes = prop::collection::vec(prop_oneof![4 => Just(0), 1 => any::<u8>()], 0..120);
    // Where a read has its size, and a write that of its payload.
    let size = prop::sample::select(vec![0u32, 10, 5000, 0x1_0000, 1 << 20]);
    let body = (bytes, size).prop_map(|(mut bytes, size)| {
        if let Some(field) = bytes.get_mut(16..20) {
            field.copy_from_slice(&size.to_le_bytes());
        }
        bytes
    });
    let room = prop::sample::select(vec![0u32, 15, 16, 100, 144, 5000, 0x10_1000]);
    prop_oneof![
        12 => (0..QUEUES, opcode, body, room)
            .prop_map(|(queue, opcode, body, room)| Step::Request { queue, opcode, body, room }),
        2 => (0..QUEUES, hostile::act(16)).prop_map(|(queue, act)| Step::Act(queue, act)),
        8 => any::<(prop::sample::Index, bool)>()
            .prop_map(|(which, error)| Step::Answer { which, error }),
        1 => (0..QUEUES, 0u32..200, 0u32..200)
            .prop_map(|(queue, id, written)| Step::Return { queue, id, written }),
    ]
}

impl Bench {
    fn offer(&mut self, queue: usize, act: Act) {
        let driver = match queue {
            PRIORITY => &mut self.priority,
            _ => &mut self.driver,
        };
        act.perform(driver, REQUEST);
    }

    /// Requests that the file server has, with their slots.
    fn in_flight(&self) -> Vec<(u16, &InFlight)> {
        let slots = (0..).zip(&self.relay.in_flight);
        slots
            .filter_map(|(slot, it)| Some((slot, it.as_ref()?)))
            .collect()
    }

    /// Does what a step says, `returned` requests after the start, and tells
    /// what the relay says to it.
    fn perform(&mut self, step: Step, returned: &mut [u16; QUEUES]) -> Result<bool, Fault> {
        let (queue, id, written) = match step {
            Step::Request {
                queue,
                opcode,
                body,
                room,
            } => {
                let bytes = request(opcode, &body);
                self.put(REQUEST, &bytes);
                let readable = vec![(0, bytes.len() as u32)];
                let writable = vec![(BUFFERS * BUFFER, room)];
                self.offer(queue, Act::Offer { readable, writable });
                return self.take_requests();
            }
            Step::Act(queue, act) => {
                self.offer(queue, act);
                return self.take_requests();
            }
            Step::Answer { which, error } => {
                let in_flight = self.in_flight();
                if in_flight.is_empty() {
                    return Ok(false);
                }
                let &(slot, it) = which.get(&in_flight);
                let part = it.reply.filter(|_| it.opcode != FUSE_DESTROY);
                let written = part.map_or(0, |part| if error { 16 } else { part.bytes });
                let errno = if error { -2 } else { 0 };
                if let Some(part) = part {
                    let bytes = reply(written, errno, it.unique, 0);
                    let bounce = self.relay.server.bounce.memory();
                    bounce
                        .write_slice(&bytes, GuestAddress(part.address))
                        .expect("in memory");
                }
                (it.queue, u32::from(2 * slot), written)
            }
            Step::Return { queue, id, written } => (queue, id, written),
        };
        let bounce = self.relay.server.bounce.memory();
        self.relay.server.queues[queue].pretend_used(bounce, returned[queue], id, written);
        returned[queue] += 1;
        self.relay.take_replies(&mut self.guest)?;
        self.take_requests()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever a guest and a file server do: each request is in one place, each
    /// slot is free or taken, and sound answers are never held against a server.
    #[test]
    fn steps_of_any_guest_and_server_never_panic_and_lose_no_request(
        crowd in prop::sample::select(vec![0, 62, 70]),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut bench = bench();
        let mut returned = [0; QUEUES];
        for _ in 0..crowd {
            let (readable, writable) = (vec![(0, 56)], vec![(BUFFERS * BUFFER, ROOM)]);
            bench.offer(PRIORITY + 1, Act::Offer { readable, writable });
            bench.take_requests().expect("sound");
        }
        for step in steps {
            let sound_server = !matches!(step, Step::Return { .. });
            match bench.perform(step, &mut returned) {
                Ok(_) => {}
                // Until a reset nothing more is done for it; what the server still has comes back.
                Err(Fault::Guest(_)) => {
                    bench.relay.take_replies(&mut bench.guest).expect("nothing new");
                    return Ok(());
                }
                Err(Fault::Server(trouble)) => {
                    prop_assert!(!sound_server, "{:?}", trouble);
                    return Ok(());
                }
            }
            let in_flight = bench.in_flight().len();
            let free: usize = bench.relay.free.iter().map(Vec::len).sum();
            prop_assert_eq!(in_flight + free, usize::from(Bounce::SLOTS));
            let taken = bench.guest.taken.iter().flatten().filter(|taken| **taken).count();
            prop_assert_eq!(taken, in_flight + bench.relay.waiting.len());
        }
    }
}
