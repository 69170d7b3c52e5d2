//! The guest's last kernel messages, in a range of its memory that it fills.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_devices::ramoops;

const ZONE: GuestAddress = GuestAddress(0x1000);
const ZONE_BYTES: usize = 0x4000;
/// "DBGC", with which a zone that was used begins.
const SIGNATURE: &[u8] = b"DBGC";

/// Tries one input: as it is, and with the signature in front.
pub fn run(data: &[u8]) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x5000)]).expect("memory");
    let signed = [SIGNATURE, data].concat();
    for zone in [data, &signed] {
        let length = zone.len().min(ZONE_BYTES);
        memory
            .write_slice(&zone[..length], ZONE)
            .expect("in memory");
        let lines = ramoops::last_lines(&memory, ZONE, ZONE_BYTES);
        let bytes: usize = lines.iter().map(String::len).sum();
        // With room for the rest of a control message.
        assert!(bytes <= 16 * 1024, "{bytes} bytes of log");
        let printable = |line: &String| line.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        assert!(lines.iter().all(printable), "{lines:?}");
        assert!(lines.iter().skip(1).all(|line| !line.is_empty()));
        // Beyond memory's end there is nothing.
        assert!(ramoops::last_lines(&memory, ZONE, 0x10_0000).is_empty());
    }
}
