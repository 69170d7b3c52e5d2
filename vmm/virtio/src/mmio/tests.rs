use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio as registers;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{EmptySlot, MmioTransport};
use crate::mock::{Buffer, MockQueue};
use crate::{
    ActivateError, Activation, ActiveQueue, Interrupt, RestoreError, Transport, TransportError,
    TransportState, VirtioDevice,
};

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

/// What happened to the device.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Activated { queues: Vec<u16>, features: u64 },
    Paused,
    Reset,
}

/// Serves nothing, and remembers.
struct Recorder {
    told: mpsc::Sender<Told>,
    interrupt: Arc<Mutex<Option<Arc<dyn Interrupt>>>>,
    queues: Vec<ActiveQueue>,
    config: [u8; 4],
    refuses: Option<Refuses>,
}

/// Whose fault it is that it does not start.
#[derive(Clone, Copy)]
enum Refuses {
    Guest,
    Host,
}

impl VirtioDevice for Recorder {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 64]
    }
    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << 3
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in data.iter_mut().enumerate() {
            let at = offset as usize + at;
            *byte = self.config.get(at).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in data.iter().enumerate() {
            if let Some(config) = self.config.get_mut(offset as usize + at) {
                *config = *byte;
            }
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let device = "recorder".to_owned();
        match self.refuses {
            None => {}
            Some(Refuses::Guest) => return Err(ActivateError::Queues { device }),
            Some(Refuses::Host) => {
                let source = std::io::Error::other("as asked");
                return Err(ActivateError::Host { device, source });
            }
        }
        assert!(self.queues.is_empty(), "activated twice");
        let queues = activation.queues.iter().map(|queue| queue.index).collect();
        let _ = self.told.send(Told::Activated {
            queues,
            features: activation.features,
        });
        for queue in &activation.queues {
            assert!(queue.queue.is_valid(&activation.memory));
        }
        self.queues = activation.queues;
        *self.interrupt.lock().expect("not poisoned") = Some(activation.interrupt);
        Ok(())
    }
    fn pause(&mut self) -> Vec<ActiveQueue> {
        let _ = self.told.send(Told::Paused);
        std::mem::take(&mut self.queues)
    }
    fn reset(&mut self) {
        let _ = self.told.send(Told::Reset);
        self.queues.clear();
    }
    fn save(&self) -> Vec<u8> {
        self.config.to_vec()
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        self.config = state.try_into().map_err(|_| RestoreError {
            device: "recorder".to_owned(),
            reason: "length".to_owned(),
        })?;
        Ok(())
    }
}

struct Bench {
    transport: MmioTransport,
    memory: GuestMemoryMmap,
    told: mpsc::Receiver<Told>,
    interrupt: Arc<Mutex<Option<Arc<dyn Interrupt>>>>,
    irq: EventFd,
    faults: mpsc::Receiver<String>,
}

fn bench_with(refuses: Option<Refuses>) -> Bench {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let (tell, told) = mpsc::channel();
    let interrupt = Arc::default();
    let device = Recorder {
        told: tell,
        interrupt: Arc::clone(&interrupt),
        queues: Vec::new(),
        config: [1, 2, 3, 4],
        refuses,
    };
    let line = irq.try_clone().expect("eventfd");
    let (fault, faults) = mpsc::channel();
    let faulted = Box::new(move |error: &dyn std::error::Error| {
        let _ = fault.send(error.to_string());
    });
    let transport = MmioTransport::try_new(Box::new(device), memory.clone(), line, faulted);
    Bench {
        transport: transport.expect("transport"),
        memory,
        told,
        interrupt,
        irq,
        faults,
    }
}

fn bench() -> Bench {
    bench_with(None)
}

