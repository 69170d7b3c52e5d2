//! Guest memory: where it is, and what the guest is told about it.

use linux_loader::loader::elf::start_info::hvm_memmap_table_entry;
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_config::Memory;

use crate::layout::{HIGH_RAM, HOLE_END, HOLE_START, PLUG_ALIGNMENT, RAMOOPS};
use crate::log::log;

/// Memory that the host refuses.
#[derive(Debug, Error)]
#[error("cannot map {size_mib} MiB of guest memory: check the host's limits on address space")]
pub struct MemoryError {
    size_mib: u32,
    #[source]
    source: vm_memory::mmap::FromRangesError,
}

/// Linux adds memory in blocks of 128 MiB, of which it may use a part: a region that
/// ends within one could not be used to its end.
const PLUG_GRANULARITY: u64 = 128 << 20;

/// A stretch of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First address.
    pub start: u64,
    /// Bytes; never 0.
    pub size: u64,
}

impl Span {
    /// First address after it.
    pub fn end(self) -> u64 {
        self.start + self.size
    }
}

/// Where RAM of this size lies: one span below the hole and, if it does not
/// fit there, a second above it.
pub fn ram_spans(memory: Memory) -> Vec<Span> {
    let bytes = u64::from(memory.size_mib) << 20;
    let below = bytes.min(HOLE_START);
    let mut spans = vec![Span {
        start: 0,
        size: below,
    }];
    if bytes > below {
        spans.push(Span {
            start: HOLE_END,
            size: bytes - below,
        });
    }
    spans
}

/// Where the memory is that may be plugged later, if there may be any: behind all
/// RAM, and above the hole.
pub fn plug_span(memory: Memory) -> Option<Span> {
    let bytes = u64::from(memory.max_mib - memory.size_mib) << 20;
    let ram_end = ram_spans(memory).last().map_or(0, |span| span.end());
    (bytes > 0).then(|| Span {
        start: ram_end.max(HOLE_END).next_multiple_of(PLUG_ALIGNMENT),
        size: bytes.next_multiple_of(PLUG_GRANULARITY),
    })
}

/// Maps guest memory: anonymous and private, one mapping per span of RAM, and one for
/// all that may be plugged. Nothing is allocated before the guest touches it. Where
/// the host does not let so much be promised, there is only the RAM.
///
/// # Errors
/// When the host refuses that too.
pub fn map(memory: Memory) -> Result<GuestMemoryMmap, MemoryError> {
    let range = |span: Span| (GuestAddress(span.start), span.size as usize);
    let mut ranges: Vec<_> = ram_spans(memory).into_iter().map(range).collect();
    if let Some(span) = plug_span(memory) {
        ranges.push(range(span));
        match GuestMemoryMmap::from_ranges(&ranges) {
            Ok(mapped) => return Ok(mapped),
            Err(error) => log(&format!(
                "the VM's memory cannot grow: the host does not map {} MiB for that ({error}): check vm.overcommit_memory",
                span.size >> 20
            )),
        }
        ranges.pop();
    }
    GuestMemoryMmap::from_ranges(&ranges).map_err(|source| MemoryError {
        size_mib: memory.size_mib,
        source,
    })
}

/// `XEN_HVM_MEMMAP_TYPE_RAM`: the types are those of the BIOS's e820 call.
const TYPE_RAM: u32 = 1;
/// `XEN_HVM_MEMMAP_TYPE_RESERVED`.
const TYPE_RESERVED: u32 = 2;

/// The memory map that the guest is given: all RAM, less what lies between the
/// ramoops area and 1 MiB.
pub fn map_for_guest(memory: Memory) -> Vec<hvm_memmap_table_entry> {
    let entry = |start: u64, end: u64, type_| hvm_memmap_table_entry {
        addr: start,
        size: end - start,
        type_,
        reserved: 0,
    };
    let mut entries = vec![
        entry(0, RAMOOPS, TYPE_RAM),
        entry(RAMOOPS, HIGH_RAM, TYPE_RESERVED),
    ];
    for span in ram_spans(memory) {
        entries.push(entry(span.start.max(HIGH_RAM), span.end(), TYPE_RAM));
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmm_config::{MAX_MEMORY_MIB, MIN_MEMORY_MIB};

    const HOLE_START_MIB: u32 = (HOLE_START >> 20) as u32;

    /// Sizes of which many are at the hole.
    fn sizes() -> impl Strategy<Value = Memory> {
        prop_oneof![
            MIN_MEMORY_MIB..=MAX_MEMORY_MIB,
            HOLE_START_MIB - 2..=HOLE_START_MIB + 2,
        ]
        .prop_flat_map(|size_mib| {
            let most = prop_oneof![Just(size_mib), size_mib..=MAX_MEMORY_MIB];
            most.prop_map(move |max_mib| Memory { size_mib, max_mib })
        })
    }

    #[test]
    fn ram_spans_of_exactly_the_hole_start_is_one() {
        let memory = Memory {
            size_mib: HOLE_START_MIB,
            max_mib: HOLE_START_MIB,
        };
        assert_eq!(
            ram_spans(memory),
            [Span {
                start: 0,
                size: HOLE_START
            }]
        );
    }

    proptest! {
        #[test]
        fn ram_spans_any_size_add_up_and_keep_out_of_the_hole(memory in sizes()) {
            let spans = ram_spans(memory);
            let total: u64 = spans.iter().map(|span| span.size).sum();
            prop_assert_eq!(total, u64::from(memory.size_mib) << 20);
            for span in spans {
                prop_assert!(span.size > 0);
                prop_assert!(span.end() <= HOLE_START || span.start >= HOLE_END);
            }
        }

        #[test]
        fn plug_span_any_size_lies_behind_all_ram_and_has_room(memory in sizes()) {
            let Some(span) = plug_span(memory) else {
                prop_assert_eq!(memory.size_mib, memory.max_mib);
                return Ok(());
            };
            for ram in ram_spans(memory) {
                prop_assert!(ram.end() <= span.start);
            }
            prop_assert!(span.start >= HOLE_END);
            prop_assert!(span.size >> 20 >= u64::from(memory.max_mib - memory.size_mib));
            for number in [span.start, span.size] {
                prop_assert!(number.is_multiple_of(vmm_devices::Mem::BLOCK_BYTES));
            }
        }

        #[test]
        fn map_for_guest_any_size_is_sorted_without_overlap_or_empty_entry(memory in sizes()) {
            let entries = map_for_guest(memory);
            for entry in &entries {
                prop_assert!(entry.size > 0);
            }
            for pair in entries.windows(2) {
                prop_assert!(pair[0].addr + pair[0].size <= pair[1].addr);
            }
            let told: u64 = entries.iter().map(|entry| entry.size).sum();
            prop_assert_eq!(told, u64::from(memory.size_mib) << 20);
        }
    }
}
