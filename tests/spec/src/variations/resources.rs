//! `linux.resources` and what is like it.

use serde_json::{Value, json};

use super::{add, any, put, single};
use crate::matrix::Variation;

fn set(spec: &mut Value, field: &str, value: Value) {
    put(spec, &format!("linux/resources/{field}"), value);
}

fn device_rule(spec: &mut Value, allow: bool, number: (u32, u32), access: &str) {
    let rule = json!({"allow": allow, "type": "c", "major": number.0, "minor": number.1,
        "access": access});
    add(spec, "linux/resources/devices", rule);
}

const MIB: i64 = 1024 * 1024;

pub const VARIATIONS: &[Variation] = &[
    any("linux.resources.devices: one more", "rules", |spec, _| {
        device_rule(spec, true, (10, 229), "rw");
    }),
    any(
        "linux.resources.devices: for reading",
        "rules",
        |spec, _| {
            device_rule(spec, true, (10, 200), "r");
        },
    ),
    any("linux.resources.devices: one denied", "rules", |spec, _| {
        device_rule(spec, true, (10, 229), "rw");
        device_rule(spec, false, (10, 229), "w");
    }),
    any(
        "linux.resources.devices: a default one denied",
        "rules",
        |spec, _| {
            device_rule(spec, false, (1, 7), "rw");
        },
    ),
    any("linux.resources.devices: all", "rules", |spec, _| {
        set(spec, "devices", json!([{"allow": true, "access": "rwm"}]));
    }),
    any("linux.resources.devices: absent", "rules", |spec, _| {
        super::remove(spec, "linux/resources", "devices");
    }),
    any("linux.resources.memory.limit", "memory", |spec, _| {
        set(spec, "memory/limit", json!(128 * MIB));
    }),
    any("linux.resources.memory.swap", "memory", |spec, _| {
        set(
            spec,
            "memory",
            json!({"limit": 96 * MIB, "swap": 160 * MIB}),
        );
    }),
    any("linux.resources.memory.swap: none", "memory", |spec, _| {
        set(spec, "memory", json!({"limit": 96 * MIB, "swap": 96 * MIB}));
    }),
    any(
        "linux.resources.memory.reservation",
        "reservation",
        |spec, _| {
            set(spec, "memory/reservation", json!(32 * MIB));
        },
    ),
    single("linux.resources.memory.kernel", |spec, _| {
        set(
            spec,
            "memory",
            json!({"limit": 128 * MIB, "kernel": 64 * MIB}),
        );
    }),
    single("linux.resources.memory.kernelTCP", |spec, _| {
        set(spec, "memory/kernelTCP", json!(64 * MIB));
    }),
    single("linux.resources.memory.swappiness", |spec, _| {
        set(spec, "memory/swappiness", json!(10));
    }),
    single("linux.resources.memory.disableOOMKiller", |spec, _| {
        set(spec, "memory/disableOOMKiller", json!(true));
    }),
    single("linux.resources.memory.useHierarchy: false", |spec, _| {
        set(spec, "memory/useHierarchy", json!(false));
    }),
    single("linux.resources.memory.checkBeforeUpdate", |spec, _| {
        set(
            spec,
            "memory",
            json!({"limit": 128 * MIB, "checkBeforeUpdate": true}),
        );
    }),
    any("linux.resources.cpu.shares", "shares", |spec, _| {
        set(spec, "cpu/shares", json!(512));
    }),
    any("linux.resources.cpu.shares: most", "shares", |spec, _| {
        set(spec, "cpu/shares", json!(262_144));
    }),
    any(
        "linux.resources.cpu.quota and period",
        "quota",
        |spec, _| {
            set(spec, "cpu/quota", json!(40000));
            set(spec, "cpu/period", json!(50000));
        },
    ),
    any("linux.resources.cpu.quota: none", "quota", |spec, _| {
        set(spec, "cpu/quota", json!(-1));
        set(spec, "cpu/period", json!(200_000));
    }),
    any("linux.resources.cpu.burst", "quota", |spec, _| {
        set(spec, "cpu/quota", json!(60000));
        set(spec, "cpu/period", json!(100_000));
        set(spec, "cpu/burst", json!(20000));
    }),
    any("linux.resources.cpu.cpus and mems", "cpuset", |spec, _| {
        set(spec, "cpu/cpus", json!("0"));
        set(spec, "cpu/mems", json!("0"));
    }),
    any("linux.resources.cpu.idle", "shares", |spec, _| {
        set(spec, "cpu/idle", json!(1));
    }),
    single("linux.resources.cpu.realtimeRuntime", |spec, _| {
        let realtime = json!({"realtimeRuntime": 10000, "realtimePeriod": 100_000});
        set(spec, "cpu", realtime);
    }),
    any("linux.resources.pids.limit", "pids", |spec, _| {
        set(spec, "pids/limit", json!(64));
    }),
    any("linux.resources.pids.limit: none", "pids", |spec, _| {
        set(spec, "pids/limit", json!(-1));
    }),
    single("linux.resources.blockIO.weight", |spec, _| {
        set(spec, "blockIO/weight", json!(300));
    }),
    single(
        "linux.resources.blockIO.throttleReadBpsDevice",
        |spec, _| {
            let throttle = json!([{"major": 7, "minor": 0, "rate": 1_048_576}]);
            set(spec, "blockIO/throttleReadBpsDevice", throttle);
        },
    ),
    any("linux.resources.hugepageLimits", "huge-pages", |spec, _| {
        let limits = json!([{"pageSize": "2MB", "limit": 4 * MIB}]);
        set(spec, "hugepageLimits", limits);
    }),
    single("linux.resources.network.classID", |spec, _| {
        set(spec, "network/classID", json!(1_048_577));
    }),
    any("linux.resources.unified", "unified", |spec, _| {
        set(
            spec,
            "unified",
            json!({"memory.high": "50331648", "memory.oom.group": "1"}),
        );
    }),
    single("linux.resources.unified: overrides", |spec, _| {
        set(spec, "pids/limit", json!(64));
        set(spec, "unified", json!({"pids.max": "77"}));
    }),
    single("linux.resources.unified: no such file", |spec, _| {
        set(spec, "unified", json!({"nothing.max": "1"}));
    }),
    any("linux.memoryPolicy", "memory-policy", |spec, _| {
        put(
            spec,
            "linux/memoryPolicy",
            json!({"mode": "MPOL_BIND", "nodes": "0"}),
        );
    }),
    single("linux.intelRdt", |spec, _| {
        put(
            spec,
            "linux/intelRdt",
            json!({"closID": "spec", "l3CacheSchema": "L3:0=f"}),
        );
    }),
];
