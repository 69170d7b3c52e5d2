//! The devices behind the mmio transport: from the first register to the first
//! interrupt, and whatever else a driver may do.

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_devices::{FileSystem, FileSystemConfig, Rng, Vsock, VsockConfig};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_virtio::mock::{Buffer, MockQueue};
use vmm_virtio::{MmioTransport, QueueState, Transport, TransportState, VirtioDevice};

const STATUS: u64 = 0x70;

fn write(transport: &mut MmioTransport, register: u64, value: u32) {
    transport.write(register, &value.to_le_bytes());
}

fn wait_for(event: &EventFd) {
    let epoll = Epoll::new().expect("epoll");
    let watched = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, event.as_raw_fd(), watched)
        .expect("watch");
    let mut happened = [EpollEvent::default()];
    let count = epoll.wait(20_000, &mut happened).expect("wait");
    assert_eq!(count, 1, "no interrupt");
    event.read().expect("raised");
}

#[test]
fn entropy_device_serves_a_driver_of_registers_before_and_after_a_reset() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let line = irq.try_clone().expect("eventfd");
    let device = Box::new(Rng::new());
    let mut transport =
        MmioTransport::try_new(device, memory.clone(), line, Box::new(|_| ())).expect("transport");
    for round in 1..=2u64 {
        memory
            .write_slice(&[0; 0x2000], GuestAddress(0x1000))
            .expect("in memory");
        let mut queue = MockQueue::new(&memory, 0x1000, 64);
        let [table, available, used] = queue.addresses();
        for (register, value) in [
            (STATUS, 0),
            (STATUS, 1),
            (STATUS, 3),
            (0x24, 1), // DriverFeaturesSel
            (0x20, 1), // DriverFeatures: VIRTIO_F_VERSION_1
            (STATUS, 11),
            (0x30, 0),  // QueueSel
            (0x38, 64), // QueueNum
            (0x80, table as u32),
            (0x90, available as u32),
            (0xa0, used as u32),
            (0x44, 1), // QueueReady
            (STATUS, 15),
        ] {
            write(&mut transport, register, value);
        }
        assert_eq!(transport.guest_faults(), 0);
        let address = 0x8000 * round;
        let head = queue.offer(&[Buffer {
            address,
            length: 32,
            writable: true,
        }]);
        write(&mut transport, 0x50, 0); // QueueNotify
        wait_for(&irq);
        assert_eq!(queue.take_used(), Some((head, 32)));
        let mut random = [0; 32];
        memory
            .read_slice(&mut random, GuestAddress(address))
            .expect("in memory");
        assert_ne!(random, [0; 32]);
    }
}

/// Every virtio device, none of which has anybody on the host's side.
fn devices() -> [Box<dyn VirtioDevice>; 3] {
    let directory = tempfile::tempdir().expect("directory");
    let vsock = Vsock::try_new(VsockConfig {
        guest_cid: 3,
        listener: UnixListener::bind(directory.path().join("s")).expect("bind"),
        ready: Arc::new(|| ()),
        failed: Arc::new(|error| panic!("{error}")),
    });
    let (socket, _) = UnixStream::pair().expect("pair");
    let file_system = FileSystem::try_new(FileSystemConfig {
        tag: "share".to_owned(),
        socket,
        failed: Arc::new(|_| ()),
    });
    [
        Box::new(Rng::new()),
        Box::new(vsock.expect("device")),
        Box::new(file_system.expect("device")),
    ]
}

/// Guest memory with this in it wherever a ring may be.
fn memory(rings: &[u8]) -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    for ring in 0..16 {
        let at = GuestAddress(0x1000 * ring);
        memory.write_slice(rings, at).expect("in memory");
    }
    memory
}

fn transport(device: Box<dyn VirtioDevice>, memory: &GuestMemoryMmap) -> MmioTransport {
    let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    MmioTransport::try_new(device, memory.clone(), irq, Box::new(|_| ())).expect("transport")
}

