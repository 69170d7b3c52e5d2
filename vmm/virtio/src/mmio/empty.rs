//! An address range in which no device is yet.

use virtio_bindings::virtio_mmio as registers;
use vmm_sys_util::eventfd::EventFd;

use super::{MAGIC, REGISTERS_VERSION};
use crate::{ActivateError, Transport, TransportError, TransportState};

/// A slot with the placeholder `DeviceID` 0 (virtio 1.2 section 4.2.2): a
/// driver that probes it leaves it alone, and finds a device there when the
/// owner of the bus has put one in its place and the guest probes again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EmptySlot;

impl Transport for EmptySlot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match u32::try_from(offset) {
            Ok(registers::VIRTIO_MMIO_MAGIC_VALUE) => MAGIC,
            Ok(registers::VIRTIO_MMIO_VERSION) => REGISTERS_VERSION,
            // DeviceID among them.
            _ => 0,
        };
        data.fill(0);
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = value.to_le_bytes();
        }
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}

    fn queue_events(&self) -> &[EventFd] {
        &[]
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn save(&self) -> Result<TransportState, TransportError> {
        Ok(TransportState {
            version: TransportState::VERSION,
            ..TransportState::default()
        })
    }

    fn restore(&mut self, state: &TransportState) -> Result<(), TransportError> {
        if state.version != TransportState::VERSION {
            return Err(TransportError::Version {
                version: state.version,
            });
        }
        match state.device_type {
            0 => Ok(()),
            saved => Err(TransportError::DeviceType { saved, present: 0 }),
        }
    }

    fn guest_faults(&self) -> u64 {
        0
    }

    fn start_error(&self) -> Option<&ActivateError> {
        None
    }
}
