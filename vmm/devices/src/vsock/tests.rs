use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, mpsc};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_virtio::VirtioDevice;
use vmm_virtio::mock::{Buffer, Raised};

use super::credit::BUF_ALLOC;
use super::fake_guest::{
    CID, Guest, RX_BUFFER, RX_BUFFERS, Socket, TX_BUFFERS, line, pattern, readable,
};
use super::packet::{
    HEADER_BYTES, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST,
    OP_RW, OP_SHUTDOWN, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::{HOST_CID, READY_PORT, Vsock, VsockConfig};

#[test]
fn client_before_knock_waits_and_is_let_in_by_it() {
    let mut guest = Guest::start(8);
    let mut client = guest.client();
    client.write_all(b"CONNECT 1025\n").expect("write");
    // A malformed client after it: when that one is answered, the first was
    // seen.
    let mut malformed = guest.client();
    malformed.write_all(b"CONNECT x\n").expect("write");
    assert_eq!(line(&malformed), "ERROR malformed\n");
    guest.collect();
    assert_eq!(guest.received.len(), 0);
    guest.knock();
    let (request, _) = guest.receive();
    assert_eq!((request.op, request.dst_port), (OP_REQUEST, 1025));
}

#[test]
fn knock_twice_is_told_once() {
    let mut guest = Guest::started();
    guest.send(
        Header {
            src_port: 5001,
            dst_port: READY_PORT,
            op: OP_REQUEST,
            ..Header::default()
        },
        &[],
    );
    assert_eq!(guest.receive().0.op, OP_RST);
    assert_eq!(guest.ready.try_recv(), Err(mpsc::TryRecvError::Empty));
}

#[test]
fn guest_request_to_any_other_port_is_reset_and_no_knock() {
    let mut guest = Guest::start(8);
    guest.send(
        Header {
            src_port: 5000,
            dst_port: 22,
            op: OP_REQUEST,
            ..Header::default()
        },
        &[],
    );
    let (reply, _) = guest.receive();
    assert_eq!(
        (reply.op, reply.src_port, reply.dst_port),
        (OP_RST, 22, 5000)
    );
    assert_eq!(guest.ready.try_recv(), Err(mpsc::TryRecvError::Empty));
}

#[test]
fn guest_that_refuses_closes_the_client_with_the_reason() {
    let mut guest = Guest::started();
    let (mut client, socket) = guest.requested(99);
    guest.send_on(socket, OP_RST, 0, &[]);
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("closed");
    assert_eq!(answer, "ERROR refused\n");
}

#[test]
fn bytes_flow_both_ways() {
    let mut guest = Guest::started();
    let (mut client, socket) = guest.established(1024);
    client.write_all(b"to the guest").expect("write");
    let (packet, payload) = guest.receive();
    assert_eq!(packet.op, OP_RW);
    assert_eq!(payload, b"to the guest");
    guest.send_on(socket, OP_RW, 0, b"to the host");
    let mut bytes = [0; 11];
    client.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"to the host");
}

#[test]
fn bytes_sent_with_the_greeting_arrive() {
    let mut guest = Guest::started();
    let mut client = guest.client();
    client.write_all(b"CONNECT 7\nearly").expect("write");
    client.shutdown(Shutdown::Write).expect("shutdown");
    let (request, _) = guest.receive();
    let socket = Socket {
        host_port: request.src_port,
        guest_port: 7,
        buf_alloc: 1000,
        fwd_cnt: 0,
    };
    guest.send_on(socket, OP_RESPONSE, 0, &[]);
    assert_eq!(guest.receive().1, b"early");
    let (end, _) = guest.receive();
    assert_eq!((end.op, end.flags), (OP_SHUTDOWN, SHUTDOWN_SEND));
}

#[test]
fn twenty_megabytes_then_close_arrive_whole_at_a_slow_client() {
    let mut guest = Guest::started();
    let (mut client, socket) = guest.established(1025);
    let all = pattern(20_000_000);
    let expected = all.clone();
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        client.read_to_end(&mut got).expect("read");
        (got == expected, got.len())
    });
    let (mut sent, mut forwarded) = (0u32, 0u32);
    for chunk in all.chunks(16 * 1024) {
        while sent - forwarded + chunk.len() as u32 > BUF_ALLOC {
            let (packet, _) = guest.receive();
            assert_eq!(packet.op, OP_CREDIT_UPDATE);
            forwarded = packet.fwd_cnt;
        }
        guest.send_on(socket, OP_RW, 0, chunk);
        sent += chunk.len() as u32;
    }
    guest.send_on(socket, OP_SHUTDOWN, SHUTDOWN_BOTH, &[]);
    assert_eq!(reader.join().expect("reader"), (true, all.len()));
    while guest.receive().0.op != OP_RST {}
}

