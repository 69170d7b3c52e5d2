//! The file system device in front of a real virtiofsd, driven by a guest's
//! driver in memory that speaks FUSE.
//!
//! Needs the path of a virtiofsd in `BULKHEAD_VIRTIOFSD`; without, each test
//! says SKIP.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_devices::{FileSystem, FileSystemConfig, ServerFailed};
use vmm_virtio::mock::{self, Buffer, MockQueue, Raised};
use vmm_virtio::{Activation, ActiveQueue, VirtioDevice};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SYMLINK: u32 = 6;
const READ: u32 = 15;
const WRITE: u32 = 16;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const INTERRUPT: u32 = 36;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;
const SETLKW: u32 = 33;

const ROOT: u64 = 1;
const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// Guest memory for requests and replies, one after the other; far more than
/// is ever in use.
const BUFFERS: u64 = 16 << 20;
const MEMORY: u64 = 256 << 20;

struct Server {
    process: Child,
    share: TempDir,
    _socket: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A share, its server, the device in front of it, and a driver.
struct Guest {
    device: FileSystem,
    memory: GuestMemoryMmap,
    priority: MockQueue,
    requests: MockQueue,
    raised: mpsc::Receiver<Raised>,
    failed: mpsc::Receiver<ServerFailed>,
    pending: BTreeMap<u16, (u64, u64)>,
    unique: u64,
    next: u64,
    server: Server,
}

/// A guest, or the reason why there is none.
fn start() -> Option<Guest> {
    let Some(binary) = std::env::var_os("BULKHEAD_VIRTIOFSD") else {
        println!("SKIP: BULKHEAD_VIRTIOFSD does not name a virtiofsd");
        return None;
    };
    let share = tempfile::tempdir().expect("share");
    let socket_directory = tempfile::tempdir().expect("directory");
    let path = socket_directory.path().join("fs.sock");
    let listener = UnixListener::bind(&path).expect("bind");
    let process = Command::new(binary)
        .args(["--fd=0", "--sandbox=none", "--inode-file-handles=never"])
        .args(["--thread-pool-size=4", "--xattr", "--announce-submounts"])
        .arg("--shared-dir")
        .arg(share.path())
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .spawn()
        .expect("virtiofsd starts");
    let server = Server {
        process,
        share,
        _socket: socket_directory,
    };
    let (fail, failed) = mpsc::channel();
    let device = FileSystem::try_new(FileSystemConfig {
        tag: "share".to_owned(),
        socket: UnixStream::connect(&path).expect("connects"),
        failed: Arc::new(move |failure| {
            let _ = fail.send(failure);
        }),
    })
    .expect("device");
    let memory =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("memory");
    let (_, raised) = mock::interrupt();
    let mut guest = Guest {
        device,
        priority: MockQueue::new(&memory, 0x1000, 128),
        requests: MockQueue::new(&memory, 0x10000, 1024),
        memory,
        raised,
        failed,
        pending: BTreeMap::new(),
        unique: 0,
        next: BUFFERS,
        server,
    };
    guest.start_anew();
    Some(guest)
}

impl Guest {
    fn start_anew(&mut self) {
        self.priority = MockQueue::new(&self.memory, 0x1000, 128);
        self.requests = MockQueue::new(&self.memory, 0x10000, 1024);
        self.memory
            .write_slice(&vec![0; 0x20000], GuestAddress(0x1000))
            .expect("in memory");
        let queues = vec![
            self.priority.active(0, false),
            self.requests.active(1, false),
        ];
        self.resume(queues);
        self.init();
    }

    fn resume(&mut self, queues: Vec<ActiveQueue>) {
        let (interrupt, raised) = mock::interrupt();
        self.raised = raised;
        self.device
            .activate(Activation {
                memory: self.memory.clone(),
                features: 0,
                queues,
                interrupt,
            })
            .expect("activates");
    }

    /// Of earlier requests, the interrupt may come after their replies.
    fn wait_for(&self, wanted: Raised) {
        while self.raised.recv_timeout(PATIENCE).expect("raised") != wanted {}
    }

    fn share(&self) -> &Path {
        self.server.share.path()
    }

    fn init(&mut self) {
        // 7.38, all flags but FUSE_MAP_ALIGNMENT.
        let mut body = words(&[7, 38, 131_072, !(1 << 26), !0]);
        body.resize(64, 0);
        let reply = self.call(INIT, 0, &body, 64).expect("init");
        assert_eq!(reply[0..4], 7u32.to_le_bytes());
        let max_write = u32::from_le_bytes(reply[20..24].try_into().expect("four"));
        assert_eq!(max_write as usize, MIB);
        let flags2 = u32::from_le_bytes(reply[32..36].try_into().expect("four"));
        assert_eq!(flags2 & 1, 0, "security contexts are not agreed on");
    }

