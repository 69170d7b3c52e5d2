//! The network devices that the host puts into the VM's slots while it runs.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Where the kernel shows the slots that the ACPI tables describe. They are
/// called `LNRO0005:` and a number of the kernel's.
const SLOTS: &str = "/sys/bus/platform/devices";
const SLOT_PREFIX: &str = "LNRO0005:";
/// Where it takes a slot's name, to look into the slot again or to let go of it.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// Why there is no device in a slot.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The machine has no such slot.
    #[error("the machine has no virtio slot {slot}")]
    NoSlot {
        /// As the host says.
        slot: u32,
    },
    /// There is no network device in it.
    #[error("virtio slot {slot} holds no network device")]
    NoInterface {
        /// Which.
        slot: u32,
    },
    /// The kernel.
    #[error("{operation} {path}")]
    Sysfs {
        /// As in "write to".
        operation: &'static str,
        /// Where.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError::Sysfs {
        operation,
        path: path.into(),
        source,
    }
}

/// Looks into a slot in which the host has just put a network device. Returns the
/// index of its interface, which is in the agent's own network namespace.
pub fn plug(slot: u32) -> Result<u32, DeviceError> {
    let name = slot_name(slot)?;
    write(&Path::new(DRIVER).join("bind"), &name)?;
    let interface = interface_below(&Path::new(SLOTS).join(&name))
        .and_then(|interface| interface.ok_or(DeviceError::NoInterface { slot }));
    if interface.is_err() {
        // It would be in the way of the next attempt.
        let _ = unplug(slot);
    }
    interface
}

/// Lets go of what is in a slot, wherever its interface has been moved to. The
/// host may then take it away.
pub fn unplug(slot: u32) -> Result<(), DeviceError> {
    write(&Path::new(DRIVER).join("unbind"), &slot_name(slot)?)
}

/// The kernel numbers the slots in the order of its walk through the tables; the
/// tables number them themselves (`_UID`).
fn slot_name(slot: u32) -> Result<String, DeviceError> {
    for name in names_in(Path::new(SLOTS))? {
        if !name.starts_with(SLOT_PREFIX) {
            continue;
        }
        let path = Path::new(SLOTS).join(&name).join("firmware_node/uid");
        let uid = fs::read_to_string(&path).map_err(failed("read", &path))?;
        if uid.trim_end() == slot.to_string() {
            return Ok(name);
        }
    }
    Err(DeviceError::NoSlot { slot })
}

/// `virtio<n>/net/<name>/ifindex` of a slot's directory.
fn interface_below(slot: &Path) -> Result<Option<u32>, DeviceError> {
    for device in names_in(slot)? {
        let interfaces = slot.join(device).join("net");
        if !interfaces.is_dir() {
            continue;
        }
        let Some(name) = names_in(&interfaces)?.pop() else {
            continue;
        };
        let path = interfaces.join(&name).join("ifindex");
        let index = fs::read_to_string(&path).map_err(failed("read", &path))?;
        let index = index.trim_end().parse();
        let index = index.map_err(|_| failed("read", &path)(io::ErrorKind::InvalidData.into()));
        return Ok(Some(index?));
    }
    Ok(None)
}

fn names_in(directory: &Path) -> Result<Vec<String>, DeviceError> {
    let entries = fs::read_dir(directory).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.map_err(failed("list", directory))?;
    let names = entries.into_iter().map(|entry| entry.file_name());
    Ok(names.filter_map(|name| name.into_string().ok()).collect())
}

fn write(path: &Path, text: &str) -> Result<(), DeviceError> {
    fs::write(path, text).map_err(failed("write to", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_below_finds_the_index_of_what_a_slot_holds() {
        let slot = tempfile::tempdir().expect("a directory");
        assert_eq!(interface_below(slot.path()).expect("reads"), None);
        let interface = slot.path().join("virtio3/net/eth0");
        fs::create_dir_all(&interface).expect("makes");
        fs::create_dir(slot.path().join("power")).expect("makes");
        fs::write(interface.join("ifindex"), "7\n").expect("writes");
        let found = interface_below(slot.path()).expect("reads");
        assert_eq!(found, Some(7));
    }
}