#[test]
fn client_that_does_not_read_stops_the_guest_and_loses_nothing() {
    let mut guest = Guest::started();
    let (mut client, socket) = guest.established(1025);
    let mut sent = Vec::new();
    let mut forwarded = 0;
    // Until the guest may not send any more: the client's socket buffer and
    // the device's are full.
    loop {
        guest.collect();
        for (packet, _) in guest.received.drain(..) {
            forwarded = packet.fwd_cnt;
        }
        let room = BUF_ALLOC - (sent.len() as u32 - forwarded);
        let chunk = pattern(room.min(9000) as usize);
        if chunk.is_empty() {
            break;
        }
        guest.send_on(socket, OP_RW, 0, &chunk);
        sent.extend(chunk);
    }
    // Others are not kept waiting.
    let (mut other, other_socket) = guest.established(1024);
    guest.send_on(other_socket, OP_RW, 0, b"still here");
    let mut bytes = [0; 10];
    other.read_exact(&mut bytes).expect("read");
    // An abrupt end: what was taken from the guest still arrives.
    guest.send_on(socket, OP_RST, 0, &[]);
    let mut got = Vec::new();
    client.read_to_end(&mut got).expect("read");
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
}

#[test]
fn guest_that_sends_beyond_its_credit_is_reset() {
    let mut guest = Guest::started();
    let (_client, socket) = guest.established(1025);
    let chunk = pattern(60_000);
    // The client's socket takes some of it; the device no more than it said.
    for _ in 0..100 {
        guest.send_on(socket, OP_RW, 0, &chunk);
        guest.collect();
        if guest.received.iter().any(|(packet, _)| packet.op == OP_RST) {
            return;
        }
    }
    panic!("not reset after 6 MB");
}

#[test]
fn guest_without_room_is_asked_once_and_gets_the_rest_later() {
    let mut guest = Guest::started();
    let (mut client, mut socket) = guest.requested(7);
    socket.buf_alloc = 10;
    guest.send_on(socket, OP_RESPONSE, 0, &[]);
    assert_eq!(line(&client), "OK 7\n");
    client.write_all(&pattern(25)).expect("write");
    assert_eq!(guest.receive().1, pattern(25)[..10]);
    assert_eq!(guest.receive().0.op, OP_CREDIT_REQUEST);
    // It says that it still has no room: it is not asked again.
    guest.send_on(socket, OP_CREDIT_UPDATE, 0, &[]);
    socket.fwd_cnt = 10;
    guest.send_on(socket, OP_CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.receive().1, pattern(25)[10..20]);
    assert_eq!(guest.receive().0.op, OP_CREDIT_REQUEST);
    socket.fwd_cnt = 25;
    guest.send_on(socket, OP_CREDIT_UPDATE, 0, &[]);
    // Forwarded more than it got: no room, says the device, and waits.
    socket.fwd_cnt = 20;
    guest.send_on(socket, OP_CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.receive().1, pattern(25)[20..]);
}

#[test]
fn half_close_of_the_client_leaves_the_other_direction_open() {
    let mut guest = Guest::started();
    let (mut client, socket) = guest.established(7);
    client.write_all(b"hi").expect("write");
    client.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(guest.receive().1, b"hi");
    let (end, _) = guest.receive();
    assert_eq!((end.op, end.flags), (OP_SHUTDOWN, SHUTDOWN_SEND));
    guest.send_on(socket, OP_RW, 0, b"hi back");
    guest.send_on(socket, OP_SHUTDOWN, SHUTDOWN_BOTH, &[]);
    let mut got = String::new();
    client.read_to_string(&mut got).expect("read");
    assert_eq!(got, "hi back");
    assert_eq!(guest.receive().0.op, OP_RST);
}

#[test]
fn half_close_of_the_guest_ends_the_clients_input_only() {
    let mut guest = Guest::started();
    let (mut client, socket) = guest.established(7);
    guest.send_on(socket, OP_RW, 0, b"last");
    guest.send_on(socket, OP_SHUTDOWN, SHUTDOWN_SEND, &[]);
    let mut got = String::new();
    client.read_to_string(&mut got).expect("read");
    assert_eq!(got, "last");
    client.write_all(b"still").expect("write");
    assert_eq!(guest.receive().1, b"still");
}

#[test]
fn guest_that_will_not_receive_fails_the_clients_writes() {
    let mut guest = Guest::started();
    let (mut client, socket) = guest.established(7);
    guest.send_on(socket, OP_SHUTDOWN, SHUTDOWN_RECEIVE, &[]);
    let error = client.write_all(b"x").expect_err("nobody receives");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
}

