//! From the guest's queues to the file server's and back: which request is in
//! which slot.

use std::collections::VecDeque;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileSlice};
use vmm_virtio::{Activation, ActiveQueue, Chain, ChainError, Interrupt, QueueError};

use super::bounce::{Bounce, Slot, SlotKind};
use super::request::{
    self, FUSE_DESTROY, FUSE_INIT, FUSE_INTERRUPT, FUSE_WRITE, IN_HEADER_BYTES, INIT_SETXATTR_EXT,
    InHeader, MAX_PAYLOAD_BYTES, MAX_REQUEST_BYTES, OUT_HEADER_BYTES, Refused, WRITE_PREFIX_BYTES,
};
use super::server::{QUEUES, Server, Trouble};
use super::shadow_queue::{Part, Used};

/// The guest's and the file server's queue of requests that must not wait.
const PRIORITY: usize = 0;
/// Largest error number of a reply: Linux takes 512 and more for broken.
const MAX_ERRNO: i32 = 511;
/// Requests taken from a queue of the guest before replies, and a wish to stop,
/// get their turn: a guest that refills it as fast would keep both away.
const REQUESTS_AT_A_TIME: usize = 128;
/// Most descriptors of a request: a page each for the largest payload, which
/// need not begin with one, and headers and arguments both ways. Bounds what a
/// guest can make us keep of requests that wait.
const MAX_DESCRIPTORS: usize = MAX_PAYLOAD_BYTES / 4096 + 16;

/// Why the relay cannot go on.
#[derive(Debug)]
pub(super) enum Fault {
    /// The guest's driver is broken.
    Guest(GuestFault),
    /// The file server is.
    Server(Trouble),
}

/// In what way the guest's driver is broken.
#[derive(Debug, Error)]
pub(super) enum GuestFault {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("request {head} is offered again before it was given back")]
    OfferedAgain { head: u16 },
}

impl From<QueueError> for Fault {
    fn from(error: QueueError) -> Self {
        Self::Guest(error.into())
    }
}

impl From<ChainError> for Fault {
    fn from(error: ChainError) -> Self {
        Self::Guest(error.into())
    }
}

impl<T: Into<Trouble>> From<T> for Fault {
    fn from(trouble: T) -> Self {
        Self::Server(trouble.into())
    }
}

/// The guest's side, as long as its driver is there.
pub(super) struct Guest {
    pub(super) queues: [ActiveQueue; QUEUES],
    pub(super) interrupt: Arc<dyn Interrupt>,
    memory: GuestMemoryMmap,
    /// Heads that the device has, for each queue: a driver that offers one
    /// again would otherwise make us keep any number of requests.
    taken: [Vec<bool>; QUEUES],
    /// Requests have been given back since the driver was last told.
    completed: [bool; QUEUES],
}

impl Guest {
    /// Nothing when the driver did not set up both queues.
    pub(super) fn new(activation: Activation) -> Option<Self> {
        let queues = <[ActiveQueue; QUEUES]>::try_from(activation.queues).ok()?;
        let taken = queues
            .each_ref()
            .map(|queue| vec![false; usize::from(queue.queue.state().size)]);
        Some(Self {
            queues,
            interrupt: activation.interrupt,
            memory: activation.memory,
            taken,
            completed: [false; QUEUES],
        })
    }

    fn pop(&mut self, queue: usize) -> Result<Option<Chain>, Fault> {
        let Some(chain) = self.queues[queue].pop(&self.memory)? else {
            return Ok(None);
        };
        match self.taken[queue].get_mut(usize::from(chain.head)) {
            Some(taken) if !*taken => *taken = true,
            _ => return Err(Fault::Guest(GuestFault::OfferedAgain { head: chain.head })),
        }
        Ok(Some(chain))
    }

    fn undo_pop(&mut self, queue: usize, chain: &Chain) {
        self.queues[queue].undo_pop();
        self.taken[queue][usize::from(chain.head)] = false;
    }

    fn complete(&mut self, queue: usize, head: u16, written: usize) -> Result<(), Fault> {
        self.taken[queue][usize::from(head)] = false;
        self.completed[queue] = true;
        self.queues[queue].complete(&self.memory, head, written as u32)?;
        Ok(())
    }

    fn signal(&mut self) -> Result<(), Fault> {
        for (queue, completed) in self.queues.iter_mut().zip(&mut self.completed) {
            if std::mem::take(completed) {
                queue.signal(&self.memory, self.interrupt.as_ref())?;
            }
        }
        Ok(())
    }
}

