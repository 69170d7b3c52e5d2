//! How large a VM is.

use tracing::warn;
use vmm_config::{MAX_MEMORY_MIB, MAX_VCPUS, Memory, Vcpus};

use super::limits::Limits;
use crate::spec::Membership;

/// Memory of a pod that nobody limits.
pub const DEFAULT_MEMORY_MIB: u32 = 512;
/// Least memory of a pod, however little its container may have: the guest's
/// kernel, the initial file system while it is unpacked, and the agent.
const MIN_MEMORY_MIB: u32 = 128;
/// What of its memory the guest keeps from containers: some 16 MiB of kernel, 32
/// that the agent reserves, and room for what both need while they run.
const OVERHEAD_MIB: u64 = 64;
/// The kernel describes each page of 4096 bytes by a structure of 64.
const PAGE_STRUCTURES: u64 = 64;

/// By how much a VM can grow, which costs nothing until it does: with more, the
/// steps in which it grows would become coarse.
const GROWTH_MIB: u32 = 32 * 1024;
/// Up to how many vCPUs a small VM can grow; a larger one can double. The guest keeps
/// some memory for each, whether or not it is there.
const GROWTH_VCPUS: u8 = 8;
/// What a pod takes of the host's memory beside its VM's: the shim, the monitor,
/// the file server, and what the host's kernel keeps for them.
const HOST_OVERHEAD_MIB: u64 = 64;
/// The least that a pod takes of it. As the overhead of its containers' limits, this
/// suffices up to limits of 4 GiB.
const LEAST_GRANT_MIB: u64 = MIN_MEMORY_MIB as u64 + HOST_OVERHEAD_MIB;

const MIB: u64 = 1 << 20;

/// Memory that the containers of a pod can take which nobody limits, at most.
pub const UNLIMITED_POD_BYTES: u64 = (DEFAULT_MEMORY_MIB as u64 - OVERHEAD_MIB) * MIB;

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Processors that this process may use.
    pub cpus: u64,
    /// Its memory.
    pub memory_bytes: u64,
}

impl Host {
    /// This host.
    pub fn this() -> Self {
        let affinity = rustix::thread::sched_getaffinity(None);
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self {
            cpus: affinity.map_or(1, |cpus| u64::from(cpus.count())),
            memory_bytes: total_bytes(&memory).unwrap_or(u64::MAX),
        }
    }
}

fn total_bytes(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let line = lines.find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The memory that a pod is granted on the host holds no VM at all.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the cgroups above the pod's grant it {granted_mib} MiB of the host's memory, and it takes {LEAST_GRANT_MIB} MiB at least: raise its memory limit, or set overhead.podFixed.memory of its RuntimeClass to {LEAST_GRANT_MIB}Mi"
)]
pub struct TooLittle {
    granted_mib: u64,
}

/// The size of a pod's VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Virtual processors.
    pub vcpus: Vcpus,
    /// Guest memory.
    pub memory: Memory,
}

impl Size {
    /// For a pod that is limited so, and that is `granted` so much of the host's
    /// memory, if that is limited.
    ///
    /// # Errors
    /// When a VM does not fit into that.
    pub fn of(
        limits: Limits,
        membership: &Membership,
        host: Host,
        granted_bytes: Option<u64>,
    ) -> Result<Self, TooLittle> {
        let limited = memory_mib(limits.memory_bytes, host.memory_bytes);
        let wanted = match membership {
            Membership::Alone => limited,
            // Containers without a limit count as nothing in a pod's.
            Membership::Sandbox | Membership::Member { .. } => limited.max(DEFAULT_MEMORY_MIB),
        };
        let size_mib = match granted_bytes {
            Some(bytes) => within_grant(wanted, bytes)?,
            None => wanted,
        };
        if size_mib < limited && limits.memory_bytes.is_some() {
            warn!(
                "the VM has {size_mib} MiB of memory instead of the {limited} MiB that its containers' limits take, because the cgroups above the pod's grant no more: set overhead.podFixed.memory of its RuntimeClass {} MiB higher",
                limited - size_mib
            );
        }
        let host_mib = u32::try_from(host.memory_bytes / MIB).unwrap_or(u32::MAX);
        let most = host_mib.min(wanted.saturating_add(GROWTH_MIB));
        let vcpus = vcpus(limits.millicpus(), limits.last_cpu, host);
        Ok(Self {
            vcpus: Vcpus {
                boot: vcpus,
                max: most_vcpus(vcpus, host),
            },
            memory: Memory {
                size_mib,
                max_mib: most.clamp(size_mib, MAX_MEMORY_MIB),
            },
        })
    }
}