#[test]
fn client_that_closes_is_told_to_the_guest_after_its_bytes() {
    let mut guest = Guest::started();
    let (mut client, socket) = guest.established(7);
    let all = pattern(100_000);
    client.write_all(&all).expect("write");
    drop(client);
    let mut got = Vec::new();
    // The end of its bytes may be seen before that it takes none either.
    loop {
        let (packet, payload) = guest.receive();
        match (packet.op, packet.flags) {
            (OP_RW, _) => got.extend(payload),
            (OP_SHUTDOWN, SHUTDOWN_BOTH) => break,
            end => assert_eq!(end, (OP_SHUTDOWN, SHUTDOWN_SEND)),
        }
    }
    assert!(got == all);
    // The guest confirms; then the port is free, and no reset answers a reset.
    guest.send_on(socket, OP_RST, 0, &[]);
    guest.send_on(socket, OP_RW, 0, b"late");
    assert_eq!(guest.receive().0.op, OP_RST);
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::started();
    let (mut loud, _) = guest.established(1);
    let (mut quiet, _) = guest.established(2);
    // Both have something to send when the device wakes up.
    let queues = guest.device.pause();
    loud.set_nonblocking(true).expect("nonblocking");
    let written = loud.write(&pattern(1 << 20)).expect("some");
    assert!(written as u64 > 2 * RX_BUFFER);
    quiet.write_all(b"me too").expect("write");
    guest.resume(queues);
    let mut before = 0;
    loop {
        let (packet, payload) = guest.receive();
        if packet.dst_port == 2 {
            assert_eq!(payload, b"me too");
            break;
        }
        before += payload.len() as u64;
    }
    assert!(before <= RX_BUFFER, "{before} bytes went first");
}

#[test]
fn packets_without_answers_taken_stop_the_tx_queue_and_go_on_later() {
    let mut guest = Guest::start(0);
    // More packets than the device keeps answers for, and no rx buffers.
    let header = Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: 1,
        dst_port: 2,
        socket_type: TYPE_STREAM,
        op: OP_RW,
        ..Header::default()
    };
    guest.write(TX_BUFFERS, &header.encode());
    let mut taken = 0;
    let mut offered = 0;
    let mut offer = |guest: &mut Guest, count: usize| {
        for _ in 0..count {
            guest.tx.offer(&[readable(TX_BUFFERS, HEADER_BYTES as u32)]);
            offered += 1;
        }
        guest.tx.kick();
    };
    offer(&mut guest, 250);
    while taken < 250 {
        guest.listen();
        while guest.tx.take_used().is_some() {
            taken += 1;
        }
    }
    offer(&mut guest, 100);
    // It takes six of them; the others when its answers are taken.
    let mut answers = 0;
    guest.offer_rx(RX_BUFFERS);
    while taken < 350 || answers < 350 {
        guest.listen();
        while guest.tx.take_used().is_some() {
            taken += 1;
        }
        guest.collect();
        answers += guest.received.drain(..).count();
    }
    assert_eq!((taken, answers), (350, 350));
}

#[test]
fn packet_of_another_guest_is_dropped() {
    let mut guest = Guest::started();
    let knock = Header {
        src_port: 1,
        dst_port: 2,
        op: OP_REQUEST,
        ..Header::default()
    };
    guest.send_as(4, knock, &[]);
    guest.send(knock, &[]);
    let (reply, _) = guest.receive();
    assert_eq!(reply.dst_cid, u64::from(CID));
    guest.collect();
    assert_eq!(guest.received.len(), 0);
}

#[test]
fn packet_shorter_than_it_says_asks_for_reset() {
    let mut guest = Guest::started();
    let header = Header {
        len: 100,
        ..Header::default()
    };
    guest.write(TX_BUFFERS, &header.encode());
    guest.tx.offer(&[readable(TX_BUFFERS, 60)]);
    guest.tx.kick();
    while guest.listen() != Raised::GuestFault {}
    guest.device.reset();
}

#[test]
fn fault_of_the_guest_ends_all_clients_until_a_reset_lets_them_in_again() {
    let mut guest = Guest::started();
    let (mut client, _) = guest.established(7);
    guest.tx.publish(guest.tx.size());
    guest.tx.kick();
    while guest.listen() != Raised::GuestFault {}
    // Neither those that are connected nor others are kept waiting.
    let mut got = Vec::new();
    client.read_to_end(&mut got).expect("read");
    assert_eq!(got, b"");
    let mut late = guest.client();
    let mut answer = String::new();
    late.read_to_string(&mut answer).expect("read");
    assert_eq!(answer, "ERROR refused\n");
    guest.start_anew();
    guest.knock();
    guest.established(7);
}

#[test]
fn client_that_closes_after_the_guest_will_not_receive_is_told_to_the_guest() {
    let mut guest = Guest::started();
    let (client, socket) = guest.established(7);
    guest.send_on(socket, OP_SHUTDOWN, SHUTDOWN_RECEIVE, &[]);
    drop(client);
    let (end, _) = guest.receive();
    assert_eq!((end.op, end.flags), (OP_SHUTDOWN, SHUTDOWN_BOTH));
}

