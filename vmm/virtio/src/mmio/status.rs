//! The device status register (virtio 1.2 section 2.1).

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

/// The order in which a driver sets the bits (section 3.1.1), each value with
/// all before it.
const STAGES: [u8; 5] = [
    0,
    ACKNOWLEDGE,
    ACKNOWLEDGE | DRIVER,
    ACKNOWLEDGE | DRIVER | FEATURES_OK,
    ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
];

/// The driver's bits of the status. Always one of [`STAGES`], with or without
/// `FAILED`. `DEVICE_NEEDS_RESET` is the device's and kept by the interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Status(u8);

impl Status {
    /// What the register reads as.
    pub(super) fn read(self, needs_reset: bool) -> u8 {
        self.0 | if needs_reset { NEEDS_RESET } else { 0 }
    }

    /// The status after the driver writes `value`, other than 0; nothing when
    /// it may not. The driver may repeat `DEVICE_NEEDS_RESET` as it read it.
    pub(super) fn advance(self, value: u8) -> Option<Self> {
        let value = value & !NEEDS_RESET;
        let stage = value & !FAILED;
        // Section 2.1.1: the driver must not clear a bit, and section 3.1.1:
        // after FAILED it must reset before it starts again.
        let clears = self.0 & !value != 0;
        let goes_on_failed = self.0 & FAILED != 0 && stage != self.0 & !FAILED;
        (STAGES.contains(&stage) && !clears && !goes_on_failed).then_some(Self(value))
    }

    /// A saved register, as status and `DEVICE_NEEDS_RESET`.
    pub(super) fn restore(saved: u8) -> Option<(Self, bool)> {
        let status = saved & !NEEDS_RESET;
        STAGES
            .contains(&(status & !FAILED))
            .then_some((Self(status), saved & NEEDS_RESET != 0))
    }

    pub(super) fn has_driver(self) -> bool {
        self.0 & DRIVER != 0
    }

    pub(super) fn has_features_ok(self) -> bool {
        self.0 & FEATURES_OK != 0
    }

    pub(super) fn without_features_ok(self) -> Self {
        // DRIVER_OK without it would be no stage.
        Self(self.0 & !(FEATURES_OK | DRIVER_OK))
    }

    /// Features may be written.
    pub(super) fn is_negotiating(self) -> bool {
        self.0 == ACKNOWLEDGE | DRIVER
    }

    /// Queues may be set up.
    pub(super) fn is_configuring(self) -> bool {
        self.0 == ACKNOWLEDGE | DRIVER | FEATURES_OK
    }

    /// The driver uses the device.
    pub(super) fn is_driver_ok(self) -> bool {
        self.0 & DRIVER_OK != 0 && self.0 & FAILED == 0
    }
}
