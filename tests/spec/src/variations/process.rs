//! `process`, and the names of the host.

use serde_json::{Value, json};

use super::{any, put, remove, single};
use crate::base::CHECKER;
use crate::check::capabilities::NAMES;
use crate::matrix::Variation;

fn capabilities(spec: &mut Value, sets: &[(&str, &[&str])]) {
    put(spec, "process/capabilities", json!({}));
    for (set, names) in sets {
        put(spec, &format!("process/capabilities/{set}"), json!(names));
    }
}

fn limit(kind: &str, soft: u64, hard: u64) -> Value {
    json!({"type": kind, "soft": soft, "hard": hard})
}

pub const VARIATIONS: &[Variation] = &[
    any("process.args", "args", |spec, _| {
        let args = json!([CHECKER, "check", "", "two words", "\u{fc}\n"]);
        put(spec, "process/args", args);
    }),
    any("process.args: found by PATH", "args", |spec, _| {
        put(spec, "process/args", json!(["spec-checker", "check"]));
        put(spec, "process/env", json!(["PATH=/bin:/"]));
    }),
    any("process.env", "env", |spec, _| {
        for variable in ["COLOUR=blue", "EMPTY=", "WITH=a=b", "WORDS=two words"] {
            super::add(spec, "process/env", json!(variable));
        }
    }),
    any("process.env: HOME", "env", |spec, _| {
        super::add(spec, "process/env", json!("HOME=/somewhere"));
    }),
    any("process.env: repeated", "env", |spec, _| {
        super::add(spec, "process/env", json!("TWICE=first"));
        super::add(spec, "process/env", json!("TWICE=second"));
    }),
    // Made if it is missing, for which the root must be writable.
    any("process.cwd", "root", |spec, _| {
        put(spec, "process/cwd", json!("/made/deep"));
    }),
    any("process.terminal", "terminal", |spec, _| {
        put(spec, "process/terminal", json!(true));
    }),
    any("process.user.uid", "uid", |spec, _| {
        put(spec, "process/user/uid", json!(1000));
    }),
    any("process.user.gid", "gid", |spec, _| {
        put(spec, "process/user/gid", json!(2000));
    }),
    any("process.user.umask", "umask", |spec, _| {
        put(spec, "process/user/umask", json!(0o027));
    }),
    any("process.user.additionalGids", "groups", |spec, _| {
        put(spec, "process/user/additionalGids", json!([5, 1234, 70000]));
    }),
    any("process.user.additionalGids: none", "groups", |spec, _| {
        remove(spec, "process/user", "additionalGids");
    }),
    any("process.capabilities: absent", "capabilities", |spec, _| {
        remove(spec, "process", "capabilities");
    }),
    any("process.capabilities: none", "capabilities", |spec, _| {
        capabilities(spec, &[]);
    }),
    any("process.capabilities: all", "capabilities", |spec, _| {
        let sets = ["bounding", "effective", "permitted"];
        capabilities(spec, &sets.map(|set| (set, NAMES)));
    }),
    any(
        "process.capabilities: ambient",
        "capabilities",
        |spec, _| {
            let names: &[&str] = &["CAP_NET_BIND_SERVICE", "CAP_CHOWN"];
            let sets = [
                "bounding",
                "effective",
                "permitted",
                "inheritable",
                "ambient",
            ];
            capabilities(spec, &sets.map(|set| (set, names)));
        },
    ),
    any(
        "process.capabilities: five different sets",
        "capabilities",
        |spec, _| {
            let bounding: &[&str] = &["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_NET_RAW"];
            capabilities(
                spec,
                &[
                    ("bounding", bounding),
                    ("permitted", &["CAP_CHOWN", "CAP_KILL", "CAP_SETUID"]),
                    ("effective", &["CAP_CHOWN"]),
                    ("inheritable", &["CAP_KILL", "CAP_CHOWN"]),
                    ("ambient", &["CAP_KILL"]),
                ],
            );
        },
    ),
    any("process.rlimits", "rlimits", |spec, _| {
        let limits = [
            limit("RLIMIT_AS", 1 << 32, 1 << 33),
            limit("RLIMIT_CORE", 0, 4096),
            limit("RLIMIT_CPU", 600, 700),
            limit("RLIMIT_DATA", 1 << 31, 1 << 32),
            limit("RLIMIT_FSIZE", 1 << 30, 1 << 31),
            limit("RLIMIT_LOCKS", 100, 200),
            limit("RLIMIT_MEMLOCK", 65536, 131_072),
            limit("RLIMIT_MSGQUEUE", 409_600, 819_200),
            limit("RLIMIT_NICE", 10, 20),
            limit("RLIMIT_NOFILE", 500, 600),
            limit("RLIMIT_NPROC", 700, 800),
            limit("RLIMIT_RSS", 1 << 29, 1 << 30),
            limit("RLIMIT_RTPRIO", 5, 10),
            limit("RLIMIT_RTTIME", 60_000_000, 70_000_000),
            limit("RLIMIT_SIGPENDING", 300, 400),
            limit("RLIMIT_STACK", 1 << 22, 1 << 24),
        ];
        put(spec, "process/rlimits", json!(limits));
    }),
    any("process.rlimits: infinity", "rlimits", |spec, _| {
        let limits = [
            limit("RLIMIT_CORE", u64::MAX, u64::MAX),
            limit("RLIMIT_MEMLOCK", u64::MAX, u64::MAX),
            limit("RLIMIT_NOFILE", 1_000_000, 1_000_000),
        ];
        put(spec, "process/rlimits", json!(limits));
    }),
    any(
        "process.noNewPrivileges: false",
        "no-new-privileges",
        |spec, _| {
            put(spec, "process/noNewPrivileges", json!(false));
        },
    ),
    any("process.oomScoreAdj", "oom-score", |spec, _| {
        put(spec, "process/oomScoreAdj", json!(500));
    }),
    any("process.oomScoreAdj: negative", "oom-score", |spec, _| {
        put(spec, "process/oomScoreAdj", json!(-500));
    }),
    any("process.ioPriority", "io-priority", |spec, _| {
        let priority = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
        put(spec, "process/ioPriority", priority);
    }),
    any("process.ioPriority: idle", "io-priority", |spec, _| {
        let priority = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
        put(spec, "process/ioPriority", priority);
    }),
    any("process.scheduler: SCHED_BATCH", "scheduler", |spec, _| {
        let scheduler = json!({"policy": "SCHED_BATCH", "nice": 5});
        put(spec, "process/scheduler", scheduler);
    }),
    any("process.scheduler: SCHED_FIFO", "scheduler", |spec, _| {
        let scheduler = json!({"policy": "SCHED_FIFO", "priority": 10});
        put(spec, "process/scheduler", scheduler);
    }),
    any("process.scheduler: a flag", "scheduler", |spec, _| {
        let scheduler = json!({"policy": "SCHED_RR", "priority": 5,
            "flags": ["SCHED_FLAG_RESET_ON_FORK"]});
        put(spec, "process/scheduler", scheduler);
    }),
    any("process.execCPUAffinity", "affinity", |spec, _| {
        let affinity = json!({"initial": "0", "final": "0"});
        put(spec, "process/execCPUAffinity", affinity);
    }),
    any("hostname", "hostname", |spec, _| {
        put(spec, "hostname", json!("spec-host"));
    }),
    any("domainname", "domainname", |spec, _| {
        put(spec, "domainname", json!("spec.example"));
    }),
    any("linux.personality: LINUX32", "personality", |spec, _| {
        put(spec, "linux/personality", json!({"domain": "LINUX32"}));
    }),
    // Another document version means the same fields.
    any("ociVersion", "version", |spec, _| {
        put(spec, "ociVersion", json!("1.0.2"));
    }),
    single("process.args: not found", |spec, _| {
        put(spec, "process/args", json!(["/no/such/program"]));
    }),
    single("process.cwd: relative", |spec, _| {
        put(spec, "process/cwd", json!("work"));
    }),
];