/// As many as can be used at once, and those that are pinned to.
pub fn vcpus(millicpus: Option<u64>, last_cpu: Option<u64>, host: Host) -> u8 {
    let pinned = last_cpu.map_or(1, |last| last.saturating_add(1));
    let used = millicpus.map_or(1, |millis| millis.div_ceil(1000));
    let count = pinned.max(used).min(host.cpus);
    u8::try_from(count).map_or(MAX_VCPUS, |count| count.clamp(1, MAX_VCPUS))
}

/// As many as such a VM may get later.
fn most_vcpus(booted: u8, host: Host) -> u8 {
    let host = u8::try_from(host.cpus).unwrap_or(MAX_VCPUS);
    host.min(booted.saturating_mul(2).max(GROWTH_VCPUS))
        .min(MAX_VCPUS)
        .max(booted)
}

/// Memory of a VM whose containers may take this much together.
pub fn memory_mib(limit_bytes: Option<u64>, host_bytes: u64) -> u32 {
    let Some(bytes) = limit_bytes else {
        return DEFAULT_MEMORY_MIB;
    };
    // A limit that the host could never reach limits nothing.
    let most = (host_bytes / MIB).max(MIN_MEMORY_MIB.into());
    let whole = with_overhead(bytes).min(most).max(MIN_MEMORY_MIB.into());
    u32::try_from(whole).map_or(MAX_MEMORY_MIB, |whole| whole.min(MAX_MEMORY_MIB))
}

/// With what the guest takes for itself, in MiB.
fn with_overhead(bytes: u64) -> u64 {
    let mib = bytes.div_ceil(MIB);
    mib.saturating_add(mib.div_ceil(PAGE_STRUCTURES))
        .saturating_add(OVERHEAD_MIB)
}