    /// Writes a request into guest memory, in two pieces, and offers it.
    fn offer(&mut self, header: &[u8], body: &[u8], room: usize) -> u16 {
        let at = self.take(header.len() + body.len());
        let reply = self.take(room.max(1));
        self.write(at, header);
        self.write(at + header.len() as u64, body);
        let buffer = |address, length: usize, writable| Buffer {
            address,
            length: length as u32,
            writable,
        };
        let mut buffers = vec![buffer(at, header.len(), false)];
        let half = body.len() / 2;
        if !body.is_empty() {
            let address = at + header.len() as u64;
            buffers.push(buffer(address, half, false));
            buffers.push(buffer(address + half as u64, body.len() - half, false));
        }
        if room > 0 {
            let first = room.min(20);
            buffers.push(buffer(reply, first, true));
            buffers.push(buffer(reply + first as u64, room - first, true));
        }
        let head = self.requests.offer(&buffers);
        self.pending.insert(head, (self.unique, reply));
        head
    }

    fn take(&mut self, bytes: usize) -> u64 {
        if self.next + bytes as u64 > MEMORY {
            self.next = BUFFERS;
        }
        let at = self.next;
        self.next += bytes as u64;
        at
    }

    /// A request's header, with a number of its own.
    fn header(&mut self, opcode: u32, node: u64, body: usize) -> Vec<u8> {
        self.unique += 2;
        let mut header = words(&[40 + body as u32, opcode]);
        header.extend_from_slice(&self.unique.to_le_bytes());
        header.extend_from_slice(&node.to_le_bytes());
        header.resize(40, 0);
        header
    }

    fn request(&mut self, opcode: u32, node: u64, body: &[u8], room: usize) -> u16 {
        let header = self.header(opcode, node, body.len());
        let head = self.offer(
            &header,
            body,
            if room == usize::MAX { 0 } else { room + 16 },
        );
        self.requests.kick();
        head
    }

    /// The reply to a request: its body, or the error number.
    fn reply(&mut self) -> (u16, Result<Vec<u8>, i32>) {
        let (head, written) = loop {
            if let Some(used) = self.requests.take_used() {
                break used;
            }
            let raised = self.raised.recv_timeout(PATIENCE).expect("a reply");
            assert_eq!(raised, Raised::Used(1));
        };
        let (unique, at) = self.pending.remove(&head).expect("in flight");
        let mut reply = vec![0; written as usize];
        self.memory
            .read_slice(&mut reply, GuestAddress(at))
            .expect("in memory");
        if reply.is_empty() {
            return (head, Ok(reply));
        }
        assert_eq!(reply[0..4], written.to_le_bytes());
        assert_eq!(reply[8..16], unique.to_le_bytes());
        let error = i32::from_le_bytes(reply[4..8].try_into().expect("four"));
        let body = reply.split_off(16);
        (head, if error == 0 { Ok(body) } else { Err(-error) })
    }

    fn call(&mut self, opcode: u32, node: u64, body: &[u8], room: usize) -> Result<Vec<u8>, i32> {
        let head = self.request(opcode, node, body, room);
        let (answered, reply) = self.reply();
        assert_eq!(answered, head);
        reply
    }

    /// Creates a file; its node and its handle.
    fn create(&mut self, name: &str) -> (u64, u64) {
        let mut body = words(&[libc_o_rdwr(), 0o100_644, 0, 0]);
        body.extend_from_slice(name.as_bytes());
        body.push(0);
        let reply = self.call(CREATE, ROOT, &body, 144).expect("create");
        (u64_at(&reply, 0), u64_at(&reply, 128))
    }

    fn lookup(&mut self, name: &str) -> Result<u64, i32> {
        let name = format!("{name}\0");
        let reply = self.call(LOOKUP, ROOT, name.as_bytes(), 128)?;
        Ok(u64_at(&reply, 0))
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("in memory");
    }
}

fn libc_o_rdwr() -> u32 {
    2
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"))
}

/// `struct fuse_read_in` and `fuse_write_in` begin alike.
fn transfer(handle: u64, offset: u64, size: usize) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&(size as u32).to_le_bytes());
    body.resize(40, 0);
    body
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 31 % 253) as u8).collect()
}

