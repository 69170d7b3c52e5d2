//! The guest's last kernel messages, which its pstore console keeps in a
//! reserved range of its memory (Linux's `fs/pstore/ram_core.c`).
//!
//! The zone is a header and a ring: `signature`, `start` (where the next byte
//! goes), `size` (bytes in use), each 32 bits, then the data. There is no error
//! correction. All of it is the guest's, so nothing in it is believed.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// `PERSISTENT_RAM_SIG`: "DBGC".
const SIGNATURE: u32 = 0x4347_4244;
/// Bytes of the header.
const HEADER_BYTES: usize = 12;
/// Lines that are given.
const LINES: usize = 20;
/// Longest line that is given, in bytes; what follows is cut. Keeps an event
/// below the limit of a control message, whatever the guest writes.
const LINE_BYTES: usize = 400;

/// What Linux prints first when it panics; a stack trace longer than [`LINES`]
/// may follow.
const PANIC: &str = "Kernel panic - not syncing";

/// Reads the guest's last lines from a zone of `bytes` at `zone`, oldest first:
/// printable ASCII only, at most 20 of 400 bytes. If it panicked, the line that
/// says so is the first, and those after it follow: it may be long before the
/// last. Empty when the guest wrote none, or has put nonsense there.
pub fn last_lines(memory: &GuestMemoryMmap, zone: GuestAddress, bytes: usize) -> Vec<String> {
    let mut copy = vec![0; bytes];
    match memory.read_slice(&mut copy, zone) {
        Ok(()) => parse(&copy),
        Err(_) => Vec::new(),
    }
}

fn parse(zone: &[u8]) -> Vec<String> {
    let text = unroll(zone).unwrap_or_default();
    let lines: Vec<_> = text
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .collect();
    let last = lines.len().saturating_sub(LINES);
    let panic = lines.iter().position(|line| is_panic(&printable(line)));
    let chosen = lines.into_iter().skip(panic.unwrap_or(last)).take(LINES);
    chosen.map(printable).collect()
}

/// Whether a line is that with which a kernel says that it panics.
pub fn is_panic(line: &str) -> bool {
    line.contains(PANIC)
}

/// The ring's bytes in the order in which they were written.
fn unroll(zone: &[u8]) -> Option<Vec<u8>> {
    let (header, data) = zone.split_at_checked(HEADER_BYTES)?;
    let field = |index: usize| {
        let bytes = header.get(index * 4..index * 4 + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let (signature, start, size) = (field(0)?, field(1)? as usize, field(2)? as usize);
    if signature != SIGNATURE || size > data.len() || start > size {
        return None;
    }
    let (newer, older) = data[..size].split_at(start);
    Some([older, newer].concat())
}

/// A line that cannot move a terminal's cursor or hide text: whoever reads it
/// did not choose to run what the guest prints.
fn printable(line: &[u8]) -> String {
    line.iter()
        .take(LINE_BYTES)
        .map(|&byte| match byte {
            b'\t' => ' ',
            b' '..=b'~' => byte.into(),
            _ => '?',
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ring(start: u32, size: u32, data: &[u8]) -> Vec<u8> {
        let mut zone = Vec::new();
        for field in [SIGNATURE, start, size] {
            zone.extend(field.to_le_bytes());
        }
        zone.extend(data);
        zone
    }

    /// The zone of a guest that wrote this.
    fn zone(log: &str) -> Vec<u8> {
        let length = log.len() as u32;
        ring(length, length, log.as_bytes())
    }

    #[test]
    fn parse_ring_that_wrapped_gives_oldest_first() {
        let lines = parse(&ring(6, 16, b"third\nfirst\nsec\n"));
        assert_eq!(lines, ["first", "sec", "third"]);
    }

    #[test]
    fn parse_ring_not_yet_full_gives_what_was_written() {
        let lines = parse(&ring(8, 8, b"one\ntwo\n\0\0\0\0"));
        assert_eq!(lines, ["one", "two"]);
    }

    #[test]
    fn parse_many_lines_gives_the_last() {
        let lines: Vec<_> = (0..100).map(|line| format!("line {line}\n")).collect();
        let lines = parse(&zone(&lines.concat()));
        assert_eq!(lines.len(), LINES);
        assert_eq!(lines.last().map(String::as_str), Some("line 99"));
    }

    #[test]
    fn parse_panic_gives_it_first_and_what_came_after() {
        let mut lines = vec!["before\n".to_owned(); 30];
        lines.push("Kernel panic - not syncing: sysrq\n".to_owned());
        // As it ends: whether a long trace follows, or next to nothing.
        for trace in [40, 1] {
            let mut lines = lines.clone();
            lines.extend(vec!["trace\n".to_owned(); trace]);
            lines.push("---[ end Kernel panic - not syncing: sysrq ]---\n".to_owned());
            let given = parse(&zone(&lines.concat()));
            assert_eq!(given.len(), LINES.min(trace + 2));
            assert_eq!(given[0], "Kernel panic - not syncing: sysrq");
            assert_eq!(given[1], "trace");
        }
    }

    #[test]
    fn parse_without_signature_gives_nothing() {
        assert_eq!(parse(&[0; 64]), Vec::<String>::new());
    }

    #[test]
    fn parse_escape_sequence_is_made_harmless() {
        assert_eq!(parse(&zone("\x1b[2J\n")), ["?[2J"]);
    }

    proptest! {
        #[test]
        fn parse_any_bytes_gives_few_short_printable_lines(
            signed: bool,
            start: u32,
            size: u32,
            near in any::<prop::sample::Index>(),
            data in proptest::collection::vec(any::<u8>(), 0..4096),
        ) {
            let small = near.index(data.len() + 2) as u32;
            for (start, size) in [(start, size), (start % (small + 1), small), (small, small)] {
                let mut zone = ring(start, size, &data);
                if !signed {
                    zone[0] ^= 0xff;
                }
                let lines = parse(&zone);
                prop_assert!(lines.len() <= LINES);
                prop_assert!(signed || lines.is_empty());
                for line in lines {
                    prop_assert!(line.len() <= LINE_BYTES);
                    prop_assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
                }
            }
        }

        #[test]
        fn parse_any_short_zone_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..16)) {
            let _ = parse(&bytes);
        }
    }
}