impl Bench {
    fn read(&mut self, register: u32) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: u32, value: u32) {
        self.transport
            .write(u64::from(register), &value.to_le_bytes());
    }

    fn status(&mut self) -> u32 {
        self.read(registers::VIRTIO_MMIO_STATUS)
    }

    fn set_status(&mut self, status: u32) {
        self.write(registers::VIRTIO_MMIO_STATUS, status);
    }

    fn negotiate(&mut self, features: u64) {
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(registers::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(registers::VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_up_queue(&mut self, index: u32, size: u32, [table, available, used]: [u64; 3]) {
        self.write(registers::VIRTIO_MMIO_QUEUE_SEL, index);
        self.write(registers::VIRTIO_MMIO_QUEUE_NUM, size);
        for (register, address) in [
            (registers::VIRTIO_MMIO_QUEUE_DESC_LOW, table),
            (registers::VIRTIO_MMIO_QUEUE_AVAIL_LOW, available),
            (registers::VIRTIO_MMIO_QUEUE_USED_LOW, used),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(registers::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn queue_ready(&mut self, index: u32) -> u32 {
        self.write(registers::VIRTIO_MMIO_QUEUE_SEL, index);
        self.read(registers::VIRTIO_MMIO_QUEUE_READY)
    }

    /// As a driver does it, with both queues.
    fn start(&mut self) -> [MockQueue; 2] {
        self.negotiate(1 << VIRTIO_F_VERSION_1);
        let queues = [
            MockQueue::new(&self.memory, 0x1000, 16),
            MockQueue::new(&self.memory, 0x2000, 64),
        ];
        self.set_up_queue(0, 16, queues[0].addresses());
        self.set_up_queue(1, 64, queues[1].addresses());
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        queues
    }

    fn device_interrupt(&self) -> Arc<dyn Interrupt> {
        let interrupt = self.interrupt.lock().expect("not poisoned");
        Arc::clone(interrupt.as_ref().expect("activated"))
    }
}

#[test]
fn driver_that_keeps_the_order_gets_the_device_activated() {
    let mut bench = bench();
    assert_eq!(bench.read(registers::VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(bench.read(registers::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(bench.read(registers::VIRTIO_MMIO_DEVICE_ID), 42);
    bench.start();
    assert_eq!(
        bench.status(),
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    );
    let expected = Told::Activated {
        queues: vec![0, 1],
        features: 1 << VIRTIO_F_VERSION_1,
    };
    assert_eq!(bench.told.try_recv(), Ok(expected));
    assert_eq!(bench.transport.guest_faults(), 0);
}

#[test]
fn features_are_offered_in_two_halves_and_none_beyond() {
    let mut bench = bench();
    let halves = [1 << VIRTIO_RING_F_EVENT_IDX | 1 << 3, 1, 0, 0];
    for (select, expected) in halves.into_iter().enumerate() {
        bench.write(registers::VIRTIO_MMIO_DEVICE_FEATURES_SEL, select as u32);
        assert_eq!(bench.read(registers::VIRTIO_MMIO_DEVICE_FEATURES), expected);
    }
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_not_ok() {
    for features in [1 << VIRTIO_F_VERSION_1 | 1 << 4, 1 << 3, 0] {
        let mut bench = bench();
        bench.negotiate(features);
        assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER);
        bench.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER);
        assert!(bench.told.try_recv().is_err());
    }
}

#[test]
fn status_that_skips_or_clears_is_ignored_and_counted() {
    let mut bench = bench();
    bench.set_status(DRIVER);
    bench.set_status(ACKNOWLEDGE | DRIVER_OK);
    bench.set_status(0x100);
    assert_eq!(bench.status(), 0);
    bench.set_status(ACKNOWLEDGE | DRIVER);
    bench.set_status(ACKNOWLEDGE);
    assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER);
    assert_eq!(bench.transport.guest_faults(), 4);
}

#[test]
fn status_failed_stops_everything_until_reset() {
    let mut bench = bench();
    bench.set_status(ACKNOWLEDGE | DRIVER | FAILED);
    bench.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | FAILED);
    assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER | FAILED);
    bench.set_status(0);
    assert_eq!(bench.status(), 0);
    assert_eq!(bench.told.try_recv(), Ok(Told::Reset));
}

#[test]
fn queue_outside_memory_or_misaligned_does_not_get_ready() {
    let mut bench = bench();
    bench.negotiate(1 << VIRTIO_F_VERSION_1);
    for addresses in [
        [0x10_0000, 0x2000, 0x3000],
        [0xf_ff10, 0x2000, 0x3000],
        [0x1000, 0x2001, 0x3000],
        [0x1008, 0x2000, 0x3000],
        [0x1000, 0x2000, u64::MAX - 3],
    ] {
        bench.set_up_queue(0, 16, addresses);
        assert_eq!(bench.queue_ready(0), 0, "{addresses:x?}");
    }
    assert_eq!(bench.transport.guest_faults(), 5);
    bench.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    assert_eq!(bench.queue_ready(0), 1);
}

#[test]
fn queue_size_beyond_the_most_is_ignored() {
    let mut bench = bench();
    bench.negotiate(1 << VIRTIO_F_VERSION_1);
    for size in [0, 3, 32, 0x1_0010] {
        bench.write(registers::VIRTIO_MMIO_QUEUE_NUM, size);
    }
    assert_eq!(bench.transport.guest_faults(), 4);
}

#[test]
fn queue_registers_of_a_ready_queue_do_not_change() {
    let mut bench = bench();
    bench.negotiate(1 << VIRTIO_F_VERSION_1);
    bench.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    let before = bench.transport.save().expect("saves").queues[0];
    bench.write(registers::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x8000);
    bench.write(registers::VIRTIO_MMIO_QUEUE_NUM, 8);
    assert_eq!(bench.transport.save().expect("saves").queues[0], before);
    assert_eq!(bench.transport.guest_faults(), 2);
}

#[test]
fn queue_that_is_not_there_has_no_size() {
    let mut bench = bench();
    bench.write(registers::VIRTIO_MMIO_QUEUE_SEL, 2);
    assert_eq!(bench.read(registers::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    bench.write(registers::VIRTIO_MMIO_QUEUE_SEL, u32::MAX);
    assert_eq!(bench.read(registers::VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn queue_taken_from_a_running_device_stops_it() {
    let mut bench = bench();
    bench.start();
    bench.told.try_recv().expect("activated");
    bench.write(registers::VIRTIO_MMIO_QUEUE_SEL, 0);
    bench.write(registers::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(bench.told.try_recv(), Ok(Told::Reset));
    assert_eq!(bench.queue_ready(0), 0);
    assert_ne!(bench.status() & NEEDS_RESET, 0);
}

#[test]
fn notification_reaches_the_queue_once_the_driver_is_ready() {
    let mut bench = bench();
    bench.write(registers::VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    assert!(bench.transport.queue_events()[1].read().is_err());
    bench.start();
    bench.write(registers::VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    assert!(bench.transport.queue_events()[1].read().is_ok());
    bench.write(registers::VIRTIO_MMIO_QUEUE_NOTIFY, 2);
    assert_eq!(bench.transport.guest_faults(), 2);
}

#[test]
fn interrupt_is_shown_until_it_is_acknowledged() {
    let mut bench = bench();
    bench.start();
    let interrupt = bench.device_interrupt();
    let generation = bench.read(registers::VIRTIO_MMIO_CONFIG_GENERATION);
    interrupt.used_buffers(0);
    interrupt.config_changed();
    assert_eq!(bench.irq.read().expect("raised"), 2);
    assert_eq!(bench.read(registers::VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    bench.write(registers::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(bench.read(registers::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    let after = bench.read(registers::VIRTIO_MMIO_CONFIG_GENERATION);
    assert_ne!(after, generation);
}

#[test]
fn needs_reset_is_shown_and_raised_once_and_ends_with_a_reset() {
    let mut bench = bench();
    bench.start();
    let interrupt = bench.device_interrupt();
    interrupt.needs_reset();
    interrupt.needs_reset();
    assert_eq!(bench.irq.read().expect("raised"), 1);
    assert_eq!(bench.status() & NEEDS_RESET, NEEDS_RESET);
    bench.set_status(0);
    assert_eq!(bench.status(), 0);
    assert_eq!(bench.read(registers::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn guest_fault_is_shown_and_each_counted_and_the_first_told() {
    let mut bench = bench();
    bench.start();
    let interrupt = bench.device_interrupt();
    for fault in ["first", "second"] {
        interrupt.guest_fault(&std::io::Error::other(fault));
        assert_eq!(bench.status() & NEEDS_RESET, NEEDS_RESET);
        assert!(bench.irq.read().is_ok());
        bench.set_status(0);
    }
    assert_eq!(bench.transport.guest_faults(), 2);
    assert_eq!(bench.faults.try_iter().collect::<Vec<_>>(), ["first"]);
}

#[test]
fn device_that_the_host_cannot_start_needs_reset_and_keeps_the_reason() {
    let mut bench = bench_with(Some(Refuses::Host));
    bench.start();
    assert_eq!(bench.status() & NEEDS_RESET, NEEDS_RESET);
    assert!(bench.irq.read().is_ok());
    let error = bench.transport.start_error().expect("kept");
    assert_eq!(error.to_string(), "recorder cannot start");
    assert_eq!(bench.transport.guest_faults(), 0);
}

#[test]
fn device_that_the_driver_keeps_from_starting_needs_reset_and_counts_it() {
    let mut bench = bench_with(Some(Refuses::Guest));
    bench.start();
    assert_eq!(bench.status() & NEEDS_RESET, NEEDS_RESET);
    assert!(bench.transport.start_error().is_none());
    assert_eq!(bench.transport.guest_faults(), 1);
    assert_eq!(
        bench.faults.try_recv().expect("told"),
        "recorder cannot start: the driver did not set up all its queues"
    );
}

#[test]
fn config_space_is_read_and_written_at_any_width() {
    let mut bench = bench();
    let mut data = [0xff; 8];
    bench.transport.read(0x100, &mut data);
    assert_eq!(data, [1, 2, 3, 4, 0, 0, 0, 0]);
    bench.transport.write(0x101, &[9]);
    bench.set_status(ACKNOWLEDGE);
    bench.set_status(ACKNOWLEDGE | DRIVER);
    bench.transport.write(0x101, &[7, 8]);
    bench.transport.read(0x100, &mut data);
    assert_eq!(data[..4], [1, 7, 8, 4]);
}

#[test]
fn shared_memory_is_absent() {
    let mut bench = bench();
    bench.write(registers::VIRTIO_MMIO_SHM_SEL, 0);
    assert_eq!(bench.read(registers::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(bench.read(registers::VIRTIO_MMIO_SHM_BASE_HIGH), u32::MAX);
}

#[test]
fn register_access_that_is_not_32_bits_does_nothing() {
    let mut bench = bench();
    let mut data = [0xff; 2];
    bench.transport.read(0, &mut data);
    assert_eq!(data, [0, 0]);
    bench
        .transport
        .write(u64::from(registers::VIRTIO_MMIO_STATUS), &[1]);
    assert_eq!(bench.status(), 0);
    assert_eq!(bench.transport.guest_faults(), 2);
}

#[test]
fn save_of_a_running_device_is_refused() {
    let mut bench = bench();
    bench.start();
    let error = bench.transport.save().expect_err("runs");
    assert!(matches!(error, TransportError::Running { device_type: 42 }));
}

#[test]
fn restore_goes_on_where_save_stopped() {
    let mut original = bench();
    let mut queues = original.start();
    queues[0].offer(&[Buffer {
        address: 0x8000,
        length: 8,
        writable: true,
    }]);
    original.device_interrupt().used_buffers(0);
    original.transport.pause();
    let state = original.transport.save().expect("saves");
    let json = serde_json::to_string(&state).expect("encodes");
    let state: TransportState = serde_json::from_str(&json).expect("decodes");

    let mut restored = bench();
    restored.transport.restore(&state).expect("restores");
    assert_eq!(restored.transport.save().expect("saves"), state);
    restored.transport.resume();
    assert!(matches!(
        restored.told.try_recv(),
        Ok(Told::Activated { .. })
    ));
    // What the pause kept from either side is told again.
    assert!(restored.irq.read().is_ok());
    assert!(restored.transport.queue_events()[0].read().is_ok());
}

#[test]
fn restore_of_what_does_not_fit_is_refused() {
    let mut original = bench();
    original.start();
    original.transport.pause();
    let good = original.transport.save().expect("saves");
    let spoil: [fn(&mut TransportState); 8] = [
        |state| state.version = 2,
        |state| state.device_type = 4,
        |state| state.status = 5,
        |state| state.driver_features |= 1 << 60,
        |state| state.queues[0].descriptor_table = 1 << 40,
        |state| state.queues[1].size = 65,
        |state| state.queues.truncate(1),
        |state| state.device.clear(),
    ];
    for (index, spoil) in spoil.iter().enumerate() {
        let mut state = good.clone();
        spoil(&mut state);
        let restored = bench().transport.restore(&state);
        assert!(restored.is_err(), "change {index}");
    }
    bench().transport.restore(&good).expect("unspoiled");
}

#[test]
fn empty_slot_is_a_placeholder_and_takes_any_write() {
    let mut slot = EmptySlot;
    let mut read = |offset| {
        let mut data = [0xff; 4];
        slot.read(offset, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(
        [read(0), read(4), read(8), read(0x70)],
        [0x7472_6976, 2, 0, 0]
    );
    slot.write(0x70, &[1, 0, 0, 0]);
    let state = slot.save().expect("saves");
    slot.restore(&state).expect("restores");
    assert!(bench().transport.restore(&state).is_err());
}

/// A driver that does anything, more often than not something that matters.
fn access() -> impl Strategy<Value = (u64, Vec<u8>)> {
    let register = prop_oneof![
        4 => prop::sample::select(vec![
            registers::VIRTIO_MMIO_STATUS,
            registers::VIRTIO_MMIO_QUEUE_SEL,
            registers::VIRTIO_MMIO_QUEUE_READY,
            registers::VIRTIO_MMIO_QUEUE_NUM,
            registers::VIRTIO_MMIO_QUEUE_DESC_LOW,
            registers::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
            registers::VIRTIO_MMIO_QUEUE_USED_LOW,
            registers::VIRTIO_MMIO_DRIVER_FEATURES,
            registers::VIRTIO_MMIO_DRIVER_FEATURES_SEL,
            registers::VIRTIO_MMIO_QUEUE_NOTIFY,
        ]).prop_map(u64::from),
        1 => 0u64..0x1000,
    ];
    let value = prop_oneof![
        4 => prop::sample::select(vec![0u32, 1, 2, 3, 11, 15, 16, 64, 75, 79, 128, 0x1000, 0x2000, 0x3000]),
        1 => any::<u32>(),
    ];
    let bytes = prop_oneof![
        8 => value.prop_map(|value| value.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..=8),
    ];
    (register, bytes)
}

proptest! {
    #[test]
    fn any_accesses_never_panic_and_keep_invariants(accesses in prop::collection::vec(access(), 0..300)) {
        let mut bench = bench();
        let mut active = false;
        for (offset, data) in accesses {
            bench.transport.write(offset, &data);
            bench.transport.read(offset, &mut data.clone());
            for told in bench.told.try_iter() {
                active = match told {
                    Told::Activated { features, .. } => {
                        prop_assert!(!active);
                        prop_assert!(features & (1 << VIRTIO_F_VERSION_1) != 0);
                        prop_assert_eq!(features & !(bench.transport.offered_features()), 0);
                        true
                    }
                    Told::Paused | Told::Reset => false,
                };
            }
            let status = bench.status();
            // The device serves only between DRIVER_OK and what stops it.
            prop_assert!(!active || status & DRIVER_OK != 0);
            prop_assert!(status & DRIVER_OK == 0 || status & FEATURES_OK != 0);
        }
        bench.transport.pause();
        let state = bench.transport.save().expect("does not run");
        prop_assert!(self::bench().transport.restore(&state).is_ok());
    }
}
