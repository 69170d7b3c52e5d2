//! A guest's socket driver in memory, for the tests.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_virtio::mock::{self, Buffer, MockQueue, Raised};
use vmm_virtio::{Activation, ActiveQueue, VirtioDevice};

use super::credit::BUF_ALLOC;
use super::packet::{HEADER_BYTES, Header, OP_REQUEST, OP_RESPONSE, OP_RST, TYPE_STREAM};
use super::{HOST_CID, READY_PORT, Vsock, VsockConfig};

pub(super) const CID: u32 = 3;
/// Nothing in these tests takes that long; a test that hangs should say where.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
pub(super) const RX_BUFFERS: u64 = 0x10_0000;
pub(super) const RX_BUFFER: u64 = 0x1000;
pub(super) const TX_BUFFERS: u64 = 0x80_0000;
pub(super) const TX_BUFFER: u64 = 0x1_1000;

/// A driver, a temporary listener, and what the device says.
pub(super) struct Guest {
    pub(super) device: Vsock,
    pub(super) memory: GuestMemoryMmap,
    pub(super) rx: MockQueue,
    pub(super) tx: MockQueue,
    pub(super) event: MockQueue,
    pub(super) raised: mpsc::Receiver<Raised>,
    pub(super) ready: mpsc::Receiver<()>,
    pub(super) received: VecDeque<(Header, Vec<u8>)>,
    pub(super) rx_heads: Vec<(u16, u64)>,
    pub(super) tx_turn: u64,
    pub(super) socket: PathBuf,
    _directory: TempDir,
}