/// As much of it as is granted, of which the host's part is paid first.
///
/// # Errors
/// When that is too little for any VM.
pub fn within_grant(wanted_mib: u32, granted_bytes: u64) -> Result<u32, TooLittle> {
    let granted_mib = granted_bytes / MIB;
    if granted_mib < LEAST_GRANT_MIB {
        return Err(TooLittle { granted_mib });
    }
    let left = u32::try_from(granted_mib - HOST_OVERHEAD_MIB).unwrap_or(u32::MAX);
    Ok(wanted_mib.min(left))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const HOST: Host = Host {
        cpus: 4,
        memory_bytes: 8 << 30,
    };

    fn size(membership: &Membership, resources: &Value) -> (u8, u32) {
        let spec = json!({"linux": {"resources": resources}});
        size_of(&spec, membership)
    }

    fn size_of(spec: &Value, membership: &Membership) -> (u8, u32) {
        let size =
            Size::of(Limits::of_pod(spec, membership), membership, HOST, None).expect("fits");
        assert_eq!(size.vcpus.max, 4);
        assert!(size.memory.max_mib >= size.memory.size_mib);
        (size.vcpus.boot, size.memory.size_mib)
    }

    #[test]
    fn size_of_a_lone_container_fits_what_it_may_use() {
        let of = |resources: Value| size(&Membership::Alone, &resources);
        assert_eq!(of(json!({})), (1, 512));
        assert_eq!(
            of(json!({"memory": {"limit": 1 << 30}})),
            (1, 1024 + 16 + 64)
        );
        assert_eq!(of(json!({"memory": {"limit": 6 << 20}})), (1, 128));
        assert_eq!(of(json!({"memory": {"limit": -1}})), (1, 512));
        assert_eq!(of(json!({"memory": {"limit": 1_u64 << 60}})), (1, 8192));
        let quota = |quota, period| json!({"cpu": {"quota": quota, "period": period}});
        assert_eq!(of(quota(150_000, 100_000)).0, 2);
        assert_eq!(of(quota(50_000, 100_000)).0, 1);
        assert_eq!(of(quota(9_000_000, 100_000)).0, 4);
        assert_eq!(of(quota(-1, 100_000)).0, 1);
        assert_eq!(of(json!({"cpu": {"quota": 300_000}})).0, 3);
        assert_eq!(of(json!({"cpu": {"cpus": "0,2"}})).0, 3);
        assert_eq!(of(json!({"cpu": {"cpus": "1-3"}})).0, 4);
    }

    #[test]
    fn size_of_a_pod_is_not_that_of_its_sandbox_container() {
        let resources = json!({"memory": {"limit": 1 << 30}, "cpu": {"quota": 300_000}});
        assert_eq!(size(&Membership::Sandbox, &resources), (1, 512));
    }

    #[test]
    fn size_of_a_pod_fits_what_the_kubelet_says_of_it() {
        let of = |quota: &str, period: &str, memory: &str| {
            let spec = json!({"annotations": {
                "io.kubernetes.cri.sandbox-cpu-quota": quota,
                "io.kubernetes.cri.sandbox-cpu-period": period,
                "io.kubernetes.cri.sandbox-memory": memory,
            }});
            size_of(&spec, &Membership::Sandbox)
        };
        assert_eq!(of("250000", "100000", "1073741824"), (3, 1024 + 16 + 64));
        assert_eq!(of("0", "0", "0"), (1, 512));
        assert_eq!(of("-1", "100000", "much"), (1, 512));
        assert_eq!(of("150000", "0", "0").0, 2);
    }

    #[test]
    fn size_of_a_pod_leaves_room_for_containers_without_limits() {
        for bytes in (0..1024 * MIB).step_by(MIB as usize) {
            let spec =
                json!({"annotations": {"io.kubernetes.cri.sandbox-memory": bytes.to_string()}});
            let (_, mib) = size_of(&spec, &Membership::Sandbox);
            assert!(mib >= DEFAULT_MEMORY_MIB, "{mib} MiB for {bytes}");
            assert!(u64::from(mib) * MIB >= bytes + OVERHEAD_MIB * MIB);
        }
    }

    #[test]
    fn size_within_a_grant_leaves_the_host_its_part_or_is_refused_with_the_figure() {
        let limits = Limits::default();
        let of = |granted_mib: u64| {
            Size::of(limits, &Membership::Sandbox, HOST, Some(granted_mib * MIB))
        };
        assert_eq!(of(4096).expect("fits").memory.size_mib, 512);
        assert_eq!(of(512).expect("fits").memory.size_mib, 512 - 64);
        assert_eq!(of(192).expect("fits").memory.size_mib, 128);
        let refused = of(191).expect_err("is too little").to_string();
        assert!(
            refused.contains("191 MiB") && refused.contains("192Mi"),
            "{refused}"
        );
        // The kubelet may grant more later.
        assert_eq!(of(512).expect("fits").memory.max_mib, 8192);
    }

    #[test]
    fn host_has_processors_and_memory() {
        let host = Host::this();
        assert!(host.cpus > 0 && host.memory_bytes > 64 * MIB, "{host:?}");
        assert!(host.memory_bytes < u64::MAX, "{host:?}");
    }

    proptest! {
        #[test]
        fn size_for_any_limits_is_a_vm(
            limit: i64, quota: i64, period: i64, cpus: String, memory_bytes: u64, count: u64,
        ) {
            let spec = json!({"linux": {"resources": {
                "memory": {"limit": limit},
                "cpu": {"quota": quota, "period": period, "cpus": cpus},
            }}});
            let host = Host { cpus: count, memory_bytes };
            let alone = Membership::Alone;
            let size = Size::of(Limits::of_pod(&spec, &alone), &alone, host, None);
            let size = size.expect("nothing is granted");
            prop_assert!((1..=MAX_VCPUS).contains(&size.vcpus.boot));
            prop_assert!((size.vcpus.boot..=MAX_VCPUS).contains(&size.vcpus.max));
            prop_assert!((MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&size.memory.size_mib));
        }
    }
}