#[test]
fn client_that_closes_before_the_guest_will_not_receive_is_told_to_the_guest() {
    let mut guest = Guest::started();
    let (mut client, mut socket) = guest.requested(7);
    // Without room its bytes stay unread, and its end unseen.
    socket.buf_alloc = 0;
    guest.send_on(socket, OP_RESPONSE, 0, &[]);
    assert_eq!(line(&client), "OK 7\n");
    client.write_all(b"unread").expect("write");
    assert_eq!(guest.receive().0.op, OP_CREDIT_REQUEST);
    drop(client);
    // When a later client is served, the end of the first has been seen.
    let (_later, _) = guest.requested(8);
    guest.send_on(socket, OP_SHUTDOWN, SHUTDOWN_RECEIVE, &[]);
    let (end, _) = guest.receive();
    assert_eq!((end.op, end.flags), (OP_SHUTDOWN, SHUTDOWN_BOTH));
}

#[test]
fn rx_buffer_without_room_asks_for_reset() {
    let mut guest = Guest::start(0);
    guest.rx.offer(&[Buffer {
        address: RX_BUFFERS,
        length: 44,
        writable: true,
    }]);
    guest.write(TX_BUFFERS, &[0; 44]);
    let header = Header {
        src_cid: u64::from(CID),
        ..Header::default()
    };
    guest.write(TX_BUFFERS, &header.encode());
    guest.tx.offer(&[readable(TX_BUFFERS, 44)]);
    guest.tx.kick();
    while guest.listen() != Raised::GuestFault {}
}

#[test]
fn pause_keeps_connections_and_activate_goes_on() {
    let mut guest = Guest::started();
    let (mut client, _) = guest.established(7);
    let queues = guest.device.pause();
    assert_eq!(queues.len(), 3);
    client.write_all(b"while paused").expect("write");
    guest.resume(queues);
    assert_eq!(guest.receive().1, b"while paused");
}

#[test]
fn restore_tells_the_guest_that_connections_are_gone() {
    let mut guest = Guest::started();
    guest.device.pause();
    let state = guest.device.save();
    let mut restored = Guest::start(8);
    restored.device.reset();
    restored.device.restore(&state).expect("restores");
    restored.forget_queues();
    restored.write(0x30000, &[0xff; 4]);
    restored.event.offer(&[Buffer {
        address: 0x30000,
        length: 4,
        writable: true,
    }]);
    restored.activate();
    assert_eq!(restored.listen(), Raised::Used(2));
    let mut event = [0xff; 4];
    restored
        .memory
        .read_slice(&mut event, GuestAddress(0x30000))
        .expect("in memory");
    assert_eq!(event, [0; 4]);
    // The agent listened before, so nobody waits for a knock.
    restored.offer_rx(RX_BUFFERS);
    restored.requested(1024);
}

#[test]
fn restore_of_another_guests_state_is_refused() {
    let directory = tempfile::tempdir().expect("directory");
    let listener = UnixListener::bind(directory.path().join("s")).expect("bind");
    let mut other = Vsock::try_new(VsockConfig {
        guest_cid: 4,
        listener,
        ready: Arc::new(|| ()),
        failed: Arc::new(|_| ()),
    })
    .expect("device");
    let guest = Guest::start(0);
    assert!(other.restore(&guest.device.save()).is_err());
}

#[test]
fn config_space_holds_the_cid_and_zeros() {
    let guest = Guest::start(0);
    let mut data = [0xff; 12];
    guest.device.read_config(0, &mut data);
    assert_eq!(data, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    guest.device.read_config(u64::MAX, &mut data);
    assert_eq!(data, [0; 12]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Packets of any content, for connections that are there and others: the
    /// device neither panics nor hangs, and still serves.
    #[test]
    fn packets_of_any_content_never_panic_and_leave_the_device_serving(
        packets in prop::collection::vec(
            (0u16..9, 0u32..4, any::<bool>(), any::<u32>(), any::<u32>(), 0usize..3000),
            1..60,
        ),
    ) {
        let mut guest = Guest::started();
        let (_client, known) = guest.established(7);
        for (op, flags, is_known, buf_alloc, fwd_cnt, length) in packets {
            let socket = Socket {
                host_port: if is_known { known.host_port } else { buf_alloc },
                buf_alloc,
                fwd_cnt,
                ..known
            };
            guest.send_on(socket, op, flags, &pattern(length));
            guest.collect();
        }
        guest.received.clear();
        let knock = Header {
            src_port: 4242,
            dst_port: 99,
            op: OP_REQUEST,
            ..Header::default()
        };
        guest.send(knock, &[]);
        while guest.receive().0.dst_port != 4242 {}
    }
}
