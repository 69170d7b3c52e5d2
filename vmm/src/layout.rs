//! The machine's addresses: guest physical memory, ports and interrupt lines.
//!
//! ```text
//! 0x0000_0000  RAM            start-of-day structures, command line
//! 0x0006_0000  reserved       ramoops: the guest's last kernel messages
//! 0x0008_0000  reserved       what was a BIOS; the ACPI tables at 0xe_0000
//! 0x0010_0000  RAM            the kernel where its ELF says, the initramfs at the top
//! 0xc000_0000  hole           virtio-mmio slots, I/O APIC, local APICs
//! 0x1_0000_0000 RAM           what does not fit below the hole
//! ```
//!
//! Behind the last RAM, and above the hole, lies the memory that is plugged into the
//! running guest ([`crate::memory::plug_span`]).

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// `hvm_start_info` of the PVH boot protocol.
pub const START_INFO: u64 = 0x6000;
/// Its module list: one entry, the initramfs.
pub const MODULE_LIST: u64 = 0x6040;
/// Its memory map.
pub const MEMORY_MAP: u64 = 0x7000;
/// The kernel command line, at most 2048 bytes with its NUL.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Where the guest keeps its last kernel messages (ramoops). Below 1 MiB, where
/// Linux allocates nothing anyway, so that it costs the guest no memory and is
/// in the same place for every memory size.
pub const RAMOOPS: u64 = 0x6_0000;
/// Its size: a power of two, as ramoops wants it.
pub const RAMOOPS_SIZE: u64 = 0x2_0000;
/// The root pointer of the ACPI tables; the tables follow.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// First address above the area that PCs reserve for their BIOS.
pub const HIGH_RAM: u64 = 0x10_0000;

/// End of the RAM below the hole: 3 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// Start of the RAM above the hole: 4 GiB.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Where memory that is plugged later may begin: the largest unit in which Linux
/// adds memory on x86 (`MAX_BLOCK_SIZE` of `arch/x86/mm/init_64.c`).
pub const PLUG_ALIGNMENT: u64 = 2 << 30;

/// First virtio-mmio slot.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Distance between two slots, and the size of each.
pub const VIRTIO_MMIO_SLOT_SIZE: u64 = 0x1000;
/// Slots. All are described to the guest; a free one shows the placeholder
/// device (virtio 1.2 section 4.2.2, device ID 0) until a device is added.
pub const VIRTIO_MMIO_SLOTS: u32 = 32;
/// Interrupt line of the first slot; each slot has one.
pub const VIRTIO_MMIO_FIRST_GSI: u32 = 16;

/// I/O APIC, where PCs have it.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Bytes that its registers take.
pub const IOAPIC_SIZE: u64 = vmm_devices::IoApic::BYTES;
/// Its lines: the legacy 16, one per virtio slot, and room to spare.
pub const IOAPIC_PINS: u32 = vmm_devices::IoApic::PINS;
/// Local APIC of each vCPU, and the address window of message-signalled
/// interrupts.
pub const LOCAL_APIC: u64 = 0xfee0_0000;

/// Ports of the first serial line of a PC.
pub const SERIAL_PORTS: std::ops::RangeInclusive<u64> = 0x3f8..=0x3ff;
/// Its interrupt line.
pub const SERIAL_GSI: u32 = 4;
/// Command and status port of the keyboard controller, which is not there.
pub const KEYBOARD_CONTROLLER_PORT: u64 = 0x64;
/// The panic device, where QEMU has it.
pub const PVPANIC_PORT: u64 = 0x505;
/// Sleep control, sleep status and reset registers of hardware-reduced ACPI.
pub const ACPI_PM_PORTS: std::ops::RangeInclusive<u64> = 0x600..=0x602;
/// Sleep control register (ACPI 6.5 section 4.8.3.7).
pub const ACPI_SLEEP_CONTROL_PORT: u64 = 0x600;
/// Sleep status register.
pub const ACPI_SLEEP_STATUS_PORT: u64 = 0x601;
/// Reset register (ACPI 6.5 section 4.8.3.6).
pub const ACPI_RESET_PORT: u64 = 0x602;

/// Address of a virtio-mmio slot.
pub const fn virtio_mmio_slot(slot: u32) -> u64 {
    VIRTIO_MMIO + slot as u64 * VIRTIO_MMIO_SLOT_SIZE
}

/// Interrupt line of a virtio-mmio slot.
pub const fn virtio_mmio_gsi(slot: u32) -> u32 {
    VIRTIO_MMIO_FIRST_GSI + slot
}

const _: () = assert!(RAMOOPS_SIZE.is_power_of_two());
const _: () = assert!(RAMOOPS + RAMOOPS_SIZE <= ACPI_TABLES && ACPI_TABLES < HIGH_RAM);
const _: () = assert!(COMMAND_LINE + vmm_config::MAX_COMMAND_LINE_BYTES as u64 <= RAMOOPS);
const _: () = assert!(vmm_virtio::MMIO_BYTES <= VIRTIO_MMIO_SLOT_SIZE);
const _: () = assert!(virtio_mmio_gsi(VIRTIO_MMIO_SLOTS) <= IOAPIC_PINS);
const _: () = assert!(virtio_mmio_slot(VIRTIO_MMIO_SLOTS) <= IOAPIC);
