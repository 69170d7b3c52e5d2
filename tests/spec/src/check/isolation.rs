//! `linux.namespaces` and what belongs to them: mappings, time offsets, sysctls.

use std::fs;
use std::net::UdpSocket;

use serde_json::Value;

use super::{file_words, has_namespace, list, text, words};
use crate::report::Report;

pub fn check(spec: &Value, report: &mut Report) {
    processes(spec, report);
    mappings(spec, report);
    if has_namespace(spec, "network") {
        network(report);
    }
    if has_namespace(spec, "ipc") {
        // The first line is a heading.
        let segments = fs::read_to_string("/proc/sysvipc/shm").map(|text| text.lines().count() - 1);
        report.compare_read("linux.namespaces: ipc: shared memory segments", 0, segments);
    }
    let cgroup = file_words("/proc/self/cgroup");
    if has_namespace(spec, "cgroup") {
        report.compare_read("linux.namespaces: cgroup", "0::/", cgroup);
    } else {
        let expected = format!("0::{}", text(spec, "/linux/cgroupsPath"));
        report.compare_read("linux.cgroupsPath", expected, cgroup);
    }
    time(spec, report);
    let settings = spec.pointer("/linux/sysctl").and_then(Value::as_object);
    for (key, value) in settings.into_iter().flatten() {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        let expected = words(value.as_str().unwrap_or_default());
        report.compare_read(format!("linux.sysctl: {key}"), expected, file_words(&path));
    }
}

fn processes(spec: &Value, report: &mut Report) {
    if !has_namespace(spec, "pid") {
        return;
    }
    let own = std::process::id();
    report.compare("linux.namespaces: pid: the program's", 1, own);
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .collect();
    pids.sort();
    report.compare("linux.namespaces: pid: all", "1", pids.join(" "));
}

fn mappings(spec: &Value, report: &mut Report) {
    let own = has_namespace(spec, "user");
    for (field, file) in [("uidMappings", "uid_map"), ("gidMappings", "gid_map")] {
        let asked = list(spec, &format!("/linux/{field}"));
        let mut expected: Vec<_> = asked
            .iter()
            .map(|map| format!("{} {} {}", map["containerID"], map["hostID"], map["size"]))
            .collect();
        if !own {
            // user_namespaces(7): the whole range.
            expected = vec!["0 0 4294967295".to_owned()];
        }
        let seen = file_words(&format!("/proc/self/{file}"));
        report.compare_read(format!("linux.{field}"), expected.join(" "), seen);
    }
}

fn network(report: &mut Report) {
    let table = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    // Kernels make these, unasked, in each new namespace.
    let fallback = [
        "tunl0", "sit0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0",
    ];
    let names: Vec<_> = table
        .lines()
        .skip(2)
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim())
        .filter(|name| !fallback.contains(name))
        .collect();
    report.compare(
        "linux.namespaces: network: interfaces",
        "lo",
        names.join(" "),
    );
    let bound = UdpSocket::bind("127.0.0.1:0").map(|_| "up");
    report.compare_read("linux.namespaces: network: loopback", "up", bound);
}

fn time(spec: &Value, report: &mut Report) {
    let offset = |clock: &str| {
        let asked = &spec["linux"]["timeOffsets"][clock];
        let part = |field: &str| asked[field].as_i64().unwrap_or_default();
        format!("{clock} {} {}", part("secs"), part("nanosecs"))
    };
    let expected = format!("{} {}", offset("monotonic"), offset("boottime"));
    match file_words("/proc/self/timens_offsets") {
        Err(error) if !has_namespace(spec, "time") => {
            report.unchecked("linux.timeOffsets", error.to_string());
        }
        seen => report.compare_read("linux.timeOffsets", expected, seen),
    }
}