#[test]
fn file_of_one_mib_is_written_and_read_back() {
    let Some(mut guest) = start() else { return };
    let (node, handle) = guest.create("file");
    let data = pattern(MIB);
    let mut body = transfer(handle, 0, MIB);
    body.extend_from_slice(&data);
    let written = guest.call(WRITE, node, &body, 8).expect("write");
    assert_eq!(written[0..4], (MIB as u32).to_le_bytes());
    assert!(fs::read(guest.share().join("file")).expect("on the host") == data);
    let read = guest.call(READ, node, &transfer(handle, 0, MIB), MIB);
    assert!(read.expect("read") == data);
    let tail = guest.call(READ, node, &transfer(handle, MIB as u64 - 5, 4096), 4096);
    assert!(tail.expect("read") == data[MIB - 5..]);
    let attributes = guest.call(GETATTR, node, &[0; 16], 104).expect("getattr");
    assert_eq!(u64_at(&attributes, 16 + 8), MIB as u64);
}

#[test]
fn names_on_the_host_are_found_and_others_are_not() {
    let Some(mut guest) = start() else { return };
    fs::create_dir(guest.share().join("directory")).expect("mkdir");
    assert!(guest.lookup("directory").is_ok());
    assert_eq!(guest.lookup("missing"), Err(2));
    let made = guest.call(SYMLINK, ROOT, b"link\0target\0", 128);
    assert!(made.is_ok());
    let target = fs::read_link(guest.share().join("link")).expect("on the host");
    assert_eq!(target, Path::new("target"));
    let opened = guest.call(OPENDIR, ROOT, &[0; 8], 16).expect("opendir");
    let list = transfer(u64_at(&opened, 0), 0, 4096);
    let entries = guest.call(READDIRPLUS, ROOT, &list, 4096).expect("list");
    assert!(entries.windows(9).any(|window| window == b"directory"));
}

#[test]
fn many_large_requests_do_not_keep_metadata_waiting_for_ever() {
    let Some(mut guest) = start() else { return };
    let (node, handle) = guest.create("file");
    fs::write(guest.share().join("file"), pattern(MIB)).expect("on the host");
    let mut expected = BTreeMap::new();
    for round in 0..40 {
        let read = guest.request(READ, node, &transfer(handle, 0, MIB), MIB);
        expected.insert(read, MIB);
        if round % 2 == 0 {
            expected.insert(guest.request(LOOKUP, ROOT, b"file\0", 128), 128);
        }
    }
    let mut order = Vec::new();
    while !expected.is_empty() {
        let (head, reply) = guest.reply();
        let length = expected.remove(&head).expect("once");
        assert_eq!(reply.expect("fine").len(), length);
        order.push(length);
    }
    // The last lookup was asked for after 39 reads, of which eight fit.
    let last_lookup = order.iter().rposition(|length| *length == 128);
    let last_lookup = last_lookup.expect("lookups");
    assert!(last_lookup < 55, "{last_lookup} of {}", order.len());
}

#[test]
fn hostile_requests_are_answered_and_the_server_lives() {
    let Some(mut guest) = start() else { return };
    let (node, handle) = guest.create("file");
    let einval = Err(22);
    assert_eq!(guest.call(LOOKUP, ROOT, b"no end", 128), einval);
    assert_eq!(guest.call(LOOKUP, ROOT, b"two\0names\0", 128), einval);
    assert_eq!(guest.call(LOOKUP, ROOT, b"file\0", 127), einval);
    assert_eq!(guest.call(GETATTR, node, &[0; 15], 104), einval);
    assert_eq!(guest.call(SYMLINK, ROOT, b"one\0", 128), einval);
    assert_eq!(
        guest.call(READ, node, &transfer(handle, 0, MIB), 4096),
        einval
    );
    let beyond = transfer(handle, 0, MIB + 1);
    assert_eq!(guest.call(READ, node, &beyond, MIB + 1), einval);
    let mut short = transfer(handle, 0, 100);
    short.extend_from_slice(&[1; 99]);
    assert_eq!(guest.call(WRITE, node, &short, 8), einval);
    assert_eq!(guest.call(9999, ROOT, &[], 0), Err(38));
    assert_eq!(guest.call(SETLKW, node, &[0; 48], 0), Err(38));
    // A length that is not the request's.
    let mut header = guest.header(GETATTR, node, 16);
    header[0] += 8;
    guest.offer(&header, &[0; 16], 120);
    guest.requests.kick();
    assert_eq!(guest.reply().1, einval);
    // Nodes and handles that are not there are the server's to refuse.
    assert!(guest.call(GETATTR, 0xdead_beef, &[0; 16], 104).is_err());
    assert!(guest.call(READ, node, &transfer(77, 0, 10), 10).is_err());
    // Requests without a reply.
    assert_eq!(guest.call(INTERRUPT, 0, &[0; 8], usize::MAX), Ok(vec![]));
    assert_eq!(
        guest.call(BATCH_FORGET, 0, &words(&[9, 0]), usize::MAX),
        Ok(vec![])
    );
    assert!(guest.lookup("file").is_ok());
    assert!(guest.failed.try_recv().is_err());
}

