//! All connections: where packets of the guest and events of the clients go,
//! and whose turn it is to send.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_virtio::{ChainError, Segments};

use super::connection::{Connection, Stage, Verdict};
use super::greeting::Progress;
use super::packet::{
    HEADER_BYTES, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST,
    OP_RW, OP_SHUTDOWN, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::{HOST_CID, READY_PORT, Ready};
use crate::event_loop::Events;

/// Most connections at a time, those that wait for the guest among them. Each
/// costs a descriptor, and at worst `BUF_ALLOC` bytes.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// Replies that may wait for the guest to take them, before its packets are
/// left in its queue (virtio 1.2 section 5.10.6.1).
pub(super) const MAX_RESETS: usize = 256;
/// Ports of the host's side, given out in turn. Linux gives its own sockets
/// ports from 1024 up; from here they are easily told apart in a trace.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// End of the ports: beyond lie Linux's reserved ones.
const END_HOST_PORT: u32 = 1 << 31;

/// The events that a client's socket is watched for: each change once.
const CLIENT_EVENTS: EventSet = EventSet::IN
    .union(EventSet::OUT)
    .union(EventSet::READ_HANG_UP)
    .union(EventSet::EDGE_TRIGGERED);
/// Token of the listener; a connection's token is its host port.
const LISTENER: u64 = 1 << 32;

pub(super) struct Table {
    guest_cid: u64,
    listener: UnixListener,
    ready: Ready,
    guest_ready: bool,
    /// False while the process has no descriptors left for more clients.
    accepting: bool,
    /// Nobody is let in: the guest's driver has to reset the device first.
    closed: bool,
    /// By host port.
    connections: BTreeMap<u32, Connection>,
    next_port: u32,
    /// Connections with something to send, each once, next first.
    turns: VecDeque<u32>,
    /// Headers of `OP_RST` to be sent.
    resets: VecDeque<Header>,
}

impl Table {
    pub(super) fn new(guest_cid: u32, listener: UnixListener, ready: Ready) -> Self {
        Self {
            guest_cid: u64::from(guest_cid),
            listener,
            ready,
            guest_ready: false,
            accepting: true,
            closed: false,
            connections: BTreeMap::new(),
            next_port: FIRST_HOST_PORT,
            turns: VecDeque::new(),
            resets: VecDeque::new(),
        }
    }

    /// Watches the listener and the clients that are there.
    pub(super) fn watch(&mut self, events: &Events) -> io::Result<()> {
        events.watch(self.listener.as_fd(), LISTENER, EventSet::IN)?;
        self.accepting = true;
        for (&port, connection) in &self.connections {
            if let Some(stream) = connection.stream() {
                events.watch(stream.as_fd(), u64::from(port), CLIENT_EVENTS)?;
            }
        }
        Ok(())
    }

    /// Closes every connection and forgets that the guest was ready.
    pub(super) fn reset(&mut self) {
        self.connections.clear();
        self.turns.clear();
        self.resets.clear();
        self.guest_ready = false;
        self.closed = false;
    }

    /// Closes every connection, and turns away those to come, until a
    /// [`reset`](Self::reset).
    pub(super) fn close(&mut self, events: &Events) {
        self.reset();
        self.closed = true;
        self.accept_again(events);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn is_guest_ready(&self) -> bool {
        self.guest_ready
    }

    /// As before a snapshot: the guest's listeners survive, connections do not.
    pub(super) fn restore(&mut self, guest_ready: bool) {
        self.reset();
        self.guest_ready = guest_ready;
    }

    /// There may be something to send to the guest.
    pub(super) fn has_outgoing(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// Packets of the guest can be answered.
    pub(super) fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Answers that wait for room in the guest.
    #[cfg(any(test, feature = "stepped"))]
    pub(super) fn waiting_resets(&self) -> usize {
        self.resets.len()
    }

    /// Connections, whatever became of them.
    #[cfg(feature = "stepped")]
    pub(super) fn count(&self) -> usize {
        self.connections.len()
    }

    /// Handles an event of the listener or a client.
    pub(super) fn handle_event(&mut self, events: &Events, token: u64, happened: EventSet) {
        if token == LISTENER {
            self.accept(events);
        } else if let Ok(port) = u32::try_from(token) {
            let hung_up = happened.intersects(EventSet::HANG_UP | EventSet::ERROR);
            let readable = happened.intersects(EventSet::IN | EventSet::READ_HANG_UP);
            let writable = hung_up || happened.contains(EventSet::OUT);
            self.handle_client(events, port, readable, writable, hung_up);
        }
    }

    /// Handles one packet of the guest.
    ///
    /// # Errors
    /// When it is no packet: the guest's driver is broken.
    pub(super) fn handle_packet(
        &mut self,
        events: &Events,
        memory: &GuestMemoryMmap,
        packet: &Segments,
    ) -> Result<(), ChainError> {
        let mut header = [0; HEADER_BYTES];
        packet.read_at(memory, 0, &mut header)?;
        let header = Header::decode(&header);
        let end = HEADER_BYTES.saturating_add(header.len as usize);
        if end > packet.len() {
            return Err(ChainError::TooShort {
                offset: HEADER_BYTES,
                end,
                length: packet.len(),
            });
        }
        // Section 5.10.6.4: the guest must send as itself. Nobody could get an
        // answer to anything else.
        if header.src_cid != self.guest_cid {
            return Ok(());
        }
        let port = header.dst_port;
        let known = header.dst_cid == HOST_CID
            && header.socket_type == TYPE_STREAM
            && self
                .connections
                .get(&port)
                .is_some_and(|connection| connection.guest_port == header.src_port);
        if !known {
            self.refuse(&header);
            return Ok(());
        }
        let verdict = self.handle_known(memory, packet, &header)?;
        self.conclude(events, port, verdict);
        Ok(())
    }

    /// Puts the next packet into the guest's buffer, and tells its length.
    /// Nothing when there is none.
    ///
    /// # Errors
    /// When the buffer has no room for a header: the guest's driver is broken.
    pub(super) fn fill(
        &mut self,
        memory: &GuestMemoryMmap,
        buffer: &Segments,
    ) -> Result<Option<u32>, ChainError> {
        if buffer.len() <= HEADER_BYTES {
            return Err(ChainError::TooShort {
                offset: 0,
                end: HEADER_BYTES + 1,
                length: buffer.len(),
            });
        }
        if let Some(reset) = self.resets.pop_front() {
            buffer.write_at(memory, 0, &reset.encode())?;
            return Ok(Some(HEADER_BYTES as u32));
        }
        while let Some(port) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&port) else {
                continue;
            };
            connection.has_turn = false;
            let header = connection.send(memory, buffer)?;
            let guest_port = connection.guest_port;
            // To the end of the queue: no connection keeps others waiting for
            // longer than a packet.
            self.take_turn(port);
            if let Some(header) = header {
                let header = Header {
                    src_cid: HOST_CID,
                    dst_cid: self.guest_cid,
                    src_port: port,
                    dst_port: guest_port,
                    socket_type: TYPE_STREAM,
                    ..header
                };
                buffer.write_at(memory, 0, &header.encode())?;
                return Ok(Some(HEADER_BYTES as u32 + header.len));
            }
        }
        Ok(None)
    }

    fn accept(&mut self, events: &Events) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => self.take_in(events, stream),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    io::ErrorKind::WouldBlock => return,
                    _ => {
                        // No descriptors left: until a connection ends, the
                        // event would only come again and again.
                        events.forget(self.listener.as_fd());
                        self.accepting = false;
                        return;
                    }
                },
            }
        }
    }

    fn take_in(&mut self, events: &Events, stream: UnixStream) {
        if self.closed {
            turn_away(&stream, "refused");
            return;
        }
        if self.connections.len() >= MAX_CONNECTIONS && !self.drop_a_remnant() {
            turn_away(&stream, "busy");
            return;
        }
        let port = self.free_port();
        let watched = stream
            .set_nonblocking(true)
            .and_then(|()| events.watch(stream.as_fd(), u64::from(port), CLIENT_EVENTS));
        if watched.is_ok() {
            self.connections.insert(port, Connection::new(stream));
        }
    }

    /// Makes room by giving up on a guest that has not confirmed the end of a
    /// connection: the reset that section 5.10.6.5 wants after a while.
    fn drop_a_remnant(&mut self) -> bool {
        let remnant = self
            .connections
            .iter()
            .find(|(_, connection)| connection.is_remnant())
            .map(|(&port, connection)| (port, connection.guest_port));
        match remnant {
            Some((port, guest_port)) if self.takes_packets() => {
                self.connections.remove(&port);
                self.push_reset(port, guest_port);
                true
            }
            _ => false,
        }
    }

    /// A port that no connection has. There are far more ports than
    /// connections.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port + 1 < END_HOST_PORT {
                port + 1
            } else {
                FIRST_HOST_PORT
            };
            if !self.connections.contains_key(&port) {
                return port;
            }
        }
    }

    fn handle_client(
        &mut self,
        events: &Events,
        port: u32,
        readable: bool,
        writable: bool,
        hung_up: bool,
    ) {
        let Some(connection) = self.connections.get_mut(&port) else {
            return;
        };
        if let Stage::Greeting(_) = connection.stage {
            self.greet(events, port, hung_up);
            return;
        }
        let verdict = connection.handle_client(readable, writable, hung_up);
        self.conclude(events, port, verdict);
    }

    fn greet(&mut self, events: &Events, port: u32, hung_up: bool) {
        let Some(connection) = self.connections.get_mut(&port) else {
            return;
        };
        let progress = match (&mut connection.stage, hung_up) {
            (Stage::Greeting(greeting), false) => {
                let mut greeting = std::mem::take(greeting);
                let progress = connection
                    .stream()
                    .map_or(Ok(Progress::Malformed), |stream| greeting.read(stream));
                connection.stage = Stage::Greeting(greeting);
                progress.unwrap_or(Progress::Malformed)
            }
            _ => Progress::Malformed,
        };
        match progress {
            Progress::Incomplete => {}
            Progress::Malformed => {
                if let Some(stream) = connection.stream() {
                    turn_away(stream, "malformed");
                }
                self.conclude(events, port, Verdict::Remove);
            }
            Progress::Port(guest_port) => {
                connection.guest_port = guest_port;
                if self.guest_ready {
                    connection.request();
                    self.take_turn(port);
                } else {
                    connection.stage = Stage::Held;
                }
            }
        }
    }

    /// A packet that belongs to no connection: every request, for only the host
    /// connects, and whatever comes for connections that are over.
    fn refuse(&mut self, header: &Header) {
        let knocks = header.op == OP_REQUEST
            && header.socket_type == TYPE_STREAM
            && header.dst_cid == HOST_CID
            && header.dst_port == READY_PORT;
        // A reset for a reset would never end.
        if header.op != OP_RST {
            self.resets.push_back(Header {
                src_cid: header.dst_cid,
                dst_cid: header.src_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                // Linux drops packets of a type that it does not know.
                socket_type: header.socket_type,
                op: OP_RST,
                ..Header::default()
            });
        }
        if knocks && !self.guest_ready {
            self.guest_ready = true;
            self.let_in();
            (self.ready)();
        }
    }

    /// The guest is ready: whoever waits for it goes on.
    fn let_in(&mut self) {
        let mut let_in = Vec::new();
        for (&port, connection) in &mut self.connections {
            if matches!(connection.stage, Stage::Held) {
                connection.request();
                let_in.push(port);
            }
        }
        for port in let_in {
            self.take_turn(port);
        }
    }

    fn handle_known(
        &mut self,
        memory: &GuestMemoryMmap,
        packet: &Segments,
        header: &Header,
    ) -> Result<Verdict, ChainError> {
        let Some(connection) = self.connections.get_mut(&header.dst_port) else {
            return Ok(Verdict::Continue);
        };
        connection.hear_credit(header);
        Ok(match (&connection.stage, header.op) {
            (Stage::Requested, OP_RESPONSE) => connection.establish(),
            (Stage::Requested, OP_RST) => {
                if let Some(stream) = connection.stream() {
                    turn_away(stream, "refused");
                }
                Verdict::Remove
            }
            (Stage::Established, OP_RW) => connection.receive(memory, packet, header.len)?,
            (Stage::Established, OP_SHUTDOWN) => {
                connection.shut_down(header.flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND))
            }
            (Stage::Established, OP_RST) => connection.drain(),
            (Stage::Established, OP_CREDIT_REQUEST) => {
                connection.answer_credit();
                Verdict::Continue
            }
            // The first has been heard; what comes late for a connection that
            // is over changes nothing.
            (Stage::Established, OP_CREDIT_UPDATE) | (Stage::Draining, _) => Verdict::Continue,
            _ => Verdict::Reset,
        })
    }

    fn conclude(&mut self, events: &Events, port: u32, verdict: Verdict) {
        let Some(connection) = self.connections.get_mut(&port) else {
            return;
        };
        let guest_port = connection.guest_port;
        match verdict {
            Verdict::Continue => {
                self.take_turn(port);
                return;
            }
            Verdict::Drain => {
                let drained = connection.drain();
                self.push_reset(port, guest_port);
                if drained == Verdict::Continue {
                    return;
                }
            }
            Verdict::Reset => self.push_reset(port, guest_port),
            Verdict::Remove => {}
        }
        self.connections.remove(&port);
        self.accept_again(events);
    }

    /// Connections have ended, and with them the want of descriptors.
    fn accept_again(&mut self, events: &Events) {
        if !self.accepting
            && events
                .watch(self.listener.as_fd(), LISTENER, EventSet::IN)
                .is_ok()
        {
            self.accepting = true;
        }
    }

    fn push_reset(&mut self, port: u32, guest_port: u32) {
        self.resets.push_back(Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: port,
            dst_port: guest_port,
            socket_type: TYPE_STREAM,
            op: OP_RST,
            ..Header::default()
        });
    }

    fn take_turn(&mut self, port: u32) {
        if let Some(connection) = self.connections.get_mut(&port)
            && !connection.has_turn
            && connection.wants_turn()
        {
            connection.has_turn = true;
            self.turns.push_back(port);
        }
    }
}

/// Tells a client why it is not served. It may have gone already.
fn turn_away(mut stream: &UnixStream, reason: &str) {
    let _ = stream.set_nonblocking(true);
    let _ = stream.write_all(format!("ERROR {reason}\n").as_bytes());
}
