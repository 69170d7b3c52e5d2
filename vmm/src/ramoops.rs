//! The guest's last kernel messages, which its pstore console keeps in a
//! reserved range of its memory (Linux's `fs/pstore/ram_core.c`).
//!
//! The zone is a header and a ring: `signature`, `start` (where the next byte
//! goes), `size` (bytes in use), each 32 bits, then the data. There is no error
//! correction. All of it is the guest's, so nothing in it is believed.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::layout::{RAMOOPS, RAMOOPS_SIZE};

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
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// Lines before it that are given too: what led to it.
const LINES_BEFORE_PANIC: usize = 5;

/// Reads the guest's last lines, oldest first: printable ASCII only. If it
/// panicked, the lines around that. Empty when the guest wrote none, or has put
/// nonsense there.
pub fn last_lines(memory: &GuestMemoryMmap) -> Vec<String> {
    let mut zone = vec![0; RAMOOPS_SIZE as usize];
    match memory.read_slice(&mut zone, GuestAddress(RAMOOPS)) {
        Ok(()) => parse(&zone),
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
    let first = match lines.iter().position(|line| contains(line, PANIC)) {
        Some(panic) => panic.saturating_sub(LINES_BEFORE_PANIC).min(last),
        None => last,
    };
    let chosen = lines.into_iter().skip(first).take(LINES);
    chosen.map(printable).collect()
}

fn contains(line: &[u8], text: &[u8]) -> bool {
    line.windows(text.len()).any(|window| window == text)
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

    fn zone(start: u32, size: u32, data: &[u8]) -> Vec<u8> {
        let mut zone = Vec::new();
        for field in [SIGNATURE, start, size] {
            zone.extend(field.to_le_bytes());
        }
        zone.extend(data);
        zone
    }

    #[test]
    fn parse_ring_that_wrapped_gives_oldest_first() {
        let lines = parse(&zone(6, 16, b"third\nfirst\nsec\n"));
        assert_eq!(lines, ["first", "sec", "third"]);
    }

    #[test]
    fn parse_ring_not_yet_full_gives_what_was_written() {
        let lines = parse(&zone(8, 8, b"one\ntwo\n\0\0\0\0"));
        assert_eq!(lines, ["one", "two"]);
    }

    #[test]
    fn parse_many_lines_gives_the_last() {
        let lines: Vec<_> = (0..100).map(|line| format!("line {line}\n")).collect();
        let text = lines.concat();
        let lines = parse(&zone(text.len() as u32, text.len() as u32, text.as_bytes()));
        assert_eq!(lines.len(), LINES);
        assert_eq!(lines.last().map(String::as_str), Some("line 99"));
    }

    #[test]
    fn parse_panic_with_a_long_trace_gives_the_panic() {
        let mut lines = vec!["before\n".to_owned(); 30];
        lines.push("Kernel panic - not syncing: sysrq\n".to_owned());
        lines.extend(vec!["trace\n".to_owned(); 40]);
        let text = lines.concat();
        let given = parse(&zone(text.len() as u32, text.len() as u32, text.as_bytes()));
        assert_eq!(given.len(), LINES);
        assert_eq!(given[LINES_BEFORE_PANIC - 1], "before");
        assert_eq!(
            given[LINES_BEFORE_PANIC],
            "Kernel panic - not syncing: sysrq"
        );
    }

    #[test]
    fn parse_without_signature_gives_nothing() {
        assert_eq!(parse(&[0; 64]), Vec::<String>::new());
    }

    #[test]
    fn parse_escape_sequence_is_made_harmless() {
        assert_eq!(parse(&zone(5, 5, b"\x1b[2J\n")), ["?[2J"]);
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
                let mut zone = zone(start, size, &data);
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
