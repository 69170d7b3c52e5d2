//! What containers are limited to, as far as it says how large their VM has to be.

use serde_json::Value;

use crate::spec::Membership;

/// The period that the kernel takes unless it is told another (cgroup-v2.rst,
/// cpu.max).
const PERIOD_US: u64 = 100_000;

/// Limits of one container, or of all in a pod together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory that it may take.
    pub memory_bytes: Option<u64>,
    /// CPU time that it may take in each period.
    quota_us: Option<u64>,
    /// `None` is the kernel's.
    period_us: Option<u64>,
    /// The last CPU that it is pinned to.
    pub last_cpu: Option<u64>,
}

impl Limits {
    /// What the configuration of a pod's first container says of all that will be
    /// in it. What is no limit, or cannot be read, is none: the agent, which
    /// applies them, refuses what is wrong.
    pub fn of_pod(spec: &Value, membership: &Membership) -> Self {
        match membership {
            Membership::Alone => Self::of_container(spec),
            Membership::Sandbox => Self::of_annotations(spec),
            // A pod is never made for one of these.
            Membership::Member { .. } => Self::default(),
        }
    }

    /// Of a container by its configuration.
    pub fn of_container(spec: &Value) -> Self {
        let resources = spec.pointer("/linux/resources");
        resources.map_or_else(Self::default, |resources| {
            Self::default().changed_by(resources)
        })
    }

    /// After an update with these `linux.resources`: what they leave out, or give
    /// as 0, stays.
    #[must_use]
    pub fn changed_by(self, resources: &Value) -> Self {
        let changed = |pointer: &str, before: Option<u64>| {
            match resources.pointer(pointer).and_then(Value::as_i64) {
                None | Some(0) => before,
                // Without a limit, when it is negative.
                Some(number) => u64::try_from(number).ok(),
            }
        };
        let cpus = resources.pointer("/cpu/cpus").and_then(Value::as_str);
        Self {
            memory_bytes: changed("/memory/limit", self.memory_bytes),
            quota_us: changed("/cpu/quota", self.quota_us),
            period_us: changed("/cpu/period", self.period_us),
            last_cpu: cpus.and_then(last_of_list).or(self.last_cpu),
        }
    }

    /// Of a pod by the annotations that containerd gives its sandbox (containerd,
    /// `internal/cri/annotations`), from what the kubelet says of the pod: the sum
    /// over its containers, in which one without a limit counts as nothing (kubelet,
    /// `calculateSandboxResources`).
    fn of_annotations(spec: &Value) -> Self {
        let number = |name: &str| {
            let text = spec.pointer(&format!("/annotations/io.kubernetes.cri.sandbox-{name}"))?;
            let number = text.as_str()?.parse().ok()?;
            Some(number).filter(|number: &u64| *number > 0)
        };
        Self {
            memory_bytes: number("memory"),
            quota_us: number("cpu-quota"),
            period_us: number("cpu-period"),
            last_cpu: None,
        }
    }

    /// CPUs that it may use at once, in thousandths, rounded up.
    pub fn millicpus(self) -> Option<u64> {
        let period = self.period_us.unwrap_or(PERIOD_US);
        let millis = u128::from(self.quota_us?) * 1000;
        let millis = millis.div_ceil(u128::from(period));
        Some(u64::try_from(millis).unwrap_or(u64::MAX))
    }
}

/// As in "0-2,7" (cpuset(7), "List format").
fn last_of_list(list: &str) -> Option<u64> {
    let numbers = list.split([',', '-']);
    numbers
        .filter_map(|number| number.trim().parse().ok())
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const MIB: i64 = 1 << 20;

    #[test]
    fn changed_by_keeps_what_an_update_leaves_out() {
        let before = Limits::default().changed_by(&json!({
            "memory": {"limit": 256 * MIB},
            "cpu": {"quota": 150_000, "period": 100_000, "cpus": "0-2"},
        }));
        assert_eq!(before.millicpus(), Some(1500));
        assert_eq!(before.last_cpu, Some(2));
        assert_eq!(before.changed_by(&json!({})), before);
        assert_eq!(
            before.changed_by(&json!({"memory": {"limit": 0}, "cpu": {"shares": 5, "cpus": ""}})),
            before
        );
        let larger = before.changed_by(&json!({"memory": {"limit": 512 * MIB}}));
        assert_eq!(larger.memory_bytes, Some(512 << 20));
        assert_eq!(larger.millicpus(), Some(1500));
    }

    #[test]
    fn changed_by_minus_one_takes_the_limit_away() {
        let limited = json!({"memory": {"limit": 256 * MIB}, "cpu": {"quota": 50_000}});
        let unlimited = json!({"memory": {"limit": -1}, "cpu": {"quota": -1}});
        let limits = Limits::default().changed_by(&limited);
        assert_eq!(limits.changed_by(&unlimited), Limits::default());
    }

    proptest! {
        #[test]
        fn limits_of_anything_can_be_read(quota: i64, period: i64, limit: i64, cpus: String) {
            let limits = Limits::default().changed_by(&json!({
                "cpu": {"quota": quota, "period": period, "cpus": cpus},
                "memory": {"limit": limit},
            }));
            prop_assert!(limits.memory_bytes.is_none_or(|bytes| bytes > 0));
            prop_assert!(limits.millicpus().is_none_or(|millis| millis > 0));
        }
    }
}
