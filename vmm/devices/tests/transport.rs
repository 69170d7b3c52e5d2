//! A device behind the mmio transport, from the first register to the first
//! interrupt.

use std::os::fd::AsRawFd;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_devices::Rng;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_virtio::mock::{Buffer, MockQueue};
use vmm_virtio::{MmioTransport, Transport};

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
    let mut transport =
        MmioTransport::try_new(Box::new(Rng::new()), memory.clone(), line).expect("transport");
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
