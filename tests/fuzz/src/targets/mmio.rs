//! The mmio transport over the real devices, their threads included: accesses of
//! any width at any offset, queues set up in any way, resets, pauses, and saved
//! states that are taken up by another.

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use vm_memory::GuestMemoryMmap;
use vmm_devices::stepped::SteppedNet;
use vmm_devices::{Balloon, FileSystem, FileSystemConfig, Mem, MemConfig, Rng, Vsock, VsockConfig};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_virtio::mock::MockQueue;
use vmm_virtio::{MmioTransport, Transport, VirtioDevice};

use super::net::pair;
use crate::driver::Driver;

const STATUS: u64 = 0x70;
const QUEUE_NOTIFY: u64 = 0x50;
/// Registers with a meaning (virtio 1.2 section 4.2.2).
const REGISTERS: [u64; 24] = [
    STATUS,
    QUEUE_NOTIFY,
    0x44,
    0x30,
    0x38,
    0x80,
    0x84,
    0x90,
    0x94,
    0xa0,
    0xa4,
    0x64,
    0x14,
    0x20,
    0x24,
    0x00,
    0x04,
    0x08,
    0x0c,
    0x10,
    0x34,
    0x60,
    0xac,
    0xfc,
];
const STAGES: [u32; 8] = [0, 1, 3, 11, 15, 75, 79, 128];

/// One of the devices, with nobody on the host's side.
pub fn device(choice: u8) -> Box<dyn VirtioDevice> {
    match choice % 3 {
        0 if choice & 0x30 == 0 => Box::new(Rng::new()),
        0 if choice & 0x30 == 0x20 => Box::new(Balloon::new()),
        0 if choice & 0x30 == 0x30 => Box::new(mem()),
        0 => Box::new(SteppedNet::with_thread(1500, pair().1).expect("device")),
        1 => {
            let directory = tempfile::tempdir().expect("directory");
            let listener = UnixListener::bind(directory.path().join("s")).expect("bind");
            let config = VsockConfig {
                guest_cid: 3,
                listener,
                ready: Arc::new(|| ()),
                failed: Arc::new(|error| panic!("{error}")),
            };
            Box::new(Vsock::try_new(config).expect("device"))
        }
        _ => {
            let (socket, _) = UnixStream::pair().expect("pair");
            let config = FileSystemConfig {
                tag: "share".to_owned(),
                socket,
                failed: Arc::new(|_| ()),
            };
            Box::new(FileSystem::try_new(config).expect("device"))
        }
    }
}

/// Its region is not there: what it answers is all that counts.
fn mem() -> Mem {
    let mem = Mem::try_new(MemConfig {
        start: Mem::BLOCK_BYTES,
        bytes: 8 * Mem::BLOCK_BYTES,
        changed: Arc::new(|_| ()),
    });
    let mem = mem.expect("whole blocks");
    mem.size().request(4 * Mem::BLOCK_BYTES).expect("fits");
    mem
}

/// Puts a device behind registers.
pub fn transport(device: Box<dyn VirtioDevice>, memory: &GuestMemoryMmap) -> MmioTransport {
    let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    MmioTransport::try_new(device, memory.clone(), irq, Box::new(|_| ())).expect("transport")
}

fn write(transport: &mut MmioTransport, register: u64, value: u32) {
    transport.write(register, &value.to_le_bytes());
}

/// Starts a device as a sound driver does.
fn start(transport: &mut MmioTransport, queues: &[MockQueue]) {
    for (register, value) in [
        (STATUS, 0),
        (STATUS, 1),
        (STATUS, 3),
        (0x24, 1), // DriverFeaturesSel
        (0x20, 1), // DriverFeatures: VIRTIO_F_VERSION_1
        (STATUS, 11),
    ] {
        write(transport, register, value);
    }
    for (index, queue) in (0..).zip(queues) {
        write(transport, 0x30, index); // QueueSel
        write(transport, 0x38, u32::from(queue.size())); // QueueNum
        for (address, register) in queue.addresses().into_iter().zip([0x80, 0x90, 0xa0]) {
            write(transport, register, address as u32);
            write(transport, register + 4, 0);
        }
        write(transport, 0x44, 1); // QueueReady
    }
    write(transport, STATUS, 15);
}

struct Play<'a> {
    input: Unstructured<'a>,
    kind: u8,
    transport: MmioTransport,
    driver: Driver,
}

/// Tries one input.
pub fn run(data: &[u8]) {
    let kind = data.first().copied().unwrap_or(0);
    let device = device(kind);
    let sizes = vec![16; device.queue_max_sizes().len()];
    let driver = Driver::new(&sizes, 0x4_0000);
    let mut play = Play {
        input: Unstructured::new(data.get(1..).unwrap_or_default()),
        kind,
        transport: transport(device, &driver.memory),
        driver,
    };
    if kind & 0x80 != 0 {
        start(&mut play.transport, &play.driver.queues);
    }
    let faults = play.transport.guest_faults();
    while !play.input.is_empty() && play.act().is_ok() {}
    assert!(
        play.transport.guest_faults() >= faults,
        "faults are counted"
    );
    start(&mut play.transport, &play.driver.queues);
    // The file server is gone; the others have lost nothing, not even their thread.
    let lives = play.transport.start_error().is_none();
    assert!(lives || kind % 3 == 2, "a sound driver cannot start it");
}

impl Play<'_> {
    fn act(&mut self) -> Result<()> {
        let choice: u8 = self.input.arbitrary()?;
        match choice % 16 {
            0..=4 => {
                let register = *self.input.choose(&REGISTERS)?;
                let value = match choice >> 5 {
                    0..=3 => *self.input.choose(&STAGES)?,
                    4 | 5 => u32::from(self.input.arbitrary::<u8>()? & 0x1f) << 12,
                    6 => u32::from(self.input.arbitrary::<u8>()?),
                    _ => self.input.arbitrary()?,
                };
                write(&mut self.transport, register, value);
                self.transport.read(register, &mut [0; 4]);
            }
            5 | 6 => {
                let offset = u64::from(self.input.arbitrary::<u16>()?) % 0x1010;
                let length = usize::from(self.input.arbitrary::<u8>()?) % 17;
                let mut bytes = vec![0xaa; length];
                self.transport.read(offset, &mut bytes);
                self.input.fill_buffer(&mut bytes)?;
                self.transport.write(offset, &bytes);
            }
            7..=10 => {
                let queue = usize::from(choice >> 4) % self.driver.queues.len();
                self.driver.misbehave(queue, &mut self.input)?;
                write(&mut self.transport, QUEUE_NOTIFY, queue as u32);
            }
            11 => start(&mut self.transport, &self.driver.queues),
            12 => {
                self.transport.pause();
                self.transport.resume();
            }
            13 => self.move_to_another(),
            14 => write(&mut self.transport, STATUS, 0),
            _ => self.driver.scribble(&mut self.input)?,
        }
        Ok(())
    }

    /// What one transport saves, another takes up.
    fn move_to_another(&mut self) {
        self.transport.pause();
        let state = self.transport.save().expect("it does not serve");
        let mut other = transport(device(self.kind), &self.driver.memory);
        other.restore(&state).expect("a state that was saved");
        assert_eq!(other.save().expect("it does not serve"), state);
        other.resume();
        self.transport = other;
    }
}
