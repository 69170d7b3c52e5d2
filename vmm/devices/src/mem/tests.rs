use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_virtio::mock::{self, Buffer, MockQueue, Raised};
use vmm_virtio::{Activation, VirtioDevice};

use super::blocks::{Blocks, State};
use super::worker::Service;
use super::{Mem, MemConfig, MemError, MemSize, TooMuch};
use crate::event_loop::Events;
use crate::hostile;

const BLOCK: u64 = Mem::BLOCK_BYTES;
const START: u64 = 16 * BLOCK;
const BLOCKS: u64 = 8;
const REQUEST: u64 = 0x10000;
const RESPONSE: u64 = 0x11000;

struct Bench {
    mem: Mem,
    size: MemSize,
    queue: MockQueue,
    memory: GuestMemoryMmap,
    raised: mpsc::Receiver<Raised>,
    plugged: Arc<AtomicU64>,
}

impl Bench {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 1 << 20),
            (GuestAddress(START), (BLOCKS * BLOCK) as usize),
        ])
        .expect("memory");
        let plugged = Arc::new(AtomicU64::new(0));
        let told = Arc::clone(&plugged);
        let mut mem = Mem::try_new(MemConfig {
            start: START,
            bytes: BLOCKS * BLOCK,
            changed: Arc::new(move |bytes| told.store(bytes, Ordering::SeqCst)),
        })
        .expect("whole blocks");
        let queue = MockQueue::new(&memory, 0x1000, 64);
        let (interrupt, raised) = mock::interrupt();
        mem.activate(Activation {
            memory: memory.clone(),
            features: 0,
            queues: vec![queue.active(0, false)],
            interrupt,
        })
        .expect("activates");
        Self {
            size: mem.size(),
            mem,
            queue,
            memory,
            raised,
            plugged,
        }
    }

    /// The type of the answer, and the state in it.
    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u8, u8) {
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        self.memory
            .write_slice(&request, GuestAddress(REQUEST))
            .expect("in memory");
        self.memory
            .write_slice(&[0xff; 10], GuestAddress(RESPONSE))
            .expect("in memory");
        let head = self
            .queue
            .offer(&[buffer(REQUEST, 24, false), buffer(RESPONSE, 10, true)]);
        self.queue.kick();
        assert_eq!(self.raised.recv(), Ok(Raised::Used(0)));
        assert_eq!(self.queue.take_used(), Some((head, 10)));
        let mut response = [0; 10];
        self.memory
            .read_slice(&mut response, GuestAddress(RESPONSE))
            .expect("in memory");
        (response[0], response[8])
    }

    /// Of the configuration space, by its offset.
    fn field(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.mem.read_config(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

fn buffer(address: u64, length: u32, writable: bool) -> Buffer {
    Buffer {
        address,
        length,
        writable,
    }
}

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: (u8, u8) = (0, 0);
const NACK: (u8, u8) = (1, 0);
const ERROR: (u8, u8) = (3, 0);

#[test]
fn guest_plugs_what_is_requested_and_no_more() {
    let mut bench = Bench::new();
    assert_eq!(bench.ask(PLUG, START, 1), NACK);
    assert_eq!(bench.size.request(3 * BLOCK - 1), Ok(3 * BLOCK));
    assert_eq!(bench.raised.recv(), Ok(Raised::Config));
    let sizes = [0, 16, 24, 32, 40, 48].map(|offset| bench.field(offset));
    let region = BLOCKS * BLOCK;
    assert_eq!(sizes, [BLOCK, START, region, region, 0, 3 * BLOCK]);
    assert_eq!(bench.ask(PLUG, START + BLOCK, 2), ACK);
    assert_eq!(bench.ask(STATE, START + BLOCK, 2), (0, 0));
    assert_eq!(bench.ask(STATE, START, 1), (0, 1));
    assert_eq!(bench.ask(STATE, START, 2), (0, 2));
    assert_eq!(bench.field(40), 2 * BLOCK);
    assert_eq!(bench.ask(PLUG, START + BLOCK, 1), ERROR);
    assert_eq!(bench.ask(PLUG, START + 3 * BLOCK, 2), NACK);
    assert_eq!(bench.ask(PLUG, START + 3 * BLOCK, 1), ACK);
    bench.mem.pause();
    assert_eq!(bench.plugged.load(Ordering::SeqCst), 3 * BLOCK);
}

#[test]
fn memory_that_is_unplugged_is_the_hosts_again() {
    let mut bench = Bench::new();
    bench.size.request(4 * BLOCK).expect("fits");
    assert_eq!(bench.raised.recv(), Ok(Raised::Config));
    assert_eq!(bench.ask(PLUG, START, 4), ACK);
    let last = |block: u64| GuestAddress(START + (block + 1) * BLOCK - 1);
    for block in 0..4 {
        bench.memory.write_obj(7_u8, last(block)).expect("is there");
    }
    assert_eq!(bench.ask(UNPLUG, START + BLOCK, 2), ACK);
    let kept = [0, 1, 2, 3].map(|block| bench.memory.read_obj::<u8>(last(block)).expect("there"));
    assert_eq!(kept, [7, 0, 0, 7]);
    assert_eq!(bench.ask(UNPLUG, START, 2), ERROR);
    assert_eq!(bench.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(bench.field(40), 0);
    assert_eq!(bench.memory.read_obj::<u8>(last(0)).expect("there"), 0);
}

#[test]
fn requests_that_make_no_sense_are_errors() {
    let mut bench = Bench::new();
    bench.size.request(BLOCKS * BLOCK).expect("fits");
    assert_eq!(bench.raised.recv(), Ok(Raised::Config));
    for (kind, address, count) in [
        (4, START, 1),
        (PLUG, START - BLOCK, 1),
        (PLUG, START + 1, 1),
        (PLUG, START, 0),
        (PLUG, START + BLOCKS * BLOCK, 1),
        (PLUG, START + BLOCK, u16::MAX),
        (UNPLUG, START, 1),
        (STATE, u64::MAX, u16::MAX),
        (PLUG, 0, 1),
    ] {
        assert_eq!(
            bench.ask(kind, address, count),
            ERROR,
            "{kind} {address:#x}"
        );
    }
    // Too short a request, and no room for an answer.
    bench
        .queue
        .offer(&[buffer(REQUEST, 23, false), buffer(RESPONSE, 10, true)]);
    bench
        .queue
        .offer(&[buffer(REQUEST, 24, false), buffer(RESPONSE, 9, true)]);
    bench.queue.kick();
    assert_eq!(bench.raised.recv(), Ok(Raised::Used(0)));
    assert_eq!(bench.raised.recv(), Ok(Raised::Used(0)));
    assert_eq!(bench.queue.take_used().map(|(_, bytes)| bytes), Some(10));
    assert_eq!(bench.queue.take_used().map(|(_, bytes)| bytes), Some(0));
}

#[test]
fn request_beyond_the_region_is_refused_and_a_reset_keeps_what_is_plugged() {
    let mut bench = Bench::new();
    let too_much = BLOCKS * BLOCK + 1;
    assert_eq!(
        bench.size.request(too_much),
        Err(TooMuch {
            wanted: too_much,
            most: BLOCKS * BLOCK
        })
    );
    assert!(bench.size.request(u64::MAX).is_err());
    bench.size.request(BLOCK).expect("fits");
    assert_eq!(bench.raised.recv(), Ok(Raised::Config));
    assert_eq!(bench.ask(PLUG, START, 1), ACK);
    bench.mem.reset();
    assert_eq!(bench.field(40), BLOCK);
    // Nobody is there to be told.
    bench.size.request(0).expect("fits");
    assert!(bench.raised.try_recv().is_err());
    let saved = bench.mem.save();
    let region = |blocks: u64| MemConfig {
        start: START,
        bytes: blocks * BLOCK,
        changed: Arc::new(|_| ()),
    };
    let mut same = Mem::try_new(region(BLOCKS)).expect("whole blocks");
    same.restore(&saved).expect("is of it");
    assert_eq!(same.save(), saved);
    let mut other = Mem::try_new(region(BLOCKS - 1)).expect("whole blocks");
    assert!(other.restore(&saved).is_err());
}

#[test]
fn region_of_no_whole_blocks_is_refused() {
    for (start, bytes) in [(START + 1, BLOCK), (START, BLOCK + 4096), (0, u64::MAX)] {
        let config = MemConfig {
            start,
            bytes,
            changed: Arc::new(|_| ()),
        };
        let refused = Mem::try_new(config).map(|_| ());
        assert_eq!(refused, Err(MemError { start, bytes }));
    }
}

proptest! {
    /// Whatever the guest asks for and in whichever order, what is plugged is what it
    /// plugged and did not unplug, and never more than was requested at that time.
    #[test]
    fn blocks_are_as_a_list_of_them_would_be(
        steps in prop::collection::vec((0u8..4, 0u64..10, 0u16..5), 0..64),
    ) {
        let mut blocks = Blocks::new(START, BLOCKS * BLOCK, BLOCK);
        let mut model = [false; BLOCKS as usize];
        for (kind, at, count) in steps {
            if kind == 3 {
                blocks.request(at * BLOCK);
                continue;
            }
            let Ok(range) = blocks.range(START + at * BLOCK, count) else {
                prop_assert!(count == 0 || at + u64::from(count) > BLOCKS);
                continue;
            };
            let meant = &mut model[at as usize..at as usize + usize::from(count)];
            let state = match meant.iter().filter(|plugged| **plugged).count() {
                0 => State::Unplugged,
                all if all == meant.len() => State::Plugged,
                _ => State::Mixed,
            };
            prop_assert_eq!(blocks.state(range), state);
            if kind == 0 && blocks.plug(range).is_ok() {
                prop_assert_eq!(state, State::Unplugged);
                meant.fill(true);
                prop_assert!(blocks.plugged_bytes() <= blocks.requested_bytes());
            } else if kind == 1 && blocks.check_unplug(range).is_ok() {
                prop_assert_eq!(state, State::Plugged);
                blocks.unplug(range);
                meant.fill(false);
            } else if kind == 2 {
                blocks.unplug_all();
                model.fill(false);
            }
            let plugged = model.iter().filter(|plugged| **plugged).count() as u64;
            prop_assert_eq!(blocks.plugged_bytes(), plugged * BLOCK);
        }
    }

    #[test]
    fn hostile_driver_gets_an_error_or_an_answer(
        acts in prop::collection::vec(hostile::act(16), 0..32),
        bytes in prop::collection::vec(any::<u8>(), 64),
    ) {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 1 << 20),
            (GuestAddress(START), BLOCK as usize),
        ]).expect("memory");
        memory.write_slice(&bytes, GuestAddress(0x20000)).expect("in memory");
        let mem = Mem::try_new(MemConfig {
            start: START,
            bytes: BLOCK,
            changed: Arc::new(|_| ()),
        }).expect("whole blocks");
        mem.size().request(BLOCK).expect("fits");
        let mut queue = MockQueue::new(&memory, 0x1000, 16);
        let (interrupt, _raised) = mock::interrupt();
        let mut service = Service::try_new(Arc::clone(&mem.shared), Activation {
            memory: memory.clone(),
            features: 0,
            queues: vec![queue.active(0, false)],
            interrupt,
        }).expect("starts");
        let events = Events::try_new().expect("events");
        for act in acts {
            act.perform(&mut queue, 0x20000);
            if service.answer_requests(&events).is_err() {
                break;
            }
        }
    }
}
