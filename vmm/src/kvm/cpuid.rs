//! What the guest's CPUs say that they are. docs/cpuid.md gives the policy leaf
//! by leaf, with the reasons; this is its implementation.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaves that are not passed at all: monitoring, performance counters, cache
/// allocation, SGX, processor trace, nested virtualisation, memory encryption,
/// and topologies that are computed elsewhere.
const HIDDEN: [u32; 16] = [
    0x5,
    0xa,
    0xf,
    0x10,
    0x12,
    0x14,
    0x1b,
    0x1c,
    0x1f,
    0x23,
    0x8000_000a,
    0x8000_001b,
    0x8000_001f,
    0x8000_0020,
    0x8000_0022,
    0x8000_0026,
];
/// Extended topology (Intel SDM vol. 2A, CPUID leaf 0BH; AMD APM vol. 3
/// appendix E.4.8).
const TOPOLOGY: u32 = 0xb;

/// A bit of a register.
const fn bit(number: u32) -> u32 {
    1 << number
}

/// CPUID of the vCPU with this APIC id in a machine of `max` vCPUs, each a core
/// of its own in one package. `supported` is what this KVM can offer.
pub fn for_vcpu(
    supported: &[kvm_cpuid_entry2],
    apic_id: u8,
    max: u8,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let vcpu = Topology {
        apic_id: apic_id.into(),
        max: max.into(),
    };
    let highest_basic = supported
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |entry| entry.eax);
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| entry.function != TOPOLOGY && !HIDDEN.contains(&entry.function))
        .map(|entry| {
            let mut entry = *entry;
            vcpu.apply(&mut entry, tsc_deadline);
            entry
        })
        .collect();
    if highest_basic >= TOPOLOGY {
        entries.extend(vcpu.levels());
    }
    entries
}

/// The same, as KVM takes it.
pub fn table(entries: &[kvm_cpuid_entry2]) -> Option<CpuId> {
    CpuId::from_entries(entries).ok()
}

struct Topology {
    apic_id: u32,
    max: u32,
}

impl Topology {
    /// Bits of the APIC id that number the vCPUs of the package.
    fn id_bits(&self) -> u32 {
        self.max.next_power_of_two().trailing_zeros()
    }

    fn apply(&self, entry: &mut kvm_cpuid_entry2, tsc_deadline: bool) {
        match entry.function {
            0x1 => self.features(entry, tsc_deadline),
            // Caches: all but the last level belong to one core.
            0x4 | 0x8000_001d => self.cache(entry),
            // Structured extended features: no SGX (EBX 2, ECX 30), no processor trace (EBX 25), no
            // resource monitoring and allocation (EBX 12 and 15).
            0x7 if entry.index == 0 => {
                entry.ebx &= !(bit(2) | bit(12) | bit(15) | bit(25));
                entry.ecx &= !bit(30);
            }
            // AMD features: no SVM (2), IBS (10), core (23), northbridge (24) and last-level cache
            // (28) counters; ECX 1 tells old software about cores.
            0x8000_0001 => {
                entry.ecx &= !(bit(2) | bit(10) | bit(23) | bit(24) | bit(28));
                if self.max > 1 {
                    entry.ecx |= bit(1);
                }
            }
            // Sizes: ECX 7:0 is cores - 1, 15:12 the bits of the APIC id.
            0x8000_0008 => entry.ecx = (self.id_bits() << 12) | (self.max - 1),
            // Extended APIC id, core id with one thread each, node 0 of 1.
            0x8000_001e => {
                entry.eax = self.apic_id;
                entry.ebx = self.apic_id;
                entry.ecx = 0;
                entry.edx = 0;
            }
            _ => {}
        }
    }

    fn features(&self, entry: &mut kvm_cpuid_entry2, tsc_deadline: bool) {
        // EBX: 31:24 initial APIC id, 23:16 addressable ids in the package; CLFLUSH stays.
        entry.ebx = (entry.ebx & 0xffff) | (self.apic_id << 24) | ((1 << self.id_bits()) << 16);
        // No debug store (2), MONITOR (3), VMX (5), performance capabilities (15).
        entry.ecx &= !(bit(2) | bit(3) | bit(5) | bit(15));
        // A hypervisor is present (31).
        entry.ecx |= bit(31);
        // KVM emulates the TSC deadline timer (24) but reports it by a capability only. Without it
        // and without a PIT the guest would have nothing to calibrate its timer by.
        if tsc_deadline {
            entry.ecx |= bit(24);
        }
        // No debug store (21).
        entry.edx &= !bit(21);
        if self.max > 1 {
            // The field with addressable ids is valid (28).
            entry.edx |= bit(28);
        } else {
            entry.edx &= !bit(28);
        }
    }

