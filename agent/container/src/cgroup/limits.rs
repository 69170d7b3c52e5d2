//! `linux.resources` as files of cgroup version 2.

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};

use super::{block_io, device_rules};
use crate::Unsupported;

/// One file to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Name in the cgroup's directory.
    pub file: String,
    pub value: String,
    /// Without the file there is nothing to limit, so that the limit holds
    /// anyway: no swap, no huge pages of that size.
    pub vacuous_without_file: bool,
}

impl Setting {
    pub fn new(file: &str, value: &(impl ToString + ?Sized)) -> Self {
        Self {
            file: file.to_owned(),
            value: value.to_string(),
            vacuous_without_file: false,
        }
    }

    fn vacuous(mut self) -> Self {
        self.vacuous_without_file = true;
        self
    }
}

/// Every setting but the limit on processes. What cannot be set was refused by [`check`].
pub fn settings(resources: Option<&LinuxResources>) -> Vec<Setting> {
    resources.map_or(Vec::new(), |resources| settings_with(resources, "max"))
}

/// Every setting, that on processes included, of a cgroup that is in use; `value`
/// tells what its files hold.
pub fn update_settings(
    resources: &LinuxResources,
    value: &dyn Fn(&str) -> Option<String>,
) -> Vec<Setting> {
    // The first word of cpu.max, of which the second is the period.
    let first_word = |text: String| text.split(' ').next().map(str::to_owned);
    let quota = value("cpu.max").and_then(first_word);
    let mut settings = settings_with(resources, quota.as_deref().unwrap_or("max"));
    settings.extend(process_setting(Some(resources)));
    // What is raised comes before what is lowered: less memory with the old swap
    // could kill, and a quota below the old burst is refused.
    for (limit, beside) in [
        ("memory.max", "memory.swap.max"),
        ("cpu.max", "cpu.max.burst"),
    ] {
        let place = |file: &str| settings.iter().position(|setting| setting.file == file);
        if let (Some(first), Some(second)) = (place(limit), place(beside)) {
            let before = value(limit).map_or(u64::MAX, |text| amount(&text));
            if first < second && amount(&settings[first].value) < before {
                settings.swap(first, second);
            }
        }
    }
    settings
}

/// The first word as a number; `max` is the largest.
fn amount(text: &str) -> u64 {
    let word = text.split(' ').next().unwrap_or_default();
    word.parse().unwrap_or(u64::MAX)
}

/// `kept_quota` is that of cpu.max when only the period is named.
fn settings_with(resources: &LinuxResources, kept_quota: &str) -> Vec<Setting> {
    let mut settings = Vec::new();
    if let Some(cpu) = resources.cpu() {
        settings.extend(cpu_settings(cpu, kept_quota));
    }
    if let Some(memory) = resources.memory() {
        settings.extend(memory_settings(memory));
    }
    if let Some(io) = resources.block_io() {
        settings.extend(block_io::settings(io));
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        settings.extend(hugepage_settings(limit));
    }
    // Last: the OCI specification lets it override what the other fields say.
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    settings.extend(
        unified
            .into_iter()
            .map(|(file, value)| Setting::new(file, value)),
    );
    settings
}

/// The limit on processes; 0 is no statement, a negative one no limit.
pub fn process_setting(resources: Option<&LinuxResources>) -> Option<Setting> {
    match resources?.pids().as_ref()?.limit() {
        0 => None,
        limit if limit < 0 => Some(Setting::new("pids.max", "max")),
        limit => Some(Setting::new("pids.max", &limit)),
    }
}

fn cpu_settings(cpu: &LinuxCpu, kept_quota: &str) -> Vec<Setting> {
    let mut settings = Vec::new();
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        settings.push(Setting::new("cpu.weight", &cpu_weight(shares)));
    }
    if let Some(idle) = cpu.idle() {
        settings.push(Setting::new("cpu.idle", &idle));
    }
    // The kernel takes no weight while a cgroup is idle.
    if cpu.idle() == Some(0) {
        settings.reverse();
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        let quota = quota.map_or_else(|| kept_quota.to_owned(), or_max);
        settings.push(match period {
            Some(period) => Setting::new("cpu.max", &format!("{quota} {period}")),
            None => Setting::new("cpu.max", &quota),
        });
    }
    if let Some(burst) = cpu.burst() {
        settings.push(Setting::new("cpu.max.burst", &burst));
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            settings.push(Setting::new(file, list));
        }
    }
    settings
}

