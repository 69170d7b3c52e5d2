//! ACPI tables of a hardware-reduced machine: how many CPUs there are, where
//! devices are, and how to power off and to reset (ACPI 6.5 section 4.1).

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, IO, Interrupt, Memory32Fixed, Name, ONE, Package, ResourceTemplate, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_devices::AcpiPm;

use crate::layout::{
    ACPI_RESET_PORT, ACPI_SLEEP_CONTROL_PORT, ACPI_SLEEP_STATUS_PORT, ACPI_TABLES, HIGH_RAM,
    IOAPIC, LOCAL_APIC, PVPANIC_PORT, SERIAL_GSI, SERIAL_PORTS, VIRTIO_MMIO_SLOT_SIZE,
    VIRTIO_MMIO_SLOTS, virtio_mmio_gsi, virtio_mmio_slot,
};

const OEM_ID: [u8; 6] = *b"BULKHD";
const OEM_TABLE_ID: [u8; 8] = *b"BULKHEAD";
const OEM_REVISION: u32 = 1;
/// Length of the header that every description table begins with (section
/// 5.2.6).
const HEADER_BYTES: u32 = 36;
/// Tables are padded to this, for readability of a dump only.
const TABLE_ALIGNMENT: usize = 16;

/// Tables that do not fit, or guest memory that must be there and is not.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// More than the area below 1 MiB holds.
    #[error("the ACPI tables of {bytes} bytes do not fit the area for them")]
    TooLong {
        /// Their size.
        bytes: usize,
    },
    /// No such memory.
    #[error("cannot write the ACPI tables to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// The variable part of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// vCPUs, those that run later included.
    pub cpus: u8,
    /// Whether there is a serial line.
    pub serial: bool,
}

/// Writes the tables to guest memory. Returns the address of the root pointer.
///
/// # Errors
/// When they do not fit.
pub fn write(machine: Machine, memory: &GuestMemoryMmap) -> Result<u64, AcpiError> {
    let tables = build(machine);
    if tables.len() as u64 > HIGH_RAM - ACPI_TABLES {
        return Err(AcpiError::TooLong {
            bytes: tables.len(),
        });
    }
    memory
        .write_slice(&tables, GuestAddress(ACPI_TABLES))
        .map_err(AcpiError::Write)?;
    Ok(ACPI_TABLES)
}

/// All tables as they lie at [`ACPI_TABLES`], the root pointer first.
fn build(machine: Machine) -> Vec<u8> {
    // The root pointer needs the address of a table that is laid out after it.
    let mut tables = vec![0; Rsdp::len()];
    let dsdt = append(&mut tables, dsdt(machine).as_slice());
    let fadt = append(&mut tables, &bytes(&fadt(dsdt)));
    let madt = append(&mut tables, &bytes(&madt(machine.cpus)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&mut tables, &bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    tables[..rsdp.len()].copy_from_slice(&rsdp);
    tables
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Appends a table. Returns its guest physical address.
fn append(tables: &mut Vec<u8>, table: &[u8]) -> u64 {
    tables.resize(tables.len().next_multiple_of(TABLE_ALIGNMENT), 0);
    let address = ACPI_TABLES + tables.len() as u64;
    tables.extend_from_slice(table);
    address
}

/// Fixed description: no legacy hardware, and where to sleep and reset.
fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    // Section 5.2.9.3: no VGA (bit 2), no CMOS clock (bit 5); bit 1, a keyboard controller, is clear.
    const NO_VGA: u16 = 1 << 2;
    const NO_RTC: u16 = 1 << 5;
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Set means: there is no such fixed button.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_RTC).into();
    fadt.reset_reg = port(ACPI_RESET_PORT);
    fadt.reset_value = AcpiPm::RESET_VALUE;
    fadt.sleep_control_reg = port(ACPI_SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(ACPI_SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// A register of one byte at a port.
fn port(port: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

/// Interrupt controllers: a local APIC per vCPU and one I/O APIC. vCPUs that
/// run later are enabled too, since Linux only brings up at run time what it
/// has counted at boot.
fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LOCAL_APIC as u32),
    );
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC as u32, 0));
    madt
}

