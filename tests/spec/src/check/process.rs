//! `process` but for the user and its capabilities, the host's names, and the personality.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::{env, fs};

use nix::sys::resource::{Resource, getrlimit};
use serde_json::Value;

use super::{file_words, list, status, text, texts};
use crate::kernel_calls;
use crate::report::Report;

pub fn check(spec: &Value, report: &mut Report) {
    arguments(spec, report);
    environment(spec, report);
    let directory = env::current_dir().map(|path| path.display().to_string());
    report.compare_read("process.cwd", text(spec, "/process/cwd"), directory);
    let no_new_privileges = spec["process"]["noNewPrivileges"] == true;
    report.compare(
        "process.noNewPrivileges",
        i32::from(no_new_privileges),
        status().get("NoNewPrivs").map_or("absent", String::as_str),
    );
    limits(spec, report);
    match spec.pointer("/process/oomScoreAdj") {
        Some(score) => report.compare_read(
            "process.oomScoreAdj",
            score,
            file_words("/proc/self/oom_score_adj"),
        ),
        None => report.unchecked("process.oomScoreAdj", "absent: the runtime's own holds"),
    }
    scheduling(spec, report);
    for (field, file) in [("hostname", "hostname"), ("domainname", "domainname")] {
        if let Some(name) = spec[field].as_str() {
            let seen = file_words(&format!("/proc/sys/kernel/{file}"));
            report.compare_read(field, name, seen);
        }
    }
    if !spec["process"]["execCPUAffinity"].is_null() {
        report.unchecked(
            "process.execCPUAffinity",
            "is about processes that join the container",
        );
    }
    if !spec["process"]["consoleSize"].is_null() {
        report.unchecked(
            "process.consoleSize",
            "the client gives the terminal its own size at once",
        );
    }
    personality_of(spec, report);
}

/// The parts of a file, each of which ends with a zero byte.
fn strings(path: &str) -> Vec<OsString> {
    let bytes = fs::read(path).unwrap_or_default();
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
    bytes
        .split(|byte| *byte == 0)
        .map(|part| OsString::from_vec(part.to_vec()))
        .collect()
}

fn arguments(spec: &Value, report: &mut Report) {
    report.compare(
        "process.args",
        format!("{:?}", texts(spec, "/process/args")),
        format!("{:?}", strings("/proc/self/cmdline")),
    );
}

fn environment(spec: &Value, report: &mut Report) {
    let asked = texts(spec, "/process/env");
    // As `getenv` would find them if the last of a name counts.
    let mut expected: BTreeMap<_, _> = asked
        .iter()
        .filter_map(|variable| variable.split_once('='))
        .collect();
    let seen: Vec<_> = strings("/proc/self/environ")
        .into_iter()
        .map(|variable| variable.to_string_lossy().into_owned())
        .collect();
    let seen_pairs = seen
        .iter()
        .filter_map(|variable| variable.split_once('='))
        .rev();
    // As it is found: the first of a name counts.
    let found: BTreeMap<_, _> = seen_pairs.collect();
    let uid = super::number(spec, "/process/user/uid").unwrap_or_default();
    let home = home_of(uid);
    expected.entry("HOME").or_insert(&home);
    let show = |variables: &BTreeMap<&str, &str>| format!("{variables:?}");
    report.compare("process.env", show(&expected), show(&found));
    report.compare("process.env: count", expected.len(), seen.len());
}

/// Which the runtime adds, by the image's `/etc/passwd`.
fn home_of(uid: i64) -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&uid.to_string().as_str()));
    let home = entry.and_then(|fields| fields.get(5).map(|home| (*home).to_owned()));
    home.unwrap_or_else(|| "/".to_owned())
}