/// Shares (2 to 262144, default 1024) as a weight (1 to 10000, default 100):
/// 10 to a quadratic in log2(shares) that meets both ends and both defaults, as
/// newer OCI runtimes and Kubernetes have agreed on.
fn cpu_weight(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    let log = f64::from(shares as u32).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    #[expect(clippy::cast_sign_loss, reason = "10 to any power is positive")]
    let weight = 10_f64.powf(exponent).ceil() as u64;
    weight
}

fn memory_settings(memory: &LinuxMemory) -> Vec<Setting> {
    let mut settings = Vec::new();
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(limit) = limit {
        settings.push(Setting::new("memory.max", &or_max(limit)));
    }
    // OCI counts memory and swap together, the kernel swap alone.
    let swap = match (memory.swap().filter(|swap| *swap != 0), limit) {
        (Some(swap), _) if swap < 0 => Some("max".to_owned()),
        (Some(swap), Some(limit)) if limit > 0 => Some((swap - limit).to_string()),
        // As with cgroup version 1, where the one could not be without the other.
        (None, Some(limit)) if limit < 0 => Some("max".to_owned()),
        _ => None,
    };
    if let Some(swap) = swap {
        settings.push(Setting::new("memory.swap.max", &swap).vacuous());
    }
    if let Some(reservation) = memory.reservation().filter(|bytes| *bytes != 0) {
        settings.push(Setting::new("memory.low", &or_max(reservation)));
    }
    settings
}

fn or_max(bytes: i64) -> String {
    if bytes < 0 {
        "max".to_owned()
    } else {
        bytes.to_string()
    }
}

fn hugepage_settings(limit: &LinuxHugepageLimit) -> [Setting; 2] {
    ["max", "rsvd.max"].map(|kind| {
        let setting = Setting::new(
            &format!("hugetlb.{}.{kind}", limit.page_size()),
            &or_max(limit.limit()),
        );
        // CRI limits each page size of the *host*, mostly to 0.
        if limit.limit() == 0 || kind == "rsvd.max" {
            setting.vacuous()
        } else {
            setting
        }
    })
}

/// Refuses what of `linux.resources` has no effect here.
pub fn check(resources: &LinuxResources) -> Result<(), Unsupported> {
    device_rules::check(resources)?;
    if let Some(cpu) = resources.cpu() {
        check_cpu(cpu)?;
    }
    if let Some(memory) = resources.memory() {
        check_memory(memory)?;
    }
    let refused = [
        (
            "linux.resources.network.classID",
            resources
                .network()
                .as_ref()
                .is_some_and(|network| network.class_id().is_some_and(|id| id != 0)),
            "cgroup version 2 has no network controller",
        ),
        (
            "linux.resources.network.priorities",
            resources
                .network()
                .as_ref()
                .is_some_and(|network| network.priorities().iter().flatten().next().is_some()),
            "cgroup version 2 has no network controller",
        ),
        (
            "linux.resources.rdma",
            resources.rdma().iter().flatten().next().is_some(),
            "the guest has no RDMA device",
        ),
    ];
    if let Some((field, _, reason)) = refused.into_iter().find(|(_, asked, _)| *asked) {
        return Err(Unsupported::new(field, reason));
    }
    if let Some(io) = resources.block_io() {
        block_io::check(io)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        check_page_size(limit.page_size())?;
    }
    for file in resources.unified().iter().flatten().map(|(file, _)| file) {
        check_unified(file)?;
    }
    Ok(())
}

fn check_cpu(cpu: &LinuxCpu) -> Result<(), Unsupported> {
    const REALTIME: &str = "cgroup version 2 has no real-time limits";
    let refuse = |field: &str, reason: &str| {
        Err(Unsupported::new(
            format!("linux.resources.cpu.{field}"),
            reason,
        ))
    };
    if cpu.realtime_runtime().is_some_and(|value| value != 0) {
        return refuse("realtimeRuntime", REALTIME);
    }
    if cpu.realtime_period().is_some_and(|value| value != 0) {
        return refuse("realtimePeriod", REALTIME);
    }
    if cpu.idle() == Some(1) && cpu.shares().is_some_and(|shares| shares != 0) {
        return refuse("idle", "an idle cgroup has no shares");
    }
    Ok(())
}