#[test]
fn request_without_header_or_room_asks_for_reset_and_the_driver_can_start_anew() {
    let Some(mut guest) = start() else { return };
    guest.offer(&[0; 39], &[], 100);
    guest.requests.kick();
    guest.wait_for(Raised::GuestFault);
    guest.device.reset();
    guest.pending.clear();
    guest.start_anew();
    assert_eq!(guest.lookup("missing"), Err(2));
    let header = guest.header(9999, ROOT, 0);
    guest.offer(&header, &[], 15);
    guest.requests.kick();
    guest.wait_for(Raised::GuestFault);
    guest.device.reset();
    assert!(guest.failed.try_recv().is_err());
}

#[test]
fn head_offered_twice_asks_for_reset() {
    let Some(mut guest) = start() else { return };
    let (node, handle) = guest.create("file");
    // More than there are slots for, so that the last is still there.
    let mut head = 0;
    for _ in 0..40 {
        let header = guest.header(READ, node, 40);
        head = guest.offer(&header, &transfer(handle, 0, MIB), MIB + 16);
    }
    guest.requests.publish(head);
    guest.requests.kick();
    guest.wait_for(Raised::GuestFault);
    guest.device.reset();
    // The server gave back what it had: the reset did not have to give it up.
    assert!(guest.failed.try_recv().is_err());
}

#[test]
fn forget_goes_by_the_priority_queue_and_only_that_kind() {
    let Some(mut guest) = start() else { return };
    let (node, _) = guest.create("file");
    let mut forget = guest.header(FORGET, node, 8);
    forget.extend_from_slice(&1u64.to_le_bytes());
    let at = guest.take(forget.len());
    guest.write(at, &forget);
    let readable = |address, length: usize| Buffer {
        address,
        length: length as u32,
        writable: false,
    };
    let head = guest.priority.offer(&[readable(at, forget.len())]);
    guest.priority.kick();
    guest.wait_for(Raised::Used(0));
    assert_eq!(guest.priority.take_used(), Some((head, 0)));
    let mut lookup = guest.header(LOOKUP, ROOT, 5);
    lookup.extend_from_slice(b"file\0");
    let at = guest.take(lookup.len());
    guest.write(at, &lookup);
    let reply = guest.take(144);
    guest.priority.offer(&[
        readable(at, lookup.len()),
        Buffer {
            address: reply,
            length: 144,
            writable: true,
        },
    ]);
    guest.priority.kick();
    guest.wait_for(Raised::Used(0));
    let mut error = [0; 4];
    guest
        .memory
        .read_slice(&mut error, GuestAddress(reply + 4))
        .expect("in memory");
    assert_eq!(i32::from_le_bytes(error), -22);
}

#[test]
fn pause_finishes_what_was_taken_and_resume_goes_on() {
    let Some(mut guest) = start() else { return };
    let (node, handle) = guest.create("file");
    fs::write(guest.share().join("file"), pattern(MIB)).expect("on the host");
    for _ in 0..30 {
        guest.request(READ, node, &transfer(handle, 0, MIB), MIB);
    }
    // Some are with the server, some wait, some may not have been seen.
    let queues = guest.device.pause();
    let taken = queues[1].queue.state().next_avail;
    assert_eq!(queues[1].queue.state().next_used, taken);
    guest.resume(queues);
    guest.requests.kick();
    let data = pattern(MIB);
    for _ in 0..30 {
        let (_, reply) = guest.reply();
        assert!(reply.expect("read") == data);
    }
    assert!(guest.pending.is_empty());
}

#[test]
fn destroy_is_answered_and_a_new_session_can_begin() {
    let Some(mut guest) = start() else { return };
    assert_eq!(guest.call(DESTROY, ROOT, &[], 0), Ok(vec![]));
    guest.init();
    assert_eq!(guest.lookup("missing"), Err(2));
}

#[test]
fn server_that_dies_is_told_and_nothing_hangs() {
    let Some(mut guest) = start() else { return };
    guest.server.process.kill().expect("kill");
    let failure = guest.failed.recv_timeout(PATIENCE).expect("told");
    assert!(matches!(failure, ServerFailed::Ended { .. }), "{failure:?}");
    guest.wait_for(Raised::NeedsReset);
    guest.device.reset();
}
