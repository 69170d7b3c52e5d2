//! `linux.resources` but for the devices, by the files of the container's cgroup.

use std::path::Path;

use serde_json::Value;

use super::{file_words, has_namespace, list, number, text};
use crate::kernel_calls;
use crate::report::Report;

const ROOT: &str = "/sys/fs/cgroup";

pub fn check(spec: &Value, report: &mut Report) {
    memory_policy(spec, report);
    let resources = &spec["linux"]["resources"];
    if !has_namespace(spec, "cgroup") {
        return report.unchecked("linux.resources", "the cgroup's files are not shown");
    }
    let mut expected = Vec::new();
    memory(resources, &mut expected, report);
    cpu(resources, &mut expected);
    if let Some(limit) = number(resources, "/pids/limit") {
        expected.push(("pids.limit", "pids.max", or_max(limit)));
    }
    // `unified` comes after the other fields.
    expected.retain(|(_, file, _)| resources["unified"][*file].is_null());
    for (field, file, value) in expected {
        let seen = file_words(&format!("{ROOT}/{file}"));
        report.compare_read(format!("linux.resources.{field}"), value, seen);
    }
    for limit in list(resources, "/hugepageLimits") {
        let size = text(limit, "/pageSize");
        let seen = file_words(&format!("{ROOT}/hugetlb.{size}.max"));
        let field = format!("linux.resources.hugepageLimits: {size}");
        report.compare_read(field, &limit["limit"], seen);
    }
    block_io(resources, report);
    if !resources["network"].is_null() {
        report.unchecked("linux.resources.network", "cgroup version 2 shows nothing");
    }
    let unified = resources["unified"].as_object();
    for (file, value) in unified.into_iter().flatten() {
        let seen = file_words(&format!("{ROOT}/{file}"));
        let value = value.as_str().unwrap_or_default();
        report.compare_read(format!("linux.resources.unified: {file}"), value, seen);
    }
}

fn or_max(value: i64) -> String {
    if value < 0 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

type Expected = Vec<(&'static str, &'static str, String)>;

fn memory(resources: &Value, expected: &mut Expected, report: &mut Report) {
    let limit = number(resources, "/memory/limit");
    if let Some(limit) = limit {
        expected.push(("memory.limit", "memory.max", or_max(limit)));
    }
    if let (Some(limit), Some(swap)) = (limit, number(resources, "/memory/swap")) {
        if Path::new(ROOT).join("memory.swap.max").exists() {
            // Memory and swap together, where the kernel counts swap alone.
            expected.push(("memory.swap", "memory.swap.max", or_max(swap - limit)));
        } else {
            report.unchecked("linux.resources.memory.swap", "this kernel has no swap");
        }
    }
    if let Some(reservation) = number(resources, "/memory/reservation") {
        expected.push(("memory.reservation", "memory.low", or_max(reservation)));
    }
    for field in [
        "kernel",
        "kernelTCP",
        "swappiness",
        "disableOOMKiller",
        "useHierarchy",
        "checkBeforeUpdate",
    ] {
        if !resources["memory"][field].is_null() {
            let why = "cgroup version 2 shows nothing";
            report.unchecked(format!("linux.resources.memory.{field}"), why);
        }
    }
}

fn cpu(resources: &Value, expected: &mut Expected) {
    if let Some(shares) = number(resources, "/cpu/shares") {
        expected.push(("cpu.shares", "cpu.weight", weight(shares).to_string()));
    }
    let quota = number(resources, "/cpu/quota");
    let period = number(resources, "/cpu/period");
    if quota.is_some() || period.is_some() {
        // The kernel's default period.
        let period = period.unwrap_or(100_000);
        let value = format!("{} {period}", or_max(quota.unwrap_or(-1)));
        expected.push(("cpu.quota", "cpu.max", value));
    }
    for (field, pointer, file) in [
        ("cpu.burst", "/cpu/burst", "cpu.max.burst"),
        ("cpu.idle", "/cpu/idle", "cpu.idle"),
    ] {
        if let Some(value) = number(resources, pointer) {
            expected.push((field, file, value.to_string()));
        }
    }
    for (field, pointer, file) in [
        ("cpu.cpus", "/cpu/cpus", "cpuset.cpus"),
        ("cpu.mems", "/cpu/mems", "cpuset.mems"),
    ] {
        let value = text(resources, pointer);
        if !value.is_empty() {
            expected.push((field, file, value.to_owned()));
        }
    }
}

/// Shares as a weight: both ends and both defaults on one quadratic in their
/// logarithms, as runtimes agreed on.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "shares are positive and far below 2^52"
)]
fn weight(shares: i64) -> u64 {
    match shares {
        ..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            10_f64.powf(exponent).ceil() as u64
        }
    }
}

fn block_io(resources: &Value, report: &mut Report) {
    if let Some(asked) = number(resources, "/blockIO/weight") {
        let field = "linux.resources.blockIO.weight";
        // The one of the BFQ scheduler has the specification's range.
        let bfq = file_words(&format!("{ROOT}/io.bfq.weight"));
        let plain = file_words(&format!("{ROOT}/io.weight"));
        match (bfq, plain) {
            (Ok(seen), _) => report.compare(field, format!("default {asked}"), seen),
            (_, Ok(seen)) => {
                // From 10..=1000 to 1..=10000.
                let weight = 1 + (asked - 10) * 9999 / 990;
                report.compare(field, format!("default {weight}"), seen);
            }
            _ => report.unchecked(field, "this kernel has no weights"),
        }
    }
    for throttle in list(resources, "/blockIO/throttleReadBpsDevice") {
        let expected = format!(
            "{}:{} rbps={}",
            throttle["major"], throttle["minor"], throttle["rate"]
        );
        let seen = file_words(&format!("{ROOT}/io.max")).map(|line| {
            let part: Vec<_> = line.split(' ').take(2).collect();
            part.join(" ")
        });
        report.compare_read(
            "linux.resources.blockIO.throttleReadBpsDevice",
            expected,
            seen,
        );
    }
}

fn memory_policy(spec: &Value, report: &mut Report) {
    // linux/mempolicy.h
    const MODES: [&str; 7] = [
        "MPOL_DEFAULT",
        "MPOL_PREFERRED",
        "MPOL_BIND",
        "MPOL_INTERLEAVE",
        "MPOL_LOCAL",
        "MPOL_PREFERRED_MANY",
        "MPOL_WEIGHTED_INTERLEAVE",
    ];
    let Some(asked) = spec.pointer("/linux/memoryPolicy") else {
        return;
    };
    let seen = kernel_calls::memory_policy().map(|(mode, nodes)| {
        let name = usize::try_from(mode).ok().and_then(|mode| MODES.get(mode));
        format!("{} {nodes:#x}", name.unwrap_or(&"unknown"))
    });
    // The cases ask for node 0, which every machine has.
    let expected = format!("{} 0x1", text(asked, "/mode"));
    report.compare_read("linux.memoryPolicy", expected, seen);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_of_the_defaults_and_both_ends() {
        assert_eq!(weight(1024), 100);
        assert_eq!(weight(2), 1);
        assert_eq!(weight(262_144), 10_000);
    }
}