fn check_memory(memory: &LinuxMemory) -> Result<(), Unsupported> {
    let kernel = memory.kernel().is_some_and(|bytes| bytes != 0);
    let refused = [
        ("kernel", kernel, "cgroup version 2 has no such limit"),
        (
            "kernelTCP",
            memory.kernel_tcp().is_some_and(|bytes| bytes != 0),
            "cgroup version 2 has no such limit",
        ),
        (
            "swappiness",
            memory.swappiness().is_some(),
            "cgroup version 2 has no such setting",
        ),
        (
            "disableOOMKiller",
            memory.disable_oom_killer() == Some(true),
            "cgroup version 2 has no such setting",
        ),
        (
            "useHierarchy",
            memory.use_hierarchy() == Some(false),
            "cgroup version 2 is always hierarchical",
        ),
    ];
    if let Some((field, _, reason)) = refused.into_iter().find(|(_, asked, _)| *asked) {
        return Err(Unsupported::new(
            format!("linux.resources.memory.{field}"),
            reason,
        ));
    }
    let limit = memory.limit().filter(|limit| *limit > 0);
    match (limit, memory.swap().filter(|swap| *swap > 0)) {
        (Some(limit), Some(swap)) if swap < limit => Err(Unsupported::new(
            "linux.resources.memory.swap",
            format!("{swap} includes the memory limit and must not be below its {limit}"),
        )),
        (None, Some(_)) => Err(Unsupported::new(
            "linux.resources.memory.swap",
            "needs a memory limit as well",
        )),
        _ => Ok(()),
    }
}

/// `hugetlb.<size>.max`: the size must not lead to another file.
fn check_page_size(size: &str) -> Result<(), Unsupported> {
    let number = ["KB", "MB", "GB"]
        .iter()
        .find_map(|unit| size.strip_suffix(unit));
    match number {
        Some(digits) if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => Ok(()),
        _ => Err(Unsupported::new(
            "linux.resources.hugepageLimits.pageSize",
            format!("{size:?} is not a size like 2MB"),
        )),
    }
}

