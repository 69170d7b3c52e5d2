//! How large a VM is.

use serde_json::Value;
use vmm_config::{MAX_MEMORY_MIB, MAX_VCPUS, Memory, Vcpus};

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

const MIB: u64 = 1 << 20;

/// Memory that the containers of a pod can take which nobody limits, at most.
const UNLIMITED_POD_BYTES: u64 = (DEFAULT_MEMORY_MIB as u64 - OVERHEAD_MIB) * MIB;

/// What a lone container, or a pod, is limited to, as far as it says how large its
/// VM has to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory that it may take.
    memory_bytes: Option<u64>,
    /// CPUs that it may use at once: quota by period, rounded up.
    cpus: Option<u64>,
    /// The last that it is pinned to.
    last_cpu: Option<u64>,
}

/// The period that the kernel takes unless it is told another (cgroup-v2.rst,
/// cpu.max).
const PERIOD_US: u64 = 100_000;

impl Limits {
    /// What the configuration of a pod's first container says of all that will be
    /// in it. What is no limit, or cannot be read, is none: the agent, which
    /// applies them, refuses what is wrong.
    pub fn of(spec: &Value, membership: &Membership) -> Self {
        match membership {
            Membership::Alone => Self::of_resources(spec),
            Membership::Sandbox => Self::of_annotations(spec),
            // A pod is never made for one of these.
            Membership::Member { .. } => Self::default(),
        }
    }

    /// Of a pod by the annotations that containerd gives its sandbox (containerd,
    /// `internal/cri/annotations`), from what the kubelet says of the pod: the sum
    /// over its containers, in which one without a limit counts as nothing (kubelet,
    /// `calculateSandboxResources`). So no pod is smaller than one without limits.
    fn of_annotations(spec: &Value) -> Self {
        let number = |name: &str| {
            let text = spec.pointer(&format!("/annotations/io.kubernetes.cri.sandbox-{name}"))?;
            let number = text.as_str()?.parse().ok()?;
            Some(number).filter(|number: &u64| *number > 0)
        };
        let period = number("cpu-period").unwrap_or(PERIOD_US);
        Self {
            memory_bytes: number("memory").filter(|bytes| *bytes > UNLIMITED_POD_BYTES),
            cpus: number("cpu-quota").map(|quota| quota.div_ceil(period)),
            last_cpu: None,
        }
    }

    fn of_resources(spec: &Value) -> Self {
        let number = |pointer: &str| {
            let value = spec.pointer(pointer).and_then(Value::as_i64)?;
            u64::try_from(value).ok().filter(|number| *number > 0)
        };
        let period = number("/linux/resources/cpu/period").unwrap_or(PERIOD_US);
        let last_cpu = spec
            .pointer("/linux/resources/cpu/cpus")
            .and_then(Value::as_str)
            .into_iter()
            .flat_map(|list| list.split([',', '-']))
            .filter_map(|number| number.trim().parse().ok());
        Self {
            memory_bytes: number("/linux/resources/memory/limit"),
            cpus: number("/linux/resources/cpu/quota").map(|quota| quota.div_ceil(period)),
            last_cpu: last_cpu.max(),
        }
    }
}

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

/// The size of a pod's VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Virtual processors.
    pub vcpus: Vcpus,
    /// Guest memory.
    pub memory: Memory,
}

impl Size {
    /// For a pod that is limited so.
    pub fn of(limits: Limits, host: Host) -> Self {
        // As many as it can use at once, and those that it is pinned to.
        let wanted = limits.last_cpu.map_or(1, |last| last.saturating_add(1));
        let wanted = wanted.max(limits.cpus.unwrap_or(1));
        let count = wanted.min(host.cpus).clamp(1, MAX_VCPUS.into());
        let count = u8::try_from(count).unwrap_or(MAX_VCPUS);
        Self {
            vcpus: Vcpus {
                boot: count,
                max: count,
            },
            memory: Memory {
                size_mib: memory_mib(limits.memory_bytes, host.memory_bytes),
            },
        }
    }
}

fn memory_mib(limit_bytes: Option<u64>, host_bytes: u64) -> u32 {
    let Some(bytes) = limit_bytes else {
        return DEFAULT_MEMORY_MIB;
    };
    let mib = bytes.div_ceil(MIB);
    let whole = mib
        .saturating_add(mib.div_ceil(PAGE_STRUCTURES))
        .saturating_add(OVERHEAD_MIB);
    // A limit that the host could never reach limits nothing.
    let most = (host_bytes / MIB).max(MIN_MEMORY_MIB.into());
    let whole = whole.min(most).max(MIN_MEMORY_MIB.into());
    u32::try_from(whole).map_or(MAX_MEMORY_MIB, |whole| whole.min(MAX_MEMORY_MIB))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const HOST: Host = Host {
        cpus: 4,
        memory_bytes: 8 << 30,
    };

    fn size(membership: &Membership, resources: &Value) -> (u8, u32) {
        let spec = json!({"linux": {"resources": resources}});
        size_of(&spec, membership)
    }

    fn size_of(spec: &Value, membership: &Membership) -> (u8, u32) {
        let size = Size::of(Limits::of(spec, membership), HOST);
        assert_eq!(size.vcpus.boot, size.vcpus.max);
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
            let size = Size::of(Limits::of(&spec, &Membership::Alone), host);
            prop_assert!((1..=MAX_VCPUS).contains(&size.vcpus.boot));
            prop_assert!((MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&size.memory.size_mib));
        }
    }
}
