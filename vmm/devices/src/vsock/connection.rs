//! One connection: a host client on one side, a socket in the guest on the
//! other.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vm_memory::{GuestMemoryMmap, ReadVolatile, VolatileMemoryError, WriteVolatile};
use vmm_virtio::{ChainError, Segments};

use super::credit::{BUF_ALLOC, Credit};
use super::greeting::Greeting;
use super::packet::{
    HEADER_BYTES, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RW, OP_SHUTDOWN,
    SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};

/// How far a connection got.
#[derive(Debug)]
pub(super) enum Stage {
    /// The client has not said where it wants to go.
    Greeting(Greeting),
    /// The guest is not ready yet.
    Held,
    /// The guest has been or is about to be asked.
    Requested,
    /// Bytes flow.
    Established,
    /// The guest has ended it; what it sent before is still on its way to the
    /// client.
    Draining,
}

/// What is to be done after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Verdict {
    /// Go on; if there is something to send, take a turn.
    Continue,
    /// Forget it.
    Remove,
    /// Tell the guest that it is over, then forget it.
    Reset,
    /// Tell the guest that it is over; forget it when the client has taken what
    /// came before.
    Drain,
}

#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "facts that are independent of each other"
)]
pub(super) struct Connection {
    pub(super) stage: Stage,
    pub(super) guest_port: u32,
    /// It waits for its turn to send; it is in the queue of turns once.
    pub(super) has_turn: bool,
    /// Nothing when the client is gone for good.
    stream: Option<UnixStream>,
    /// From the guest, not yet taken by the client. At most [`BUF_ALLOC`].
    backlog: VecDeque<u8>,
    credit: Credit,
    /// The client has or may have bytes for us. Events come once for each
    /// change, so this is kept until a read would block.
    readable: bool,
    /// The client has closed both directions.
    hung_up: bool,
    request_due: bool,
    credit_update_due: bool,
    credit_requested: bool,
    /// Directions that we have ended, and what of it the guest has been told.
    ended: u32,
    ended_told: u32,
    /// Directions that the guest has ended.
    guest_ended: u32,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stage: Stage::Greeting(Greeting::default()),
            guest_port: 0,
            has_turn: false,
            stream: Some(stream),
            backlog: VecDeque::new(),
            credit: Credit::default(),
            readable: false,
            hung_up: false,
            request_due: false,
            credit_update_due: false,
            credit_requested: false,
            ended: 0,
            ended_told: 0,
            guest_ended: 0,
        }
    }

    pub(super) fn stream(&self) -> Option<&UnixStream> {
        self.stream.as_ref()
    }

    /// The client is gone, the guest knows, and has yet to confirm.
    pub(super) fn is_remnant(&self) -> bool {
        self.stream.is_none() && self.ended_told == SHUTDOWN_BOTH
    }

    /// Asks the guest for the connection.
    pub(super) fn request(&mut self) {
        self.stage = Stage::Requested;
        self.request_due = true;
    }

    /// Something may be sent to the guest.
    pub(super) fn wants_turn(&self) -> bool {
        match self.stage {
            Stage::Requested => self.request_due,
            Stage::Established => {
                self.credit_update_due
                    || self.ended != self.ended_told
                    || (self.can_read()
                        && (self.credit.room_in_guest() > 0 || !self.credit_requested))
            }
            _ => false,
        }
    }

    /// The client's socket has changed.
    pub(super) fn handle_client(
        &mut self,
        readable: bool,
        writable: bool,
        hung_up: bool,
    ) -> Verdict {
        self.readable |= readable || hung_up;
        self.hung_up |= hung_up;
        match self.stage {
            Stage::Held | Stage::Draining if hung_up => Verdict::Remove,
            // A guest that has not been asked need not be told.
            Stage::Requested if hung_up && self.request_due => Verdict::Remove,
            Stage::Requested if hung_up => Verdict::Reset,
            // The greeting is the table's, which knows the other connections.
            Stage::Greeting(_) | Stage::Held | Stage::Requested => Verdict::Continue,
            Stage::Established => {
                if writable {
                    self.flush();
                }
                self.lose_client_if_over();
                Verdict::Continue
            }
            Stage::Draining => {
                if writable {
                    self.flush();
                }
                self.drained()
            }
        }
    }

    /// The guest accepts.
    pub(super) fn establish(&mut self) -> Verdict {
        self.stage = Stage::Established;
        self.readable = true;
        let line = format!("OK {}\n", self.guest_port);
        // A socket nothing was written to has room for a line.
        match self
            .stream
            .as_ref()
            .map(|mut stream| stream.write_all(line.as_bytes()))
        {
            Some(Ok(())) => Verdict::Continue,
            _ => Verdict::Reset,
        }
    }

    /// Every packet of the guest says how much room it has.
    pub(super) fn hear_credit(&mut self, header: &Header) {
        self.credit.hear(header.buf_alloc, header.fwd_cnt);
        if self.credit.room_in_guest() > 0 {
            self.credit_requested = false;
        }
    }

    /// The guest asks for our room.
    pub(super) fn answer_credit(&mut self) {
        self.credit_update_due = true;
    }

    /// Payload from the guest: `length` bytes after the header.
    pub(super) fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        packet: &Segments,
        length: u32,
    ) -> Result<Verdict, ChainError> {
        if self.guest_ended & SHUTDOWN_SEND != 0 || !self.credit.receive(length) {
            return Ok(Verdict::Reset);
        }
        let mut done = 0;
        if self.backlog.is_empty() && self.takes_bytes() {
            done = self.pass_on(memory, packet, length as usize)?;
        }
        self.credit.forward(done as u32);
        let rest = length as usize - done;
        if self.takes_bytes() {
            if rest > 0 {
                let mut bytes = vec![0; rest];
                packet.read_at(memory, HEADER_BYTES + done, &mut bytes)?;
                self.backlog.extend(bytes);
            }
        } else {
            // Nobody is there to read them.
            self.credit.forward(rest as u32);
        }
        self.credit_update_due |= self.credit.is_update_due();
        Ok(Verdict::Continue)
    }

    /// The guest ends directions.
    pub(super) fn shut_down(&mut self, flags: u32) -> Verdict {
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        if self.guest_ended == SHUTDOWN_BOTH {
            return Verdict::Drain;
        }
        if self.guest_ended & SHUTDOWN_RECEIVE != 0
            && let Some(stream) = &self.stream
        {
            // The client's next write fails, as it should.
            let _ = stream.shutdown(Shutdown::Read);
            self.readable = false;
        }
        self.end_writing_when_flushed();
        self.lose_client_if_over();
        Verdict::Continue
    }

    /// The guest is done with it. What it sent still goes to the client.
    pub(super) fn drain(&mut self) -> Verdict {
        self.stage = Stage::Draining;
        self.drained()
    }

    /// Fills a packet for the guest: payload from the client right into the
    /// guest's buffer, else what has to be told. Nothing when there is nothing.
    pub(super) fn send(
        &mut self,
        memory: &GuestMemoryMmap,
        buffer: &Segments,
    ) -> Result<Option<Header>, ChainError> {
        if self.request_due {
            self.request_due = false;
            return Ok(Some(self.header(OP_REQUEST)));
        }
        if !matches!(self.stage, Stage::Established) {
            return Ok(None);
        }
        if self.can_read() && self.credit.room_in_guest() > 0 {
            let length = self.read_client(memory, buffer)?;
            if length > 0 {
                self.credit.send(length);
                let mut header = self.header(OP_RW);
                header.len = length;
                return Ok(Some(header));
            }
        }
        if self.credit_update_due {
            return Ok(Some(self.header(OP_CREDIT_UPDATE)));
        }
        if self.can_read() && self.credit.room_in_guest() == 0 && !self.credit_requested {
            self.credit_requested = true;
            return Ok(Some(self.header(OP_CREDIT_REQUEST)));
        }
        if self.ended != self.ended_told {
            self.ended_told = self.ended;
            let mut header = self.header(OP_SHUTDOWN);
            header.flags = self.ended;
            return Ok(Some(header));
        }
        Ok(None)
    }

    fn header(&mut self, op: u16) -> Header {
        // Every packet carries it, so none more is due.
        self.credit_update_due = false;
        Header {
            op,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.credit.tell(),
            ..Header::default()
        }
    }

    fn can_read(&self) -> bool {
        self.readable
            && self.stream.is_some()
            && self.ended & SHUTDOWN_SEND == 0
            && self.guest_ended & SHUTDOWN_RECEIVE == 0
    }

    /// The client may still want what the guest sends.
    fn takes_bytes(&self) -> bool {
        self.stream.is_some() && self.ended & SHUTDOWN_RECEIVE == 0
    }

    fn read_client(
        &mut self,
        memory: &GuestMemoryMmap,
        buffer: &Segments,
    ) -> Result<u32, ChainError> {
        let Some(mut stream) = self.stream.as_ref() else {
            return Ok(0);
        };
        let room = (buffer.len() - HEADER_BYTES).min(self.credit.room_in_guest() as usize);
        let mut length = 0;
        let mut outcome = Ok(None);
        buffer.for_each_slice(memory, HEADER_BYTES, room, |mut slice| {
            outcome = retry(|| stream.read_volatile(&mut slice));
            match outcome {
                Ok(Some(count)) => {
                    length += count;
                    count == slice.len()
                }
                _ => false,
            }
        })?;
        match outcome {
            // Bytes of an earlier piece go first; the end is met again.
            _ if length > 0 => {
                if matches!(outcome, Ok(None)) {
                    self.readable = false;
                }
            }
            Ok(None) => self.readable = false,
            Ok(Some(_)) | Err(_) => {
                self.ended |= SHUTDOWN_SEND;
                if outcome.is_err() || self.hung_up {
                    self.lose_client();
                }
            }
        }
        Ok(length as u32)
    }

    /// Writes payload to the client straight from guest memory; how much it
    /// took.
    fn pass_on(
        &mut self,
        memory: &GuestMemoryMmap,
        packet: &Segments,
        length: usize,
    ) -> Result<usize, ChainError> {
        let Some(mut stream) = self.stream.as_ref() else {
            return Ok(0);
        };
        let mut done = 0;
        let mut failed = false;
        packet.for_each_slice(memory, HEADER_BYTES, length, |slice| {
            match retry(|| stream.write_volatile(&slice)) {
                Ok(Some(count)) => {
                    done += count;
                    count == slice.len()
                }
                Ok(None) => false,
                Err(_) => {
                    failed = true;
                    false
                }
            }
        })?;
        if failed {
            self.refuse_bytes();
        }
        Ok(done)
    }

    /// Passes on what was kept for the client.
    fn flush(&mut self) {
        while let (Some(mut stream), false) = (self.stream.as_ref(), self.backlog.is_empty()) {
            match stream.write(self.backlog.as_slices().0) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.credit.forward(count as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.refuse_bytes(),
            }
        }
        if self.backlog.is_empty() {
            // A connection that is idle holds no memory.
            self.backlog.shrink_to_fit();
        }
        self.credit_update_due |= self.credit.is_update_due();
        self.end_writing_when_flushed();
    }

    fn end_writing_when_flushed(&self) {
        if self.guest_ended & SHUTDOWN_SEND != 0
            && self.backlog.is_empty()
            && let Some(stream) = &self.stream
        {
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    /// The client does not take bytes any more; it may still send.
    fn refuse_bytes(&mut self) {
        self.credit.forward(self.backlog.len() as u32);
        self.backlog = VecDeque::new();
        self.ended |= SHUTDOWN_RECEIVE;
    }

    /// The client has closed, and nothing that it sent before is still wanted:
    /// no read will meet its end.
    fn lose_client_if_over(&mut self) {
        let is_read = self.ended & SHUTDOWN_SEND != 0 || self.guest_ended & SHUTDOWN_RECEIVE != 0;
        if self.hung_up && is_read {
            self.lose_client();
        }
    }

    fn lose_client(&mut self) {
        self.refuse_bytes();
        self.ended = SHUTDOWN_BOTH;
        self.stream = None;
    }

    fn drained(&self) -> Verdict {
        if self.backlog.is_empty() || self.stream.is_none() {
            Verdict::Remove
        } else {
            Verdict::Continue
        }
    }
}

/// One read or write: how many bytes, or nothing when it would block.
fn retry(
    mut operation: impl FnMut() -> Result<usize, VolatileMemoryError>,
) -> io::Result<Option<usize>> {
    loop {
        match operation() {
            Ok(count) => return Ok(Some(count)),
            Err(VolatileMemoryError::IOError(error)) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return Ok(None),
                _ => return Err(error),
            },
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}