fn check_unified(file: &str) -> Result<(), Unsupported> {
    let refuse = |reason| {
        Err(Unsupported::new(
            format!("linux.resources.unified.{file}"),
            reason,
        ))
    };
    let mut parts = file.split('.');
    let controller = parts.next().unwrap_or_default();
    if file.contains('/') || controller.is_empty() || parts.next().is_none_or(str::is_empty) {
        return refuse("is not the name of a controller's file");
    }
    if controller == "cgroup" {
        return refuse("belongs to the runtime");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn resources(value: Value) -> LinuxResources {
        serde_json::from_value(value).unwrap()
    }

    fn written(value: Value) -> Vec<(String, String)> {
        let resources = resources(value);
        check(&resources).unwrap();
        settings(Some(&resources))
            .into_iter()
            .chain(process_setting(Some(&resources)))
            .map(|setting| (setting.file, setting.value))
            .collect()
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected
            .iter()
            .map(|(file, value)| ((*file).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn cpu_weight_of_the_ends_and_the_default_is_exact() {
        let weights = [0, 1, 2, 1024, 262_144, u64::MAX].map(cpu_weight);
        assert_eq!(weights, [1, 1, 1, 100, 10_000, 10_000]);
    }

    #[test]
    fn settings_cpu_limits_become_weight_max_and_sets() {
        assert_eq!(
            written(
                json!({"cpu": {"shares": 1024, "quota": 50000, "period": 100_000, "cpus": "0-1", "mems": "0"}})
            ),
            pairs(&[
                ("cpu.weight", "100"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0-1"),
                ("cpuset.mems", "0"),
            ])
        );
        assert_eq!(
            written(json!({"cpu": {"quota": -1, "period": 100_000}})),
            pairs(&[("cpu.max", "max 100000")])
        );
        assert_eq!(
            written(json!({"cpu": {"shares": 0, "quota": 0, "period": 0}})),
            []
        );
        // Each in the order that the kernel takes.
        assert_eq!(
            written(json!({"cpu": {"idle": 0, "shares": 1024}})),
            pairs(&[("cpu.idle", "0"), ("cpu.weight", "100")])
        );
    }

    #[test]
    fn settings_swap_equal_to_limit_writes_zero() {
        assert_eq!(
            written(json!({"memory": {"limit": 1000, "swap": 1000, "reservation": 500}})),
            pairs(&[
                ("memory.max", "1000"),
                ("memory.swap.max", "0"),
                ("memory.low", "500"),
            ])
        );
        assert_eq!(
            written(json!({"memory": {"limit": -1, "swap": -1}})),
            pairs(&[("memory.max", "max"), ("memory.swap.max", "max")])
        );
    }

    #[test]
    fn update_settings_raise_before_they_lower() {
        let files = |value: Value, before: &str| {
            let before = before.to_owned();
            let resources = resources(value);
            let settings = update_settings(&resources, &|_| Some(before.clone()));
            let files = settings.into_iter().map(|setting| setting.file);
            files.collect::<Vec<_>>()
        };
        let memory = json!({"memory": {"limit": 1000, "swap": 1500}});
        let raised = ["memory.max", "memory.swap.max"];
        assert_eq!(files(memory.clone(), "500"), raised);
        assert_eq!(
            files(memory.clone(), "2000"),
            ["memory.swap.max", "memory.max"]
        );
        assert_eq!(files(memory, "max"), ["memory.swap.max", "memory.max"]);
        let cpu = json!({"cpu": {"quota": 1000, "burst": 500}});
        assert_eq!(
            files(cpu.clone(), "2000 100000"),
            ["cpu.max.burst", "cpu.max"]
        );
        assert_eq!(files(cpu, "500 100000"), ["cpu.max", "cpu.max.burst"]);
    }

    #[test]
    fn settings_pids_limit_distinguishes_none_and_unlimited() {
        assert_eq!(written(json!({"pids": {"limit": 0}})), []);
        assert_eq!(
            written(json!({"pids": {"limit": -1}})),
            pairs(&[("pids.max", "max")])
        );
        assert_eq!(
            written(json!({"pids": {"limit": 7}})),
            pairs(&[("pids.max", "7")])
        );
    }

    #[test]
    fn settings_unified_comes_last_and_overrides() {
        assert_eq!(
            written(json!({"memory": {"limit": 1000}, "unified": {"memory.max": "2000"}})),
            pairs(&[("memory.max", "1000"), ("memory.max", "2000")])
        );
    }

    #[test]
    fn check_what_has_no_effect_is_refused_by_name() {
        for (value, field) in [
            (json!({"memory": {"kernel": 1}}), "memory.kernel"),
            (json!({"memory": {"kernelTCP": 1}}), "memory.kernelTCP"),
            (json!({"memory": {"swappiness": 0}}), "memory.swappiness"),
            (
                json!({"memory": {"disableOOMKiller": true}}),
                "memory.disableOOMKiller",
            ),
            (
                json!({"memory": {"useHierarchy": false}}),
                "memory.useHierarchy",
            ),
            (json!({"memory": {"limit": 2, "swap": 1}}), "memory.swap"),
            (json!({"memory": {"swap": 1}}), "memory.swap"),
            (
                json!({"cpu": {"realtimeRuntime": 1}}),
                "cpu.realtimeRuntime",
            ),
            (json!({"cpu": {"realtimePeriod": 1}}), "cpu.realtimePeriod"),
            (json!({"cpu": {"idle": 1, "shares": 2}}), "cpu.idle"),
            (json!({"network": {"classID": 1}}), "network.classID"),
            (
                json!({"network": {"priorities": [{"name": "eth0", "priority": 1}]}}),
                "network.priorities",
            ),
            (json!({"rdma": {"mlx": {"hcaHandles": 1}}}), "rdma"),
            (
                json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}),
                "hugepageLimits.pageSize",
            ),
            (
                json!({"unified": {"cgroup.freeze": "1"}}),
                "unified.cgroup.freeze",
            ),
            (
                json!({"unified": {"../memory.max": "1"}}),
                "unified.../memory.max",
            ),
        ] {
            let refused = check(&resources(value)).unwrap_err();
            assert_eq!(refused.field, format!("linux.resources.{field}"));
        }
    }

    #[test]
    fn check_what_clients_send_without_asking_for_it_passes() {
        check(&resources(json!({
            "memory": {"disableOOMKiller": false, "useHierarchy": true, "checkBeforeUpdate": false},
            "blockIO": {"weight": 0}, "network": {}, "rdma": {},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": 0}],
        })))
        .unwrap();
    }
}
