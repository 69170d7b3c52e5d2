//! The socket device: any rings and packets of the guest, while clients on the
//! host come, talk and go.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc;

use arbitrary::{Result, Unstructured};
use tempfile::TempDir;
use vmm_devices::stepped::SteppedVsock;
use vmm_devices::{HOST_CID, READY_PORT};
use vmm_virtio::Activation;
use vmm_virtio::mock::{self, Buffer, Raised};

use crate::driver::{BUFFERS, Driver, take};

const CID: u32 = 3;
/// Entries of the rx, tx and event queues.
const SIZES: [u16; 3] = [64, 64, 16];
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// First port of the host's side of connections, counted up.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// The port that clients ask for.
const GUEST_PORT: u32 = 7;
/// Clients at a time.
const MAX_CLIENTS: usize = 6;
/// A device that does not come to rest in so many turns spins.
const MAX_TURNS: usize = 1000;
/// Length of a packet's header.
const HEADER: u32 = 44;

struct Client {
    stream: UnixStream,
    /// It has said where it wants to go, before anything else.
    asked: bool,
    /// What it was told first.
    heard: Vec<u8>,
}

struct Play<'a> {
    input: Unstructured<'a>,
    device: SteppedVsock,
    driver: Driver,
    clients: Vec<Client>,
    /// Clients that there have been.
    came: usize,
    raised: mpsc::Receiver<Raised>,
    faults: usize,
    socket: PathBuf,
    _directory: TempDir,
}

/// Tries one input.
pub fn run(data: &[u8]) {
    let directory = tempfile::tempdir().expect("directory");
    let socket = directory.path().join("s");
    let listener = UnixListener::bind(&socket).expect("bind");
    let driver = Driver::new(&SIZES, 1 << 20);
    let (interrupt, raised) = mock::interrupt();
    let queues = (0..).zip(&driver.queues);
    let activation = Activation {
        memory: driver.memory.clone(),
        features: 0,
        queues: queues
            .map(|(index, queue)| queue.active(index, data.len() % 2 == 1))
            .collect(),
        interrupt,
    };
    let reset_due = data.len() % 4 >= 2;
    let device = SteppedVsock::try_new(CID, listener, reset_due, activation).expect("device");
    let mut play = Play {
        input: Unstructured::new(data),
        device,
        driver,
        clients: Vec::new(),
        came: 0,
        raised,
        faults: 0,
        socket,
        _directory: directory,
    };
    while !play.input.is_empty() {
        if play.act().is_err() {
            break;
        }
    }
    play.settle();
    play.everybody_hears_the_end();
}