const LIMITS: [(&str, Resource); 16] = [
    ("RLIMIT_AS", Resource::RLIMIT_AS),
    ("RLIMIT_CORE", Resource::RLIMIT_CORE),
    ("RLIMIT_CPU", Resource::RLIMIT_CPU),
    ("RLIMIT_DATA", Resource::RLIMIT_DATA),
    ("RLIMIT_FSIZE", Resource::RLIMIT_FSIZE),
    ("RLIMIT_LOCKS", Resource::RLIMIT_LOCKS),
    ("RLIMIT_MEMLOCK", Resource::RLIMIT_MEMLOCK),
    ("RLIMIT_MSGQUEUE", Resource::RLIMIT_MSGQUEUE),
    ("RLIMIT_NICE", Resource::RLIMIT_NICE),
    ("RLIMIT_NOFILE", Resource::RLIMIT_NOFILE),
    ("RLIMIT_NPROC", Resource::RLIMIT_NPROC),
    ("RLIMIT_RSS", Resource::RLIMIT_RSS),
    ("RLIMIT_RTPRIO", Resource::RLIMIT_RTPRIO),
    ("RLIMIT_RTTIME", Resource::RLIMIT_RTTIME),
    ("RLIMIT_SIGPENDING", Resource::RLIMIT_SIGPENDING),
    ("RLIMIT_STACK", Resource::RLIMIT_STACK),
];

fn limits(spec: &Value, report: &mut Report) {
    for asked in list(spec, "/process/rlimits") {
        let kind = text(asked, "/type");
        let field = format!("process.rlimits: {kind}");
        let Some((_, resource)) = LIMITS.iter().find(|(name, _)| *name == kind) else {
            report.unchecked(field, "no such limit is known here");
            continue;
        };
        let expected = format!("{} {}", asked["soft"], asked["hard"]);
        let seen = getrlimit(*resource).map(|(soft, hard)| format!("{soft} {hard}"));
        report.compare_read(field, expected, seen);
    }
}

/// The index of a name, which is its value in the kernel's headers.
fn index(names: &[&str], name: &str) -> Option<u64> {
    let at = names.iter().position(|known| *known == name);
    at.map(|at| at as u64)
}

fn scheduling(spec: &Value, report: &mut Report) {
    const CLASSES: &[&str] = &[
        "",
        "IOPRIO_CLASS_RT",
        "IOPRIO_CLASS_BE",
        "IOPRIO_CLASS_IDLE",
    ];
    // linux/sched.h; 4 is not in use.
    const POLICIES: &[&str] = &[
        "SCHED_OTHER",
        "SCHED_FIFO",
        "SCHED_RR",
        "SCHED_BATCH",
        "",
        "SCHED_IDLE",
        "SCHED_DEADLINE",
    ];
    if let Some(asked) = spec.pointer("/process/ioPriority") {
        let class = index(CLASSES, text(asked, "/class"));
        let expected = (class, asked["priority"].as_u64());
        let seen = kernel_calls::io_priority()
            .map(|(class, priority)| format!("{:?}", (Some(class), Some(priority))));
        report.compare_read("process.ioPriority", format!("{expected:?}"), seen);
    }
    let Some(asked) = spec.pointer("/process/scheduler") else {
        return;
    };
    let seen = match kernel_calls::scheduling() {
        Ok(seen) => seen,
        Err(error) => return report.compare("process.scheduler", asked, error),
    };
    let policy = index(POLICIES, text(asked, "/policy"));
    report.compare(
        "process.scheduler: policy",
        format!("{policy:?}"),
        format!("{:?}", Some(u64::from(seen.policy))),
    );
    if let Some(nice) = asked["nice"].as_i64() {
        report.compare("process.scheduler: nice", nice, seen.nice);
    }
    if let Some(priority) = asked["priority"].as_u64() {
        report.compare("process.scheduler: priority", priority, seen.priority);
    }
    let reset = texts(asked, "/flags").contains(&"SCHED_FLAG_RESET_ON_FORK");
    report.compare("process.scheduler: flags", u64::from(reset), seen.flags);
}

fn personality_of(spec: &Value, report: &mut Report) {
    // PER_LINUX32 of linux/personality.h.
    const LINUX32: i32 = 8;
    let domain = text(spec, "/linux/personality/domain");
    let expected = if domain == "LINUX32" { LINUX32 } else { 0 };
    report.compare_read("linux.personality", expected, kernel_calls::personality());
    let machine = if domain == "LINUX32" {
        "i686"
    } else {
        "x86_64"
    };
    let seen = rustix::system::uname()
        .machine()
        .to_string_lossy()
        .into_owned();
    report.compare("linux.personality: machine", machine, seen);
}