    fn cache(&self, entry: &mut kvm_cpuid_entry2) {
        // EAX 4:0 is the type, 0 at the end of the list; 7:5 the level.
        let (kind, level) = (entry.eax & 0x1f, (entry.eax >> 5) & 0x7);
        if kind == 0 {
            return;
        }
        let ids = (1 << self.id_bits()) - 1;
        let shared_by = if level >= 3 { ids } else { 0 };
        entry.eax = (entry.eax & !(0xfff << 14)) | (shared_by << 14);
        if entry.function == 0x4 {
            // 31:26 are the ids of cores in the package - 1.
            entry.eax = (entry.eax & !(0x3f << 26)) | (ids.min(0x3f) << 26);
        }
    }

    /// The levels of leaf 0xb: thread, core, and the one that ends the list.
    fn levels(&self) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, shift: u32, logical: u32, type_: u32| kvm_cpuid_entry2 {
            function: TOPOLOGY,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: logical,
            ecx: (type_ << 8) | index,
            edx: self.apic_id,
            ..Default::default()
        };
        [
            level(0, 0, 1, 1),
            level(1, self.id_bits(), self.max, 2),
            level(2, 0, 0, 0),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn with_highest(highest: u32, others: &[u32]) -> Vec<kvm_cpuid_entry2> {
        let mut first = entry(0, 0);
        first.eax = highest;
        std::iter::once(first)
            .chain(others.iter().map(|&function| entry(function, 0)))
            .collect()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .expect("leaf is there")
    }

    #[test]
    fn for_vcpu_sets_the_deadline_timer_that_kvm_does_not_report() {
        let mut supported = with_highest(1, &[1]);
        supported[1].ecx = 0;
        let with = for_vcpu(&supported, 0, 1, true);
        let without = for_vcpu(&supported, 0, 1, false);
        assert_eq!(find(&with, 1, 0).ecx & bit(24), bit(24));
        assert_eq!(find(&without, 1, 0).ecx & bit(24), 0);
    }

    #[test]
    fn for_vcpu_hides_nested_virtualisation_and_counters() {
        let entries = for_vcpu(
            &with_highest(0x23, &[1, 0xa, 0x8000_0001, 0x8000_000a]),
            0,
            1,
            true,
        );
        assert_eq!(find(&entries, 1, 0).ecx & bit(5), 0, "VMX");
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx & bit(2), 0, "SVM");
        assert!(!entries.iter().any(|entry| HIDDEN.contains(&entry.function)));
    }

    #[test]
    fn for_vcpu_on_a_host_without_leaf_b_adds_none() {
        let entries = for_vcpu(&with_highest(7, &[1]), 0, 4, true);
        assert!(!entries.iter().any(|entry| entry.function == TOPOLOGY));
    }

    proptest! {
        #[test]
        fn for_vcpu_any_size_numbers_the_vcpus_the_same_in_every_leaf(max in 1u8..=64, id in 0u8..64) {
            let id = id % max;
            let supported = with_highest(0x1f, &[1, 4, 0xb, 0x8000_0008, 0x8000_001e]);
            let entries = for_vcpu(&supported, id, max, true);
            prop_assert_eq!(find(&entries, 1, 0).ebx >> 24, u32::from(id));
            prop_assert_eq!(find(&entries, 0xb, 0).edx, u32::from(id));
            prop_assert_eq!(find(&entries, 0x8000_001e, 0).eax, u32::from(id));
            let bits = find(&entries, 0xb, 1).eax;
            prop_assert!(1u32 << bits >= u32::from(max));
            prop_assert_eq!(find(&entries, 0x8000_0008, 0).ecx >> 12, bits);
            prop_assert_eq!((find(&entries, 1, 0).ebx >> 16) & 0xff, 1 << bits);
            prop_assert_eq!(find(&entries, 0xb, 1).ebx, u32::from(max));
        }
    }
}