/// A request that the file server has.
struct InFlight {
    /// Which of the guest's queues it came from, and goes back to.
    queue: usize,
    chain: Chain,
    opcode: u32,
    unique: u64,
    reply: Option<Part>,
}

/// What became of a request.
enum Admission {
    /// It is on its way, or answered.
    Done,
    /// There is no slot for it at the moment.
    NoSlot(SlotKind, Chain),
}

/// Slots and what is in them.
pub(super) struct Relay {
    pub(super) server: Server,
    pub(super) setxattr_ext: bool,
    slots: Vec<Slot>,
    in_flight: Vec<Option<InFlight>>,
    /// Indices of free slots, for each kind.
    free: [Vec<u16>; 3],
    /// Requests that wait for a large slot, and do not keep those behind them
    /// waiting. Bounded by the guest's queue: each head can be in it once.
    waiting: VecDeque<Chain>,
    scratch: Vec<u8>,
    /// Large slots have been used since their memory was given back.
    large_used: bool,
}

impl Relay {
    pub(super) fn new(server: Server) -> Self {
        let slots: Vec<Slot> = Bounce::slots().collect();
        let mut relay = Self {
            server,
            setxattr_ext: false,
            in_flight: slots.iter().map(|_| None).collect(),
            slots,
            free: [Vec::new(), Vec::new(), Vec::new()],
            waiting: VecDeque::new(),
            scratch: Vec::new(),
            large_used: false,
        };
        relay.clear();
        relay
    }

