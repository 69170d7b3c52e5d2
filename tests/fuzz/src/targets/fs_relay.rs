//! The file system device between a guest and a file server, both of which may
//! be hostile: any rings and requests on the one side, any used entries and
//! replies on the other.
//!
//! Each side is sound until the input makes it do something that it must not.
//! While one is, the device must not blame it, and what the device passes on to
//! it is checked.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;

use arbitrary::{Result, Unstructured};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_devices::stepped::{SteppedFileSystem, Stopped};
use vmm_virtio::Activation;
use vmm_virtio::mock::{self, Buffer};

use crate::driver::{BUFFERS, Driver, take};

/// Entries of the guest's queues.
const SIZES: [u16; 2] = [128, 1024];
const GUEST_BYTES: usize = 16 << 20;
/// `struct fuse_in_header` and `struct fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// `FORGET`, `BATCH_FORGET` and `INTERRUPT` have no reply.
const WITHOUT_REPLY: [u32; 3] = [2, 42, INTERRUPT];
const INTERRUPT: u32 = 36;
/// Operations of the protocol, those first that have forms of their own.
const OPERATIONS: [u32; 46] = [
    26, 16, 21, 42, 2, 36, 38, 6, 8, 35, 22, 23, 1, 3, 4, 5, 9, 10, 11, 12, 13, 14, 15, 17, 18, 20,
    24, 25, 27, 28, 29, 30, 31, 32, 33, 34, 39, 40, 41, 43, 44, 45, 46, 47, 48, 50,
];

/// A request of a sound guest that has not come back.
struct Offered {
    room: u32,
    has_reply: bool,
}

/// A request that the file server has.
struct Served {
    queue: usize,
    head: u16,
    unique: [u8; 8],
    request: (u64, u32),
    reply: Option<(u64, u32)>,
}

struct Play<'a> {
    input: Unstructured<'a>,
    device: SteppedFileSystem,
    driver: Driver,
    guest_is_sound: bool,
    server_is_sound: bool,
    /// Of a sound guest: by queue and head.
    offered: HashMap<(usize, u16), Offered>,
    descriptors: [usize; 2],
    /// Where the guest's memory has not been used yet.
    free: u64,
    served: Vec<Served>,
    next_available: [u16; 2],
    next_used: [u16; 2],
    _socket: UnixStream,
}

/// Tries one input.
pub fn run(data: &[u8]) {
    let (socket, server) = UnixStream::pair().expect("pair");
    let driver = Driver::new(&SIZES, GUEST_BYTES);
    let (interrupt, _raised) = mock::interrupt();
    let queues = (0..).zip(&driver.queues);
    let activation = Activation {
        memory: driver.memory.clone(),
        features: 0,
        queues: queues
            .map(|(index, queue)| queue.active(index, data.len() % 2 == 1))
            .collect(),
        interrupt,
    };
    let device = SteppedFileSystem::try_new(activation, socket).expect("memory");
    let mut play = Play {
        input: Unstructured::new(data),
        device: device.expect("both queues"),
        driver,
        guest_is_sound: true,
        server_is_sound: true,
        offered: HashMap::new(),
        descriptors: [0; 2],
        free: BUFFERS,
        served: Vec::new(),
        next_available: [0; 2],
        next_used: [0; 2],
        _socket: server,
    };
    while !play.input.is_empty() {
        // An error is the input's end.
        let Ok(outcome) = play.act() else { return };
        let held = play.device.held();
        assert!(held <= SIZES.map(usize::from).iter().sum(), "{held} held");
        if let Err(stopped) = outcome {
            match stopped {
                Stopped::Guest(fault) => {
                    assert!(!play.guest_is_sound, "a sound guest is blamed: {fault}");
                }
                Stopped::Server(failed) => {
                    assert!(
                        !play.server_is_sound,
                        "a sound file server is blamed: {failed:?}"
                    );
                }
            }
            return;
        }
        play.take_back();
    }
}

