//! What a guest may put into the queues, and what a host may refuse.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm_virtio::mock::{self, MockQueue, Raised};

use super::super::packet::{HEADER_BYTES, Header, OP_REQUEST, OP_RESPONSE, TYPE_STREAM};
use super::super::table::MAX_RESETS;
use super::super::{HOST_CID, READY_PORT};
use super::*;
use crate::hostile::{self, Act, BUFFER, BUFFERS};

const CID: u32 = 3;
const QUEUE_SIZE: u16 = 32;
/// Where the buffers are, beyond the rings.
const BASE: u64 = 0x1_0000;
/// Of the one client.
const GUEST_PORT: u32 = 7;
const HOST_PORT: u32 = 1 << 30;

/// A service without a thread, and a client that has asked for a port.
struct Bench {
    service: Service,
    events: Events,
    queues: [MockQueue; 3],
    memory: GuestMemoryMmap,
    client: UnixStream,
    raised: mpsc::Receiver<Raised>,
    failed: mpsc::Receiver<io::Error>,
    _directory: TempDir,
}

fn bench() -> Bench {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("vsock.sock");
    let listener = UnixListener::bind(&path).expect("bind");
    listener.set_nonblocking(true).expect("nonblocking");
    let mut client = UnixStream::connect(&path).expect("connects");
    client.write_all(b"CONNECT 7\nbytes").expect("write");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let queues = [0x1000, 0x2000, 0x3000].map(|base| MockQueue::new(&memory, base, QUEUE_SIZE));
    let (interrupt, raised) = mock::interrupt();
    let (fail, failed) = mpsc::channel();
    let mut table = Some(Table::new(CID, listener, Arc::new(|| ())));
    let activation = Activation {
        memory: memory.clone(),
        features: 0,
        queues: (0..)
            .zip(&queues)
            .map(|(index, queue)| queue.active(index, false))
            .collect(),
        interrupt,
    };
    let failed_callback: Failed = Arc::new(move |error| {
        let _ = fail.send(error);
    });
    let mut service =
        Service::try_new(&mut table, true, activation, failed_callback).expect("all queues");
    let events = Events::try_new().expect("epoll");
    service.prepare(&events).expect("watches");
    let mut bench = Bench {
        service,
        events,
        queues,
        memory,
        client,
        raised,
        failed,
        _directory: directory,
    };
    bench.turn();
    bench
}

impl Bench {
    /// As the thread does it, but for the sleep.
    fn turn(&mut self) {
        let mut more = true;
        for _ in 0..100 {
            if !more {
                return;
            }
            more = self.service.work_unless_broken(&self.events);
            let waited = self.service.wait(&self.events, Some(Duration::ZERO));
            more |= waited.is_ok_and(|goes_on| !goes_on);
        }
        panic!("a service that never comes to rest");
    }

    fn put(&self, buffer: u64, header: Header) {
        let at = GuestAddress(BASE + buffer * BUFFER);
        self.memory
            .write_slice(&header.encode(), at)
            .expect("in memory");
    }
}

#[test]
fn host_that_lets_nobody_wait_is_told_and_ends_the_service() {
    let bench = bench();
    assert!(bench.service.goes_on(Ok(true)));
    assert!(!bench.service.goes_on(Ok(false)));
    assert!(bench.failed.try_recv().is_err());
    assert!(!bench.service.goes_on(Err(io::Error::other("as asked"))));
    let error = bench.failed.try_recv().expect("told");
    assert_eq!(error.to_string(), "as asked");
    assert_eq!(bench.raised.try_recv(), Ok(Raised::NeedsReset));
}

/// A packet that is one, most of the time for the client's connection.
fn header() -> impl Strategy<Value = Header> {
    let port = prop_oneof![
        8 => Just((GUEST_PORT, HOST_PORT)),
        2 => (any::<u32>(), Just(READY_PORT)),
        1 => (any::<u32>(), any::<u32>()),
    ];
    let length = prop_oneof![4 => 0u32..160, 1 => any::<u32>()];
    let credit = prop_oneof![4 => 0u32..0x1_0000, 1 => any::<u32>()];
    let cid = prop_oneof![16 => Just((u64::from(CID), HOST_CID)), 1 => any::<(u64, u64)>()];
    let op = prop_oneof![4 => 0u16..9, 1 => any::<u16>()];
    let kind = prop_oneof![16 => Just(TYPE_STREAM), 1 => any::<u16>()];
    (cid, port, length, kind, op, 0u32..5, credit, 0u32..300).prop_map(
        |(cid, port, len, socket_type, op, flags, buf_alloc, fwd_cnt)| Header {
            src_cid: cid.0,
            dst_cid: cid.1,
            src_port: port.0,
            dst_port: port.1,
            len,
            socket_type,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        },
    )
}

/// A driver's turn: a packet in some buffer, something done to a queue, and
/// whether the device is notified now.
fn step() -> impl Strategy<Value = (u64, Header, usize, Act, bool)> {
    (
        0..BUFFERS,
        header(),
        0usize..3,
        hostile::act(QUEUE_SIZE),
        any::<bool>(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever a guest does, the service comes to rest, keeps no more answers
    /// than it should, and tells its client when it is over.
    #[test]
    fn queues_of_any_content_never_panic_and_a_fault_ends_the_client(
        unanswered in prop::sample::select(vec![0, MAX_RESETS, MAX_RESETS + 20]),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut bench = bench();
        let knock = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: 1,
            dst_port: READY_PORT,
            socket_type: TYPE_STREAM,
            op: OP_REQUEST,
            ..Header::default()
        };
        let accept = Header {
            src_port: GUEST_PORT,
            dst_port: HOST_PORT,
            op: OP_RESPONSE,
            buf_alloc: 100,
            ..knock
        };
        let length = HEADER_BYTES as u32;
        for packet in [knock, accept] {
            bench.put(0, packet);
            let offer = Act::Offer { readable: vec![(0, length)], writable: vec![] };
            offer.perform(&mut bench.queues[1], BASE);
            let room = Act::Offer { readable: vec![], writable: vec![(BUFFER, 0x1000)] };
            room.perform(&mut bench.queues[0], BASE);
            bench.turn();
        }
        let mut line = [0; 5];
        bench.client.read_exact(&mut line).expect("the guest has accepted");
        prop_assert_eq!(&line, b"OK 7\n");
        // Answers that the guest does not take: it has offered no room for them.
        bench.put(0, Header { dst_port: 1, ..knock });
        for _ in 0..unanswered {
            let offer = Act::Offer { readable: vec![(0, length)], writable: vec![] };
            offer.perform(&mut bench.queues[1], BASE);
            bench.turn();
        }
        for (buffer, header, queue, act, notify) in steps {
            bench.put(buffer, header);
            act.perform(&mut bench.queues[queue], BASE);
            if notify {
                bench.turn();
            }
            prop_assert!(bench.service.table.waiting_resets() <= MAX_RESETS + 1);
        }
        bench.turn();
        let faults = bench.raised.try_iter().filter(|raised| *raised == Raised::GuestFault);
        prop_assert_eq!(faults.count(), usize::from(bench.service.table.is_closed()));
        if bench.service.table.is_closed() {
            let mut rest = Vec::new();
            let end = bench.client.read_to_end(&mut rest);
            // Reset, when it had bytes for the guest.
            prop_assert!(end.is_ok() || end.is_err_and(|it| it.kind() == io::ErrorKind::ConnectionReset));
        }
    }
}