/// One socket in the guest, as Linux would keep it.
#[derive(Clone, Copy)]
pub(super) struct Socket {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Guest {
    pub(super) fn start(rx_buffers: u64) -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let socket = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(&socket).expect("bind");
        let (knock, ready) = mpsc::channel();
        let device = Vsock::try_new(VsockConfig {
            guest_cid: CID,
            listener,
            ready: Arc::new(move || {
                let _ = knock.send(());
            }),
            failed: Arc::new(|error| panic!("{error}")),
        })
        .expect("device");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20)]).expect("memory");
        let rx = MockQueue::new(&memory, 0x1000, 256);
        let tx = MockQueue::new(&memory, 0x10000, 256);
        let event = MockQueue::new(&memory, 0x20000, 16);
        let (_, raised) = mock::interrupt();
        let mut guest = Self {
            device,
            memory,
            rx,
            tx,
            event,
            raised,
            ready,
            received: VecDeque::new(),
            rx_heads: Vec::new(),
            tx_turn: 0,
            socket,
            _directory: directory,
        };
        for index in 0..rx_buffers {
            guest.offer_rx(RX_BUFFERS + index * RX_BUFFER);
        }
        guest.activate();
        guest
    }

    /// Ready, with everybody let in.
    pub(super) fn started() -> Self {
        let mut guest = Self::start(64);
        guest.knock();
        guest
    }

    /// As a driver begins anew with a device that was reset.
    pub(super) fn forget_queues(&mut self) {
        self.write(0x1000, &vec![0; 0x2_0000]);
        self.rx = MockQueue::new(&self.memory, 0x1000, 256);
        self.tx = MockQueue::new(&self.memory, 0x10000, 256);
        self.event = MockQueue::new(&self.memory, 0x20000, 16);
        self.rx_heads.clear();
        self.received.clear();
    }

    /// Resets the device and starts it again.
    pub(super) fn start_anew(&mut self) {
        self.device.reset();
        self.forget_queues();
        for index in 0..64 {
            self.offer_rx(RX_BUFFERS + index * RX_BUFFER);
        }
        self.activate();
    }

    pub(super) fn activate(&mut self) {
        self.resume(vec![
            self.rx.active(0, false),
            self.tx.active(1, false),
            self.event.active(2, false),
        ]);
    }

    pub(super) fn resume(&mut self, queues: Vec<ActiveQueue>) {
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

    pub(super) fn offer_rx(&mut self, address: u64) {
        let head = self.rx.offer(&[Buffer {
            address,
            length: RX_BUFFER as u32,
            writable: true,
        }]);
        self.rx_heads.push((head, address));
        self.rx.kick();
    }

    pub(super) fn knock(&mut self) {
        self.send(
            Header {
                src_port: 5000,
                dst_port: READY_PORT,
                op: OP_REQUEST,
                ..Header::default()
            },
            &[],
        );
        let (reply, _) = self.receive();
        assert_eq!((reply.op, reply.dst_port), (OP_RST, 5000));
        self.ready.recv_timeout(PATIENCE).expect("ready");
    }

    pub(super) fn send(&mut self, header: Header, payload: &[u8]) {
        self.send_as(u64::from(CID), header, payload);
    }

    pub(super) fn send_as(&mut self, src_cid: u64, header: Header, payload: &[u8]) {
        let header = Header {
            src_cid,
            dst_cid: HOST_CID,
            socket_type: TYPE_STREAM,
            len: payload.len() as u32,
            ..header
        };
        let at = TX_BUFFERS + (self.tx_turn % 32) * TX_BUFFER;
        self.tx_turn += 1;
        self.write(at, &header.encode());
        self.write(at + HEADER_BYTES as u64, payload);
        // Payload apart from its header, and in two pieces, as Linux does it
        // for pages of a program.
        let half = payload.len() as u32 / 2;
        let mut buffers = vec![readable(at, HEADER_BYTES as u32)];
        if !payload.is_empty() {
            let data = at + HEADER_BYTES as u64;
            buffers.push(readable(data, half));
            buffers.push(readable(
                data + u64::from(half),
                payload.len() as u32 - half,
            ));
        }
        self.tx.offer(&buffers);
        self.tx.kick();
        // The buffer is used again only after the device has returned it.
        while self.tx.take_used().is_none() {
            self.listen();
        }
    }

    pub(super) fn send_on(&mut self, socket: Socket, op: u16, flags: u32, payload: &[u8]) {
        self.send(
            Header {
                src_port: socket.guest_port,
                dst_port: socket.host_port,
                op,
                flags,
                buf_alloc: socket.buf_alloc,
                fwd_cnt: socket.fwd_cnt,
                ..Header::default()
            },
            payload,
        );
    }

    /// The next packet.
    pub(super) fn receive(&mut self) -> (Header, Vec<u8>) {
        loop {
            self.collect();
            if let Some(packet) = self.received.pop_front() {
                return packet;
            }
            self.listen();
        }
    }

    /// What the device put into the rx queue; its buffers are offered again.
    pub(super) fn collect(&mut self) {
        while let Some((head, written)) = self.rx.take_used() {
            let at = self
                .rx_heads
                .iter()
                .position(|(offered, _)| *offered == head)
                .expect("a head that was offered");
            let (_, address) = self.rx_heads.remove(at);
            let mut bytes = vec![0; written as usize];
            self.memory
                .read_slice(&mut bytes, GuestAddress(address))
                .expect("in memory");
            let header = Header::decode(bytes[..HEADER_BYTES].try_into().expect("a header"));
            assert_eq!(header.src_cid, HOST_CID);
            assert_eq!(header.dst_cid, u64::from(CID));
            assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
            self.received
                .push_back((header, bytes[HEADER_BYTES..].to_vec()));
            self.offer_rx(address);
        }
    }

    pub(super) fn listen(&mut self) -> Raised {
        self.raised.recv_timeout(PATIENCE).expect("an interrupt")
    }

    pub(super) fn client(&self) -> UnixStream {
        let client = UnixStream::connect(&self.socket).expect("connects");
        client.set_read_timeout(Some(PATIENCE)).expect("timeout");
        client
    }

    /// A client's connection that the guest has been asked for.
    pub(super) fn requested(&mut self, guest_port: u32) -> (UnixStream, Socket) {
        let mut client = self.client();
        client
            .write_all(format!("CONNECT {guest_port}\n").as_bytes())
            .expect("write");
        let (request, _) = self.receive();
        assert_eq!((request.op, request.dst_port), (OP_REQUEST, guest_port));
        assert_eq!(request.buf_alloc, BUF_ALLOC);
        let socket = Socket {
            host_port: request.src_port,
            guest_port,
            buf_alloc: 0x4_0000,
            fwd_cnt: 0,
        };
        (client, socket)
    }

    pub(super) fn established(&mut self, guest_port: u32) -> (UnixStream, Socket) {
        let (client, socket) = self.requested(guest_port);
        self.send_on(socket, OP_RESPONSE, 0, &[]);
        assert_eq!(line(&client), format!("OK {guest_port}\n"));
        (client, socket)
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("in memory");
    }
}

pub(super) fn readable(address: u64, length: u32) -> Buffer {
    Buffer {
        address,
        length,
        writable: false,
    }
}

/// One line, and not a byte more.
pub(super) fn line(client: &UnixStream) -> String {
    let mut text = String::new();
    BufReader::with_capacity(1, client)
        .read_line(&mut text)
        .expect("line");
    text
}

pub(super) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 % 251) as u8).collect()
}