/// Devices: the same for every VM, but for the serial line.
fn dsdt(machine: Machine) -> Sdt {
    let mut aml = Vec::new();
    for slot in 0..VIRTIO_MMIO_SLOTS {
        virtio_mmio(slot, &mut aml);
    }
    pvpanic(&mut aml);
    if machine.serial {
        serial(&mut aml);
    }
    // Section 7.4.2: the sleep type of S5 for the sleep control register.
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&AcpiPm::S5_SLEEP_TYPE, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        2,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&aml);
    dsdt
}

fn virtio_mmio(slot: u32, aml: &mut Vec<u8>) {
    let registers = Memory32Fixed::new(
        true,
        virtio_mmio_slot(slot) as u32,
        VIRTIO_MMIO_SLOT_SIZE as u32,
    );
    Device::new(
        format!("_SB_.VM{slot:02X}").as_str().into(),
        vec![
            // The identifier that Linux's virtio-mmio driver binds to.
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &slot),
            // Device accesses are coherent with the CPUs' caches.
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&registers, &edge(virtio_mmio_gsi(slot))]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn pvpanic(aml: &mut Vec<u8>) {
    let port = PVPANIC_PORT as u16;
    Device::new(
        "_SB_.PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, 1)]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn serial(aml: &mut Vec<u8>) {
    let (first, last) = (*SERIAL_PORTS.start() as u16, *SERIAL_PORTS.end() as u16);
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &"PNP0501"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(first, first, 1, (last - first + 1) as u8),
                    &edge(SERIAL_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// An interrupt line of a device's own: edge-triggered, active high. Level
/// would cost an exit at each end of interrupt.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes"))
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at a guest address, by its own length.
    fn table(tables: &[u8], address: u64) -> &[u8] {
        let table = &tables[(address - ACPI_TABLES) as usize..];
        &table[..u32_at(table, 4) as usize]
    }

    proptest! {
        #[test]
        fn build_any_machine_has_valid_checksums_and_fits(cpus in 1u8..=64, serial: bool) {
            let tables = build(Machine { cpus, serial });
            prop_assert!(tables.len() as u64 <= HIGH_RAM - ACPI_TABLES);
            prop_assert_eq!(&tables[..8], b"RSD PTR ");
            prop_assert_eq!(sum(&tables[..20]), 0);
            prop_assert_eq!(sum(&tables[..Rsdp::len()]), 0);
            let xsdt = table(&tables, u64_at(&tables, 24));
            prop_assert_eq!(&xsdt[..4], b"XSDT");
            prop_assert_eq!(sum(xsdt), 0);
            let fadt = table(&tables, u64_at(xsdt, 36));
            prop_assert_eq!(&fadt[..4], b"FACP");
            prop_assert_eq!(sum(fadt), 0);
            // HW_REDUCED_ACPI and RESET_REG_SUP.
            prop_assert_eq!(u32_at(fadt, 112) & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
            let madt = table(&tables, u64_at(xsdt, 44));
            prop_assert_eq!(&madt[..4], b"APIC");
            prop_assert_eq!(sum(madt), 0);
            // One local APIC of 8 bytes per CPU and one I/O APIC of 12.
            prop_assert_eq!(madt.len(), 44 + 8 * usize::from(cpus) + 12);
            let dsdt = table(&tables, u64_at(fadt, 140));
            prop_assert_eq!(&dsdt[..4], b"DSDT");
            prop_assert_eq!(sum(dsdt), 0);
        }
    }

    #[test]
    fn dsdt_describes_the_serial_line_only_when_there_is_one() {
        let describes = |serial| {
            let dsdt = dsdt(Machine { cpus: 1, serial });
            dsdt.as_slice().windows(4).any(|name| name == b"COM1")
        };
        assert!(describes(true));
        assert!(!describes(false));
    }
}