impl Play<'_> {
    fn act(&mut self) -> Result<()> {
        let choice: u8 = self.input.arbitrary()?;
        match choice % 16 {
            0..=4 => self.packet()?,
            5 | 6 => {
                let length = match choice >> 6 {
                    0 => 0x1000,
                    1 => 45,
                    2 => u32::from(self.input.arbitrary::<u8>()?),
                    _ => 0x8000,
                };
                self.offer_room(RX, length)?;
            }
            7 if choice >= 0xf0 => self.offer_room(EVENT, 8)?,
            7 | 8 => {
                let queue = usize::from(choice >> 4) % SIZES.len();
                self.driver.misbehave(queue, &mut self.input)?;
            }
            9 => self.connect()?,
            10 | 11 => self.with_client(|client, input| {
                let length = usize::from(input.arbitrary::<u8>()?);
                let times = 1 << (length % 4 * 4);
                let bytes = take(input, length)?.repeat(times);
                // A client that is not heard has said as much as it could.
                let _ = client.stream.write(&bytes);
                Ok(())
            })?,
            12 => self.with_client(|client, _| {
                client.hear();
                Ok(())
            })?,
            13 => self.with_client(|client, input| {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both];
                let _ = client.stream.shutdown(*input.choose(&how)?);
                Ok(())
            })?,
            14 => self.leave()?,
            _ => {}
        }
        if choice & 0x10 == 0 {
            self.settle();
        }
        Ok(())
    }

    /// The guest sends a packet: a sound one, most of the time.
    fn packet(&mut self) -> Result<()> {
        let [choice, operation, connection]: [u8; 3] = self.input.arbitrary()?;
        let length = usize::from(self.input.arbitrary::<u8>()?);
        let payload = take(&mut self.input, length)?.to_vec();
        let [flags, fill]: [u8; 2] = self.input.arbitrary()?;
        let mut length = payload.len() as u32;
        if fill & 7 == 7 {
            // Zeros make up the rest.
            length = u32::from(fill) << 9;
        }
        let mut cids = [u64::from(CID), HOST_CID];
        let mut ports = [GUEST_PORT, FIRST_HOST_PORT + u32::from(connection % 16)];
        let mut kind = 1_u16;
        let mut claimed = length;
        let mut op = u16::from(operation % 9);
        let mut credit = [0x1_0000_u32, 0];
        match choice % 16 {
            0 => cids = self.input.arbitrary()?,
            1 => ports = self.input.arbitrary()?,
            2 => kind = self.input.arbitrary()?,
            3 => claimed = self.input.arbitrary()?,
            4 => op = self.input.arbitrary()?,
            5 | 6 => credit = self.input.arbitrary()?,
            7 | 8 => (ports[1], op) = (READY_PORT, 1),
            _ => {}
        }
        let mut packet = Vec::new();
        packet.extend(cids.iter().flat_map(|cid| cid.to_le_bytes()));
        packet.extend(ports.iter().flat_map(|port| port.to_le_bytes()));
        packet.extend(claimed.to_le_bytes());
        packet.extend(kind.to_le_bytes());
        packet.extend(op.to_le_bytes());
        packet.extend(u32::from(flags & 7).to_le_bytes());
        packet.extend(credit.iter().flat_map(|it| it.to_le_bytes()));
        packet.extend(payload);
        let at = self.driver.place(&mut self.input)?;
        self.driver.put(at, &packet);
        let split = u32::from(flags) % (length + 1);
        let pieces = [
            (at, HEADER),
            (at + u64::from(HEADER), split),
            (at + u64::from(HEADER + split), length - split),
        ];
        let buffers = pieces.map(|(address, length)| Buffer {
            address,
            length,
            writable: false,
        });
        self.driver.queues[TX].offer(&buffers);
        Ok(())
    }

    fn offer_room(&mut self, queue: usize, length: u32) -> Result<()> {
        let address = self.driver.place(&mut self.input)?;
        debug_assert!(address >= BUFFERS);
        self.driver.queues[queue].offer(&[Buffer {
            address,
            length,
            writable: true,
        }]);
        Ok(())
    }

    fn connect(&mut self) -> Result<()> {
        if self.clients.len() == MAX_CLIENTS {
            return Ok(());
        }
        let mut stream = UnixStream::connect(&self.socket).expect("a listener");
        stream.set_nonblocking(true).expect("nonblocking");
        let asked = self.input.arbitrary::<u8>()? < 0xf0;
        if asked {
            let line = format!("CONNECT {GUEST_PORT}\n");
            let _ = stream.write(line.as_bytes());
        }
        self.came += 1;
        self.clients.push(Client {
            stream,
            asked,
            heard: Vec::new(),
        });
        Ok(())
    }

    fn leave(&mut self) -> Result<()> {
        let index: u8 = self.input.arbitrary()?;
        if !self.clients.is_empty() {
            self.clients
                .swap_remove(usize::from(index) % self.clients.len());
        }
        Ok(())
    }

    fn with_client(
        &mut self,
        act: impl FnOnce(&mut Client, &mut Unstructured<'_>) -> Result<()>,
    ) -> Result<()> {
        let index: u8 = self.input.arbitrary()?;
        let count = self.clients.len();
        match self.clients.get_mut(usize::from(index) % count.max(1)) {
            Some(client) => act(client, &mut self.input),
            None => Ok(()),
        }
    }

    /// The device's thread gets to its next sleep.
    fn settle(&mut self) {
        let mut turns = 0;
        // Twice: the first may have been told of what the second does.
        for _ in 0..2 {
            while self.device.turn().expect("the host lets it wait") {
                turns += 1;
                assert!(turns < MAX_TURNS, "a device that never comes to rest");
            }
        }
        let (answers, most) = (self.device.answers(), SteppedVsock::MAX_ANSWERS);
        assert!(answers <= most + self.came, "{answers} answers are kept");
        let connections = self.device.connections();
        assert!(connections <= self.came, "{connections} connections");
        let faults = self.raised.try_iter();
        self.faults += faults.filter(|it| *it == Raised::GuestFault).count();
        let broken = usize::from(self.device.is_broken());
        assert_eq!(self.faults, broken, "a fault is told once");
    }

    /// Clients of a device that is broken must not wait for it.
    fn everybody_hears_the_end(&mut self) {
        let broken = self.device.is_broken();
        for client in &mut self.clients {
            let waits = client.hear();
            assert!(!(broken && waits), "a client waits for a broken device");
        }
    }
}

impl Client {
    /// Reads what there is. True when there may be more later.
    fn hear(&mut self) -> bool {
        let mut bytes = [0; 4096];
        let waits = loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => break false,
                Ok(count) => {
                    let room = 32_usize.saturating_sub(self.heard.len()).min(count);
                    self.heard.extend(&bytes[..room]);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break true,
                Err(_) => break false,
            }
        };
        // Whatever the guest does, this is what a client hears first.
        let begins = |line: &[u8]| {
            let length = line.len().min(self.heard.len());
            line[..length] == self.heard[..length]
        };
        let accepted = if self.asked {
            b"OK 7\n".as_slice()
        } else {
            b"OK "
        };
        let answers = [
            accepted,
            b"ERROR malformed\n",
            b"ERROR refused\n",
            b"ERROR busy\n",
        ];
        let text = String::from_utf8_lossy(&self.heard);
        assert!(answers.into_iter().any(begins), "a client heard {text:?}");
        waits
    }
}
