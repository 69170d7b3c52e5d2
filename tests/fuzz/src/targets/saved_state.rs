//! Saved states: any bytes as the state of a transport and its device, of the
//! interrupt controller or of the serial line. Whatever is taken up must run, and
//! be saved again as it was.

use std::fs::File;

use arbitrary::{Result, Unstructured};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};
use vmm_devices::{IoApic, IoApicState, Serial, SerialState};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_virtio::{EmptySlot, QueueState, Transport, TransportState};

use super::mmio::{device, transport};
use crate::driver::Driver;

/// Tries one input.
pub fn run(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else {
        return;
    };
    match choice % 8 {
        0 => {
            if let Ok(state) = serde_json::from_slice(data) {
                restore_transport(choice, &state, &[]);
            }
        }
        1 => {
            if let Ok(state) = postcard::from_bytes(data) {
                restore_transport(choice, &state, &[]);
            }
        }
        2..=5 => {
            let mut input = Unstructured::new(data);
            if let Ok(state) = any_state(choice, &mut input) {
                restore_transport(choice, &state, input.take_rest());
            }
        }
        6 => decoded(data).iter().for_each(restore_ioapic),
        _ => decoded(data).iter().for_each(restore_serial),
    }
}

/// By either encoding.
fn decoded<T: serde::de::DeserializeOwned>(data: &[u8]) -> Option<T> {
    serde_json::from_slice::<Value>(data)
        .ok()
        .and_then(|value| serde_json::from_value(value).ok())
        .or_else(|| postcard::from_bytes(data).ok())
}

/// A state that is nearly one.
fn any_state(choice: u8, input: &mut Unstructured<'_>) -> Result<TransportState> {
    const STATUSES: [u8; 9] = [0, 1, 3, 11, 15, 79, 128, 143, 200];
    let device = device(choice >> 3);
    let mut queues = Vec::new();
    let extra: u8 = input.arbitrary()?;
    let count = device.queue_max_sizes().len() + usize::from(extra == 255);
    for _ in 0..count {
        let pages: [u8; 3] = input.arbitrary()?;
        let form: u8 = input.arbitrary()?;
        let mut addresses = pages.map(|page| u64::from(page % 20) * 0x1000);
        if form & 0x80 != 0 {
            addresses[usize::from(form) % 3] = input.arbitrary()?;
        }
        let [descriptor_table, available_ring, used_ring] = addresses;
        queues.push(QueueState {
            size: if form & 0x40 == 0 {
                1 << (form & 7)
            } else {
                input.arbitrary()?
            },
            ready: form & 0x20 == 0,
            descriptor_table,
            available_ring,
            used_ring,
            next_available: u16::from(input.arbitrary::<u8>()? & 0x1f),
            next_used: input.arbitrary()?,
        });
    }
    let mut state = TransportState {
        version: TransportState::VERSION,
        device_type: device.device_type(),
        status: *input.choose(&STATUSES)?,
        driver_features: 1 << 32 | u64::from(input.arbitrary::<u8>()?) << 24,
        device_features_select: input.arbitrary()?,
        driver_features_select: input.arbitrary()?,
        queue_select: u32::from(input.arbitrary::<u8>()?),
        interrupt_status: input.arbitrary()?,
        config_generation: input.arbitrary()?,
        queues,
        device: device.save(),
    };
    match extra % 16 {
        0 => state.version = input.arbitrary()?,
        1 => state.device_type = input.arbitrary()?,
        2 => state.driver_features = input.arbitrary()?,
        3 | 4 => {
            let length = usize::from(input.arbitrary::<u8>()?) % (input.len() + 1);
            state.device = input.bytes(length)?.to_vec();
        }
        _ => {}
    }
    Ok(state)
}

fn restore_transport(choice: u8, state: &TransportState, rings: &[u8]) {
    let driver = Driver::new(&[16], 0x4_0000);
    for page in 1..20 {
        let at = GuestAddress(0x1000 * page);
        let _ = driver.memory.write(rings, at);
    }
    let _ = EmptySlot.restore(state);
    let mut transport = transport(device(choice >> 3), &driver.memory);
    if let Err(refused) = transport.restore(state) {
        assert!(!refused.to_string().is_empty());
        return;
    }
    let mut again = transport.save().expect("it does not serve yet");
    // Numbers can be written in more than one way there.
    again.device.clone_from(&state.device);
    assert_eq!(&again, state, "what was taken up is what is saved");
    transport.resume();
    transport.read(0, &mut [0; 4]);
    transport.pause();
    transport.save().expect("it does not serve any more");
}

fn restore_ioapic(state: &IoApicState) {
    let Some(mut ioapic) = IoApic::restore(state) else {
        return;
    };
    let again = ioapic.save();
    assert_eq!(again.entries, state.entries);
    assert_eq!(IoApic::restore(&again).as_ref(), Some(&ioapic));
    let _ = ioapic.write(0x10, &[0xff; 4]);
    ioapic.read(0x10, &mut [0; 4]);
    assert!(ioapic.routes().iter().all(|route| route.pin < IoApic::PINS));
}

fn restore_serial(state: &SerialState) {
    let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let output = File::create("/dev/null").expect("always there");
    let Ok(mut serial) = Serial::restore(state, irq, output) else {
        return;
    };
    assert_eq!(&serial.save(), state, "what was taken up is what is saved");
    for offset in 0..Serial::PORTS {
        serial.read(offset, &mut [0]);
        serial.write(offset, &[0x5a]);
    }
}