impl Play<'_> {
    fn act(&mut self) -> Result<std::result::Result<(), Stopped>> {
        let choice: u8 = self.input.arbitrary()?;
        match choice % 16 {
            0..=5 => self.request()?,
            6 => {
                self.guest_is_sound = false;
                let queue = usize::from(choice >> 4) % 2;
                self.driver.misbehave(queue, &mut self.input)?;
            }
            7..=9 => self.answer()?,
            10 => self.scribble_over_bounce_memory()?,
            11 => return Ok(self.device.take_requests(false).map(drop)),
            12 => return Ok(self.device.release()),
            _ => {
                // As the thread does it.
                let taken = self
                    .device
                    .take_replies()
                    .and_then(|()| self.device.take_requests(true));
                if taken.is_ok() && self.server_is_sound {
                    self.serve();
                }
                return Ok(taken.map(drop));
            }
        }
        Ok(Ok(()))
    }

    /// The guest asks for something, most of the time in the right form.
    fn request(&mut self) -> Result<()> {
        let [choice, operation, form]: [u8; 3] = self.input.arbitrary()?;
        let queue = usize::from(choice & 1);
        let opcode = match OPERATIONS.get(usize::from(operation) % 48) {
            Some(&opcode) => opcode,
            None => self.input.arbitrary()?,
        };
        let length = usize::from(self.input.arbitrary::<u8>()?);
        let mut body = take(&mut self.input, length)?.to_vec();
        // Large ones are zeros at their end.
        if choice & 2 != 0 {
            body.resize(self.input.arbitrary::<u32>()? as usize % (3 << 19), 0);
        }
        let total = (IN_HEADER + body.len()) as u32;
        let claimed = if form & 1 == 0 {
            total
        } else {
            self.input.arbitrary()?
        };
        let unique: [u8; 8] = self.input.arbitrary()?;
        let mut request = claimed.to_le_bytes().to_vec();
        request.extend(opcode.to_le_bytes());
        request.extend(unique);
        request.resize(IN_HEADER, 0);
        request[36] = if form & 2 == 0 { 0 } else { form >> 4 };
        request.extend(body);
        // What a sound guest has room for: a header, or nothing.
        let has_reply = !WITHOUT_REPLY.contains(&opcode);
        let most = match form >> 2 & 3 {
            0 => 200,
            1 => OUT_HEADER as u32,
            2 => 0x1_0000,
            _ => self.input.arbitrary::<u32>()? % (2 << 20),
        };
        let room = most.max(OUT_HEADER as u32);
        // A sound guest leaves what it has offered alone; one that does not has two
        // requests in one place.
        let (at, reply_at) = if form & 0xc0 == 0xc0 {
            self.guest_is_sound = false;
            let places = [(); 2].map(|()| self.driver.place(&mut self.input));
            let [at, reply_at] = places;
            (at?, reply_at?)
        } else {
            let at = self.free;
            let reply_at = at + u64::from(total).next_multiple_of(8);
            self.free = reply_at + u64::from(room).next_multiple_of(8);
            (at, reply_at)
        };
        let readable = [
            (at, IN_HEADER as u32),
            (at + IN_HEADER as u64, total - IN_HEADER as u32),
        ];
        let mut buffers: Vec<_> = readable
            .into_iter()
            .map(|(address, length)| buffer(address, length, false))
            .collect();
        if has_reply {
            buffers.push(buffer(reply_at, OUT_HEADER as u32, true));
            buffers.push(buffer(
                reply_at + OUT_HEADER as u64,
                room - OUT_HEADER as u32,
                true,
            ));
        }
        let fits = buffers
            .iter()
            .all(|it| it.address + u64::from(it.length) <= GUEST_BYTES as u64);
        let used = &mut self.descriptors[queue];
        if !fits || *used + buffers.len() > usize::from(SIZES[queue]) {
            return Ok(());
        }
        *used += buffers.len();
        self.driver.put(at, &request);
        let head = self.driver.queues[queue].offer(&buffers);
        self.offered
            .insert((queue, head), Offered { room, has_reply });
        Ok(())
    }

    /// What a sound guest finds in its used rings.
    fn take_back(&mut self) {
        if !self.guest_is_sound {
            return;
        }
        for (queue, driver) in self.driver.queues.iter_mut().enumerate() {
            while let Some((head, written)) = driver.take_used() {
                let offered = self.offered.remove(&(queue, head));
                let offered = offered.expect("what comes back was offered, and once");
                assert!(
                    written <= offered.room,
                    "{written} bytes in {}",
                    offered.room
                );
                assert!(offered.has_reply || written == 0, "a reply where none is");
            }
        }
    }

    /// A sound file server takes its requests, and finds each as the contract
    /// between guest and file server wants it.
    fn serve(&mut self) {
        let size = SteppedFileSystem::shadow_size();
        for queue in 0..2 {
            let [table, available, _] = self.device.shadow_rings(queue);
            while self.bounce::<u16>(available + 2) != self.next_available[queue] {
                let entry = u64::from(self.next_available[queue] % size);
                self.next_available[queue] = self.next_available[queue].wrapping_add(1);
                let head: u16 = self.bounce(available + 4 + 2 * entry);
                let (request, next) = self.descriptor(table, head, false);
                let reply = next.map(|next| {
                    let (reply, more) = self.descriptor(table, next, true);
                    assert!(more.is_none(), "a chain of two at the most");
                    reply
                });
                self.take_in(queue, head, request, reply);
            }
        }
    }

    fn take_in(&mut self, queue: usize, head: u16, request: (u64, u32), reply: Option<(u64, u32)>) {
        let (at, length) = request;
        assert!(length as usize >= IN_HEADER, "a request without its header");
        assert_eq!(self.bounce::<u32>(at), length, "the length in its header");
        let opcode: u32 = self.bounce(at + 4);
        assert_eq!(reply.is_none(), WITHOUT_REPLY.contains(&opcode));
        assert_ne!(opcode, INTERRUPT, "the file server does not know it");
        assert!(
            queue == 1 || reply.is_none(),
            "operation {opcode} must wait"
        );
        let parts = |served: &Served| [Some(served.request), served.reply];
        for (mine, other) in [Some(request), reply]
            .into_iter()
            .flatten()
            .flat_map(|mine| {
                let others = self.served.iter().flat_map(parts).flatten();
                others.map(move |other| (mine, other))
            })
        {
            let apart =
                mine.0 + u64::from(mine.1) <= other.0 || other.0 + u64::from(other.1) <= mine.0;
            assert!(apart, "two requests in one place: {mine:x?}, {other:x?}");
        }
        let unique = self.bounce::<u64>(at + 8).to_le_bytes();
        self.served.push(Served {
            queue,
            head,
            unique,
            request,
            reply,
        });
    }

    /// A descriptor's part of bounce memory, and its next.
    fn descriptor(&self, table: u64, index: u16, writable: bool) -> ((u64, u32), Option<u16>) {
        let size = SteppedFileSystem::shadow_size();
        assert!(index < size, "descriptor {index}");
        let at = table + 16 * u64::from(index);
        let (address, length): (u64, u32) = (self.bounce(at), self.bounce(at + 8));
        let (flags, next): (u16, u16) = (self.bounce(at + 12), self.bounce(at + 14));
        assert_eq!(flags & 2 != 0, writable, "readable first, then writable");
        assert!(address >= SteppedFileSystem::rings_bytes(), "in the rings");
        let memory = self.device.bounce_memory();
        let there = memory.get_slice(GuestAddress(address), length as usize);
        assert!(there.is_ok(), "outside bounce memory");
        ((address, length), (flags & 1 != 0).then_some(next))
    }

    /// The file server returns a request, as it should or not.
    fn answer(&mut self) -> Result<()> {
        let [choice, lie, errno]: [u8; 3] = self.input.arbitrary()?;
        if self.served.is_empty() {
            return Ok(());
        }
        let served = self.served.remove(usize::from(choice) % self.served.len());
        let mut id = u32::from(served.head);
        let mut written = 0;
        if let Some((at, room)) = served.reply {
            let mut length = OUT_HEADER as u32;
            let mut error = 0;
            let count = usize::from(self.input.arbitrary::<u8>()?);
            let body = take(&mut self.input, count)?;
            if errno < 0x40 {
                error = -i32::from(errno);
            }
            if error == 0 {
                let body = &body[..body.len().min((room - length) as usize)];
                length += body.len() as u32;
                self.put(at + OUT_HEADER as u64, body);
            }
            written = length;
            let mut unique = served.unique;
            match lie & 7 {
                1 => (length, self.server_is_sound) = (self.input.arbitrary()?, false),
                2 => (written, self.server_is_sound) = (self.input.arbitrary()?, false),
                3 => (error, self.server_is_sound) = (self.input.arbitrary()?, false),
                4 => (unique[0], self.server_is_sound) = (unique[0] ^ 1, false),
                _ => {}
            }
            self.put(at, &length.to_le_bytes());
            self.put(at + 4, &error.to_le_bytes());
            self.put(at + 8, &unique);
        }
        if lie & 7 == 5 {
            (id, self.server_is_sound) = (self.input.arbitrary()?, false);
        }
        let queue = if lie & 7 == 6 {
            self.server_is_sound = false;
            1 - served.queue
        } else {
            served.queue
        };
        let [_, _, used] = self.device.shadow_rings(queue);
        let entry = u64::from(self.next_used[queue] % SteppedFileSystem::shadow_size());
        self.next_used[queue] = self.next_used[queue].wrapping_add(1);
        self.put(used + 4 + 8 * entry, &id.to_le_bytes());
        self.put(used + 8 + 8 * entry, &written.to_le_bytes());
        self.put(used + 2, &self.next_used[queue].to_le_bytes());
        Ok(())
    }

    fn scribble_over_bounce_memory(&mut self) -> Result<()> {
        self.server_is_sound = false;
        let place: u32 = self.input.arbitrary()?;
        let length = usize::from(self.input.arbitrary::<u8>()? % 65);
        let bytes = take(&mut self.input, length)?;
        let [_, _, used] = self.device.shadow_rings(usize::from(place & 2 != 0));
        let at = if place & 1 == 0 {
            used + u64::from(place >> 2) % 0x800
        } else {
            u64::from(place >> 2) % (10 << 20)
        };
        self.put(at, bytes);
        Ok(())
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        let memory = self.device.bounce_memory();
        let _ = memory.write(bytes, GuestAddress(address));
    }

    fn bounce<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        let memory = self.device.bounce_memory();
        memory
            .read_obj(GuestAddress(address))
            .expect("in bounce memory")
    }
}

fn buffer(address: u64, length: u32, writable: bool) -> Buffer {
    debug_assert!(address >= BUFFERS);
    Buffer {
        address,
        length,
        writable,
    }
}