    /// Forgets every request: the file server has none, or is gone.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.free.iter_mut().for_each(Vec::clear);
        for slot in &self.slots {
            self.in_flight[usize::from(slot.index)] = None;
            self.free[slot.kind as usize].push(slot.index);
        }
    }

    /// Requests that are with the file server.
    pub(super) fn has_in_flight(&self) -> bool {
        self.in_flight.iter().any(Option::is_some)
    }

    /// Requests that are taken from the guest and not with the file server.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Requests that are taken from the guest.
    #[cfg(feature = "stepped")]
    pub(super) fn held(&self) -> usize {
        self.in_flight.iter().flatten().count() + self.waiting.len()
    }

    /// Large slots hold memory and no request.
    pub(super) fn can_release(&self) -> bool {
        self.large_used
            && self.slots.iter().all(|slot| {
                slot.kind != SlotKind::Large || self.in_flight[usize::from(slot.index)].is_none()
            })
    }

    /// Gives the memory of the large slots back.
    pub(super) fn release(&mut self) -> Result<(), Fault> {
        self.large_used = false;
        self.server.bounce.release_large()?;
        Ok(())
    }

    /// Takes what the guest asks for, as far as there are slots. With
    /// `new_ones` false, only what was taken from its queues before. True when
    /// there may be more, of which nobody will tell.
    pub(super) fn take_requests(
        &mut self,
        guest: &mut Guest,
        new_ones: bool,
    ) -> Result<bool, Fault> {
        let outcome = self.admit_all(guest, new_ones);
        // Also when the guest made a mistake: what was admitted before it has
        // to come back.
        for queue in &mut self.server.queues {
            queue.notify(self.server.bounce.memory())?;
        }
        let more = outcome?;
        guest.signal()?;
        Ok(more)
    }

    fn admit_all(&mut self, guest: &mut Guest, new_ones: bool) -> Result<bool, Fault> {
        while let Some(chain) = self.waiting.pop_front() {
            if let Admission::NoSlot(_, chain) = self.admit(guest, PRIORITY + 1, chain)? {
                self.waiting.push_front(chain);
                break;
            }
        }
        let mut more = false;
        if new_ones {
            for queue in 0..QUEUES {
                more |= self.take_from(guest, queue)?;
            }
        }
        Ok(more)
    }

    /// Gives the guest what the file server has returned.
    pub(super) fn take_replies(&mut self, guest: &mut Guest) -> Result<(), Fault> {
        for queue in 0..QUEUES {
            loop {
                let memory = self.server.bounce.memory();
                match self.server.queues[queue].take_used(memory)? {
                    Some(used) => self.give_back(guest, queue, used)?,
                    None if self.server.queues[queue].listen(memory)? => {}
                    None => break,
                }
            }
        }
        guest.signal()
    }

    /// True when it took all that it may take at a time.
    fn take_from(&mut self, guest: &mut Guest, queue: usize) -> Result<bool, Fault> {
        for _ in 0..REQUESTS_AT_A_TIME {
            let Some(chain) = guest.pop(queue)? else {
                if guest.queues[queue].listen(&guest.memory)? {
                    continue;
                }
                return Ok(false);
            };
            match self.admit(guest, queue, chain)? {
                Admission::Done => {}
                Admission::NoSlot(SlotKind::Large, chain) => self.waiting.push_back(chain),
                Admission::NoSlot(_, chain) => {
                    // It stays with the guest until a reply frees a slot.
                    guest.undo_pop(queue, &chain);
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Checks a request, and passes it on or answers it.
    fn admit(&mut self, guest: &mut Guest, queue: usize, chain: Chain) -> Result<Admission, Fault> {
        let total = chain.readable.len();
        let mut header = [0; IN_HEADER_BYTES];
        // Without a header there is nothing that a reply could be a reply to.
        chain.readable.read_at(&guest.memory, 0, &mut header)?;
        let fields = InHeader::decode(&header);
        if fields.opcode == FUSE_INTERRUPT {
            // The file server ignores it.
            guest.complete(queue, chain.head, 0)?;
            return Ok(Admission::Done);
        }
        let einval = Refused(nix::libc::EINVAL);
        // Section 5.11.6.2: interrupts and forgets only.
        let misplaced = queue == PRIORITY && !fields.is_without_reply();
        let scattered = chain.readable.count() + chain.writable.count() > MAX_DESCRIPTORS;
        if misplaced || scattered || total > MAX_REQUEST_BYTES {
            return refuse(guest, queue, &chain, fields, einval);
        }
        let parsed = if fields.opcode == FUSE_WRITE {
            total.min(WRITE_PREFIX_BYTES)
        } else {
            total
        };
        // The copy is what is checked and what is sent: the guest may change
        // its own as it likes.
        self.scratch.clear();
        self.scratch.extend_from_slice(&header);
        self.scratch.resize(parsed, 0);
        let rest = &mut self.scratch[IN_HEADER_BYTES..];
        chain
            .readable
            .read_at(&guest.memory, IN_HEADER_BYTES, rest)?;
        let room = chain.writable.len();
        let checked = request::check(fields, &self.scratch, total, room, self.setxattr_ext);
        let reply = match checked {
            Ok(reply) => reply,
            Err(refused) => return refuse(guest, queue, &chain, fields, refused),
        };
        let kind = match (queue, Bounce::is_small(total, reply)) {
            (PRIORITY, true) => SlotKind::Priority,
            (PRIORITY, false) => return refuse(guest, queue, &chain, fields, einval),
            (_, true) => SlotKind::Small,
            (_, false) => SlotKind::Large,
        };
        let Some(index) = self.free[kind as usize].pop() else {
            return Ok(Admission::NoSlot(kind, chain));
        };
        let slot = self.slots[usize::from(index)];
        let reply_at = total.next_multiple_of(8);
        if reply_at + reply > slot.bytes {
            self.free[kind as usize].push(index);
            return refuse(guest, queue, &chain, fields, einval);
        }
        self.large_used |= kind == SlotKind::Large;
        let reply = (reply > 0).then_some(Part {
            address: slot.address + reply_at as u64,
            bytes: reply as u32,
        });
        if fields.opcode == FUSE_INIT {
            request::restrict_init(&mut self.scratch);
        }
        self.copy_in(guest, &chain, slot, total)?;
        let request = Part {
            address: slot.address,
            bytes: total as u32,
        };
        self.in_flight[usize::from(index)] = Some(InFlight {
            queue,
            chain,
            opcode: fields.opcode,
            unique: fields.unique,
            reply,
        });
        let memory = self.server.bounce.memory();
        self.server.queues[queue].submit(memory, index, request, reply)?;
        Ok(Admission::Done)
    }

    /// The checked copy into the slot, and a write's payload after it, straight
    /// from the guest.
    fn copy_in(&self, guest: &Guest, chain: &Chain, slot: Slot, total: usize) -> Result<(), Fault> {
        let bounce = &self.server.bounce;
        let parsed = self.scratch.len();
        bounce.slice(slot.address, parsed)?.copy_from(&self.scratch);
        let payload = bounce.slice(slot.address + parsed as u64, total - parsed)?;
        let mut done = 0;
        chain
            .readable
            .for_each_slice(&guest.memory, parsed, total - parsed, |from| {
                done += copy(&from, &payload, done);
                true
            })?;
        Ok(())
    }

    /// Checks a returned request, and gives it to the guest.
    fn give_back(&mut self, guest: &mut Guest, queue: usize, used: Used) -> Result<(), Fault> {
        let protocol = |what: &str| Fault::Server(Trouble::Protocol(what.to_owned()));
        let slot = self.slots[usize::from(used.slot)];
        let in_flight = self.in_flight[usize::from(used.slot)]
            .take_if(|in_flight| in_flight.queue == queue)
            .ok_or_else(|| protocol("it returned a request that it did not have"))?;
        self.free[slot.kind as usize].push(slot.index);
        let head = in_flight.chain.head;
        let Some(reply) = in_flight.reply else {
            return guest.complete(queue, head, 0);
        };
        // It does not answer this one, but Linux waits for the answer.
        if in_flight.opcode == FUSE_DESTROY && used.written == 0 {
            let header = request::reply_header(in_flight.unique, 0);
            in_flight
                .chain
                .writable
                .write_at(&guest.memory, 0, &header)?;
            return guest.complete(queue, head, header.len());
        }
        let length = used.written as usize;
        if length < OUT_HEADER_BYTES || length > reply.bytes as usize {
            return Err(protocol("a reply's length is out of bounds"));
        }
        // Read once: the file server may still write to it.
        let mut header = [0; OUT_HEADER_BYTES];
        let memory = self.server.bounce.memory();
        memory
            .read_slice(&mut header, GuestAddress(reply.address))
            .map_err(super::shadow_queue::Broken::from)?;
        let errno = check_reply(&in_flight, &header, used.written)?;
        if in_flight.opcode == FUSE_INIT && errno == 0 {
            self.setxattr_ext = self.init_flags(reply, length)? & INIT_SETXATTR_EXT != 0;
        }
        let writable = &in_flight.chain.writable;
        writable.write_at(&guest.memory, 0, &header)?;
        let body = self.server.bounce.slice(
            reply.address + OUT_HEADER_BYTES as u64,
            length - OUT_HEADER_BYTES,
        )?;
        let mut done = 0;
        writable.for_each_slice(&guest.memory, OUT_HEADER_BYTES, body.len(), |to| {
            let piece = body.offset(done);
            done += piece.map_or(0, |piece| copy(&piece, &to, 0));
            true
        })?;
        guest.complete(queue, head, length)
    }

    /// `flags` of a `struct fuse_init_out`.
    fn init_flags(&self, reply: Part, length: usize) -> Result<u32, Fault> {
        const FLAGS: usize = OUT_HEADER_BYTES + 12;
        if length < FLAGS + 4 {
            return Ok(0);
        }
        let mut flags = [0; 4];
        self.server
            .bounce
            .slice(reply.address + FLAGS as u64, flags.len())?
            .copy_to(&mut flags);
        Ok(u32::from_le_bytes(flags))
    }
}

/// The reply's error number.
fn check_reply(
    in_flight: &InFlight,
    header: &[u8; OUT_HEADER_BYTES],
    written: u32,
) -> Result<i32, Fault> {
    let [length, error] = [0, 4]
        .map(|at| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
    let errno = (error as i32).wrapping_neg();
    let is_error = errno != 0;
    if length != written
        || header[8..16] != in_flight.unique.to_le_bytes()
        || !(0..=MAX_ERRNO).contains(&errno)
        || (is_error && written as usize != OUT_HEADER_BYTES)
    {
        return Err(Fault::Server(Trouble::Protocol(format!(
            "its reply to operation {} is malformed",
            in_flight.opcode
        ))));
    }
    Ok(errno)
}

/// Answers a request with an error, if there is room for one.
fn refuse(
    guest: &mut Guest,
    queue: usize,
    chain: &Chain,
    header: InHeader,
    Refused(errno): Refused,
) -> Result<Admission, Fault> {
    let mut written = 0;
    if !header.is_without_reply() {
        let reply = request::reply_header(header.unique, errno);
        chain.writable.write_at(&guest.memory, 0, &reply)?;
        written = reply.len();
    }
    guest.complete(queue, chain.head, written)?;
    Ok(Admission::Done)
}

/// Copies as much of `from` as fits into `to` from `offset` on, and tells how
/// much that was.
fn copy(from: &VolatileSlice<'_>, to: &VolatileSlice<'_>, offset: usize) -> usize {
    let Ok(to) = to.offset(offset) else {
        return 0;
    };
    let length = from.len().min(to.len());
    if let (Ok(from), Ok(to)) = (from.subslice(0, length), to.subslice(0, length)) {
        from.copy_to_volatile_slice(to);
    }
    length
}

#[cfg(test)]
mod tests;