/// Starts a device as its driver does, with rings from 0x1000 on, a page or
/// more for each part.
fn start(transport: &mut MmioTransport, queues: u32) {
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
    for queue in 0..queues {
        write(transport, 0x30, queue); // QueueSel
        write(transport, 0x38, 16); // QueueNum
        for (part, register) in [0x80, 0x90, 0xa0].into_iter().enumerate() {
            write(transport, register, 0x1000 * (1 + 3 * queue + part as u32));
            write(transport, register + 4, 0);
        }
        write(transport, 0x44, 1); // QueueReady
    }
    write(transport, STATUS, 15);
}

/// Bytes that are small numbers, most of them: indices, flags, lengths.
fn rings() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![6 => Just(0u8), 3 => 0u8..17, 1 => any::<u8>()];
    prop::collection::vec(byte, 512)
}

/// A write to a register that matters, or to any other.
fn access() -> impl Strategy<Value = (u64, u32)> {
    let register = prop_oneof![
        4 => prop::sample::select(vec![STATUS, 0x30, 0x38, 0x44, 0x50, 0x50, 0x80, 0x90, 0xa0]),
        1 => 0u64..0x200,
    ];
    let value = prop_oneof![
        4 => prop::sample::select(vec![0u32, 1, 2, 3, 11, 15, 16, 75, 79, 128, 0x1000, 0x2000]),
        1 => any::<u32>(),
    ];
    (register, value)
}

fn queue_state() -> impl Strategy<Value = QueueState> {
    let address = || prop_oneof![4 => (0u64..16).prop_map(|page| 0x1000 * page), 1 => any::<u64>()];
    let size = prop_oneof![4 => Just(16u16), 1 => any::<u16>()];
    let position = || prop_oneof![2 => Just(0u16), 1 => any::<u16>()];
    let addresses = (address(), address(), address());
    (size, any::<bool>(), addresses, position(), position()).prop_map(
        |(size, ready, addresses, next_available, next_used)| QueueState {
            size,
            ready,
            descriptor_table: addresses.0,
            available_ring: addresses.1,
            used_ring: addresses.2,
            next_available,
            next_used,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a driver writes to the registers and has in its rings, each
    /// device can be saved, restored, and started by a driver that is sound.
    #[test]
    fn accesses_of_any_driver_never_panic_and_leave_a_device_that_can_start(
        rings in rings(),
        accesses in prop::collection::vec(access(), 0..60),
    ) {
        for (device, again) in devices().into_iter().zip(devices()) {
            let queues = device.queue_max_sizes().len() as u32;
            let memory = memory(&rings);
            let mut transport = transport(device, &memory);
            start(&mut transport, queues);
            for queue in 0..queues {
                write(&mut transport, 0x50, queue); // QueueNotify
            }
            for &(register, value) in &accesses {
                write(&mut transport, register, value);
                transport.read(register, &mut [0; 4]);
            }
            transport.pause();
            let state = transport.save().expect("does not run");
            let mut restored = self::transport(again, &memory);
            prop_assert!(restored.restore(&state).is_ok());
            restored.resume();
            start(&mut transport, queues);
            // The file server is gone; the others have lost nothing, not even their thread.
            let lives = transport.start_error().is_none();
            prop_assert!(lives || state.device_type == 26);
        }
    }

    /// Whatever is in a saved state: it is refused, or the device runs.
    #[test]
    fn restore_of_any_state_never_panics(
        rings in rings(),
        status in prop::sample::select(vec![0u8, 1, 3, 11, 15, 79, 128, 143, 200]),
        queues in prop::collection::vec(queue_state(), 3),
        bytes in prop::collection::vec(any::<u8>(), 0..16),
        own: bool,
    ) {
        for mut device in devices() {
            let _ = device.restore(&bytes);
            let mut state = TransportState {
                version: TransportState::VERSION,
                device_type: device.device_type(),
                status,
                driver_features: 1 << 32,
                queues: queues[..device.queue_max_sizes().len()].to_vec(),
                device: bytes.clone(),
                ..TransportState::default()
            };
            if own {
                state.device = device.save();
            }
            let mut transport = transport(device, &memory(&rings));
            if transport.restore(&state).is_ok() {
                transport.resume();
                transport.pause();
                prop_assert!(transport.save().is_ok());
            }
        }
    }
}
