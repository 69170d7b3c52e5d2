use std::sync::mpsc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_virtio::mock::{self, Buffer, MockQueue, Raised};
use vmm_virtio::{Activation, VirtioDevice};

use super::Balloon;
use super::worker::Service;
use crate::event_loop::Events;
use crate::hostile;

const FREE: u64 = 0x8_0000;

struct Bench {
    balloon: Balloon,
    queues: [MockQueue; 3],
    memory: GuestMemoryMmap,
    raised: mpsc::Receiver<Raised>,
}

impl Bench {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
        let queues = [0x1000, 0x2000, 0x3000].map(|base| MockQueue::new(&memory, base, 64));
        let active = (0..).zip(&queues);
        let active = active.map(|(index, queue)| queue.active(index, false));
        let (interrupt, raised) = mock::interrupt();
        let mut balloon = Balloon::new();
        balloon
            .activate(Activation {
                memory: memory.clone(),
                features: balloon.features(),
                queues: active.collect(),
                interrupt,
            })
            .expect("activates");
        memory
            .write_slice(&[7; 0x4000], GuestAddress(FREE))
            .expect("in memory");
        Self {
            balloon,
            queues,
            memory,
            raised,
        }
    }

    fn page(&self, number: u64) -> u8 {
        let address = GuestAddress(FREE + number * 0x1000 + 0xfff);
        self.memory.read_obj(address).expect("in memory")
    }
}

fn pages(first: u64, count: u32, writable: bool) -> Buffer {
    Buffer {
        address: FREE + first * 0x1000,
        length: count * 0x1000,
        writable,
    }
}

#[test]
fn pages_that_are_reported_free_are_the_hosts_again() {
    let mut bench = Bench::new();
    let head = bench.queues[2].offer(&[pages(0, 1, true), pages(2, 2, true)]);
    bench.queues[2].kick();
    assert_eq!(bench.raised.recv(), Ok(Raised::Used(2)));
    assert_eq!(bench.queues[2].take_used(), Some((head, 0)));
    assert_eq!([0, 1, 2, 3].map(|page| bench.page(page)), [0, 7, 0, 0]);
    assert_eq!(bench.balloon.pause().len(), 3);
}

#[test]
fn pages_of_other_queues_and_those_that_are_only_readable_stay() {
    let mut bench = Bench::new();
    for (queue, buffer) in [
        (0, pages(0, 4, true)),
        (1, pages(0, 4, true)),
        (2, pages(0, 4, false)),
    ] {
        let head = bench.queues[queue].offer(&[buffer]);
        bench.queues[queue].kick();
        assert_eq!(bench.raised.recv(), Ok(Raised::Used(queue as u16)));
        assert_eq!(bench.queues[queue].take_used(), Some((head, 0)));
    }
    assert_eq!([0, 1, 2, 3].map(|page| bench.page(page)), [7; 4]);
    let mut config = [9; 16];
    bench.balloon.write_config(4, &[1, 0, 0, 0]);
    bench.balloon.read_config(0, &mut config);
    assert_eq!(config, [0; 16]);
}

proptest! {
    #[test]
    fn hostile_driver_gets_an_error_or_an_answer(
        acts in prop::collection::vec(hostile::act(16), 0..32),
    ) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
        let mut queue = MockQueue::new(&memory, 0x1000, 16);
        let (interrupt, _raised) = mock::interrupt();
        let mut service = Service::new(Activation {
            memory: memory.clone(),
            features: 0,
            queues: vec![queue.active(2, false)],
            interrupt,
        });
        let events = Events::try_new().expect("events");
        // Its rings too may be what it reports.
        for base in [0x20000, 0] {
            for act in acts.clone() {
                act.perform(&mut queue, base);
                if service.answer_all(&events).is_err() {
                    break;
                }
            }
        }
    }
}
