use std::sync::mpsc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_virtio::mock::{self, Buffer, MockQueue, Raised};
use vmm_virtio::{Activation, VirtioDevice};

use super::Rng;
use super::worker::{MAX_REQUEST_BYTES, Service};
use crate::event_loop::Events;
use crate::hostile;

fn started() -> (Rng, MockQueue, GuestMemoryMmap, mpsc::Receiver<Raised>) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let queue = MockQueue::new(&memory, 0x1000, 64);
    let (interrupt, raised) = mock::interrupt();
    let mut rng = Rng::new();
    rng.activate(Activation {
        memory: memory.clone(),
        features: 0,
        queues: vec![queue.active(0, false)],
        interrupt,
    })
    .expect("activates");
    (rng, queue, memory, raised)
}

fn buffer(address: u64, length: u32) -> Buffer {
    Buffer {
        address,
        length,
        writable: true,
    }
}

#[test]
fn request_is_filled_with_bytes_that_differ() {
    let (_rng, mut queue, memory, raised) = started();
    let head = queue.offer(&[buffer(0x10000, 64)]);
    queue.kick();
    assert_eq!(raised.recv(), Ok(Raised::Used(0)));
    assert_eq!(queue.take_used(), Some((head, 64)));
    let mut bytes = [0; 64];
    memory
        .read_slice(&mut bytes, GuestAddress(0x10000))
        .expect("in memory");
    assert_ne!(bytes[..32], bytes[32..]);
}

#[test]
fn request_larger_than_the_bound_gets_a_part() {
    let (_rng, mut queue, memory, raised) = started();
    let head = queue.offer(&[buffer(0x10000, 0x10000)]);
    queue.kick();
    assert_eq!(raised.recv(), Ok(Raised::Used(0)));
    assert_eq!(queue.take_used(), Some((head, MAX_REQUEST_BYTES as u32)));
    let mut beyond = [0; 16];
    memory
        .read_slice(
            &mut beyond,
            GuestAddress(0x10000 + MAX_REQUEST_BYTES as u64),
        )
        .expect("in memory");
    assert_eq!(beyond, [0; 16]);
}

#[test]
fn request_without_writable_part_is_given_back_empty() {
    let (_rng, mut queue, _memory, raised) = started();
    let head = queue.offer(&[Buffer {
        address: 0x10000,
        length: 8,
        writable: false,
    }]);
    queue.kick();
    assert_eq!(raised.recv(), Ok(Raised::Used(0)));
    assert_eq!(queue.take_used(), Some((head, 0)));
}

#[test]
fn request_outside_guest_memory_asks_for_reset_and_device_can_be_reset() {
    let (mut rng, mut queue, _memory, raised) = started();
    queue.offer(&[buffer(0xffff_0000, 64)]);
    queue.kick();
    assert_eq!(raised.recv(), Ok(Raised::GuestFault));
    rng.reset();
    assert_eq!(queue.take_used(), None);
}

#[test]
fn available_index_far_ahead_asks_for_reset() {
    let (_rng, queue, _memory, raised) = started();
    queue.corrupt_available_index(5000);
    queue.kick();
    assert_eq!(raised.recv(), Ok(Raised::GuestFault));
}

#[test]
fn pause_gives_the_queue_back_with_its_position() {
    let (mut rng, mut queue, _memory, raised) = started();
    queue.offer(&[buffer(0x10000, 8)]);
    queue.kick();
    assert_eq!(raised.recv(), Ok(Raised::Used(0)));
    let queues = rng.pause();
    assert_eq!(queues.len(), 1);
    assert_eq!(queues[0].queue.state().next_avail, 1);
    assert_eq!(queues[0].queue.state().next_used, 1);
    assert!(rng.pause().is_empty());
}

#[test]
fn restore_of_something_else_is_refused() {
    let mut rng = Rng::new();
    let state = rng.save();
    rng.restore(&state).expect("its own");
    assert!(rng.restore(&[]).is_err());
    assert!(rng.restore(&[state.as_slice(), &[0]].concat()).is_err());
}

proptest! {
    /// Whatever a guest does with its queue, it gets back what it gave, with no
    /// more random bytes than there is room for, or the device is at an end.
    #[test]
    fn queue_of_any_content_never_panics_and_fills_no_more_than_its_buffers(
        acts in prop::collection::vec(hostile::act(16), 1..60),
    ) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
        let mut queue = MockQueue::new(&memory, 0x1000, 16);
        let (interrupt, _raised) = mock::interrupt();
        let mut service = Service::try_new(Activation {
            memory: memory.clone(),
            features: 0,
            queues: vec![queue.active(0, false)],
            interrupt,
        })
        .expect("a queue");
        let events = Events::try_new().expect("epoll");
        for act in acts {
            let room = match &act {
                // An empty one names a request of earlier buffers.
                hostile::Act::Offer { readable, writable } if readable.len() + writable.len() > 0 => {
                    Some(writable.iter().map(|(_, length)| *length as usize).sum::<usize>())
                }
                _ => None,
            };
            act.perform(&mut queue, 0x1_0000);
            if service.fill_buffers(&events).is_err() {
                return Ok(());
            }
            let mut returned = 0;
            while let Some((_, written)) = queue.take_used() {
                returned += 1;
                prop_assert!(written as usize <= MAX_REQUEST_BYTES);
                prop_assert!(room.is_none_or(|room| written as usize <= room));
            }
            prop_assert!(returned <= 16);
        }
    }
}
