//! A container's figures as the contract has them.

use agent_container::{Figures, HugePages, Keyed, Pressure, Waiting};
use agent_protocol::api::{
    CpuStat, HugeTlbStat, IoEntry, IoStat, MemoryEvents, MemoryStat, Metrics, PidsStat, PsiData,
    PsiStats,
};
use protobuf::MessageField;

/// Every field that the guest's kernel has a figure for.
pub fn metrics(figures: &Figures) -> Metrics {
    Metrics {
        pids: MessageField::some(PidsStat {
            current: figures.pids,
            limit: figures.pids_limit,
            ..PidsStat::default()
        }),
        cpu: MessageField::some(cpu(figures)),
        memory: MessageField::some(memory(figures)),
        io: MessageField::some(io(figures)),
        hugetlb: figures.huge_pages.iter().map(huge_pages).collect(),
        memory_events: MessageField::some(memory_events(&figures.memory_events)),
        ..Metrics::default()
    }
}

fn cpu(figures: &Figures) -> CpuStat {
    let of = |key| figures.cpu.of(key);
    CpuStat {
        usage_usec: of("usage_usec"),
        user_usec: of("user_usec"),
        system_usec: of("system_usec"),
        nr_periods: of("nr_periods"),
        nr_throttled: of("nr_throttled"),
        throttled_usec: of("throttled_usec"),
        nr_bursts: of("nr_bursts"),
        burst_usec: of("burst_usec"),
        psi: pressure(figures.cpu_pressure),
        ..CpuStat::default()
    }
}

fn memory(figures: &Figures) -> MemoryStat {
    let of = |key: &str| figures.memory.of(key);
    // Linux 5.9 split these in two; containerd's names are the old ones.
    let both = |key: &str| {
        let [anon, file] = ["anon", "file"].map(|kind| of(&format!("{key}_{kind}")));
        of(key) + anon + file
    };
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: both("workingset_refault"),
        workingset_activate: both("workingset_activate"),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: figures.memory_usage,
        usage_limit: figures.memory_limit,
        swap_usage: figures.swap_usage,
        swap_limit: figures.swap_limit,
        max_usage: figures.memory_peak,
        swap_max_usage: figures.swap_peak,
        psi: pressure(figures.memory_pressure),
        ..MemoryStat::default()
    }
}

fn memory_events(events: &Keyed) -> MemoryEvents {
    MemoryEvents {
        low: events.of("low"),
        high: events.of("high"),
        max: events.of("max"),
        oom: events.of("oom"),
        oom_kill: events.of("oom_kill"),
        oom_group_kill: events.of("oom_group_kill"),
        ..MemoryEvents::default()
    }
}

fn io(figures: &Figures) -> IoStat {
    let entries = figures.devices.iter().map(|device| IoEntry {
        major: device.major,
        minor: device.minor,
        rbytes: device.counts.of("rbytes"),
        wbytes: device.counts.of("wbytes"),
        rios: device.counts.of("rios"),
        wios: device.counts.of("wios"),
        ..IoEntry::default()
    });
    IoStat {
        usage: entries.collect(),
        psi: pressure(figures.io_pressure),
        ..IoStat::default()
    }
}

fn huge_pages(pages: &HugePages) -> HugeTlbStat {
    HugeTlbStat {
        current: pages.current,
        max: pages.max,
        pagesize: pages.page_size.clone(),
        failcnt: pages.failures,
        ..HugeTlbStat::default()
    }
}

fn pressure(pressure: Option<Pressure>) -> MessageField<PsiStats> {
    let pressure = pressure.map(|pressure| PsiStats {
        some: MessageField::some(waiting(pressure.some)),
        full: MessageField::some(waiting(pressure.full)),
        ..PsiStats::default()
    });
    MessageField(pressure.map(Box::new))
}

fn waiting(waiting: Waiting) -> PsiData {
    PsiData {
        avg10: waiting.avg10,
        avg60: waiting.avg60,
        avg300: waiting.avg300,
        total: waiting.total,
        ..PsiData::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::Message;

    #[test]
    fn metrics_encoding_has_the_field_numbers_of_containerd() {
        let figures = Figures {
            pids: 5,
            memory_peak: 6,
            huge_pages: vec![HugePages {
                page_size: "2MB".to_owned(),
                current: 1,
                max: 2,
                failures: 3,
            }],
            ..Figures::default()
        };
        let bytes = metrics(&figures).write_to_bytes().expect("encodes");
        // io.containerd.cgroups.v2: pids = 1 { current = 1 }, memory = 4 {
        // max_usage = 36 }, hugetlb = 7 { current, max, pagesize, failcnt }; what
        // is empty is there as an empty message: cpu = 2, io = 6, events = 8.
        let expected: [&[u8]; 6] = [
            &[0x0a, 2, 0x08, 5],
            &[0x12, 0],
            &[0x22, 3, 0xa0, 0x02, 6],
            &[0x32, 0],
            &[
                0x3a, 11, 0x08, 1, 0x10, 2, 0x1a, 3, b'2', b'M', b'B', 0x20, 3,
            ],
            &[0x42, 0],
        ];
        assert_eq!(bytes, expected.concat());
    }
}
