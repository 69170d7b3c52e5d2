use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_virtio::Activation;
use vmm_virtio::mock::{self, Buffer, MockQueue, Raised};

use super::super::server::Server;
use super::*;

const LONG: Duration = Duration::from_secs(20);
/// `struct fuse_in_header` of a `FUSE_FORGET`, and its body.
const FORGET: [u8; 8] = [48, 0, 0, 0, 2, 0, 0, 0];

/// A service without a thread, the file server of which has two requests, and
/// that file server's end of the socket.
fn service() -> (Service, UnixStream, mpsc::Receiver<Raised>) {
    let (socket, server) = UnixStream::pair().expect("pair");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let mut priority = MockQueue::new(&memory, 0x1000, 16);
    let requests = MockQueue::new(&memory, 0x2000, 64);
    let (interrupt, raised) = mock::interrupt();
    let guest = Guest::new(Activation {
        memory: memory.clone(),
        features: 0,
        queues: vec![priority.active(0, false), requests.active(1, false)],
        interrupt,
    });
    let mut service = Service {
        share: "share".to_owned(),
        relay: Relay::new(Server::try_new(socket).expect("server")),
        guest: guest.expect("both queues"),
        failed: Arc::new(|_| ()),
        dead: false,
        abandon: Arc::default(),
    };
    memory
        .write_slice(&FORGET, GuestAddress(0x8000))
        .expect("in memory");
    for _ in 0..2 {
        priority.offer(&[Buffer {
            address: 0x8000,
            length: 48,
            writable: false,
        }]);
    }
    let taken = service.relay.take_requests(&mut service.guest, true);
    assert!(!taken.expect("passed on"));
    (service, server, raised)
}

#[test]
fn drain_after_a_fault_of_the_guest_takes_back_what_came_with_it() {
    let (mut service, server, raised) = service();
    // Priority slots are given out from the last.
    let queue = &service.relay.server.queues[0];
    for (index, slot) in [15, 14].into_iter().enumerate() {
        let memory = service.relay.server.bounce.memory();
        queue.pretend_used(memory, index as u16, 2 * slot, 0);
    }
    // The guest cannot be given back anything: its rings are beyond its memory.
    let larger = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("memory");
    service.guest.queues[0] = MockQueue::new(&larger, 2 << 20, 16).active(0, false);
    drop(server);
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let events = Events::try_new().expect("epoll");
        let outcome = service.drain(&events);
        let _ = tell.send((service.relay.has_in_flight(), outcome));
    });
    let (has_in_flight, outcome) = told.recv_timeout(LONG).expect("drained");
    assert!(!has_in_flight);
    // It got as far as stopping the file server, which is gone.
    assert!(
        matches!(outcome, Err(Fault::Server(Trouble::Ended))),
        "{outcome:?}"
    );
    assert_eq!(raised.try_recv(), Ok(Raised::GuestFault));
}
