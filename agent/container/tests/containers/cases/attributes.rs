//! What a process inherits: scheduling, execution domain, clocks, masks.

use serde_json::{Value, json};

use super::exec::end;
use crate::fixture::{Host, Outcome, read_until, wait};

/// The 41st field of /proc/PID/stat after the name is the policy (proc(5)).
fn policy(stat: &str) -> &str {
    let fields = stat.rsplit_once(") ").unwrap().1;
    fields.split(' ').nth(38).unwrap()
}

fn nice(stat: &str) -> &str {
    let fields = stat.rsplit_once(") ").unwrap().1;
    fields.split(' ').nth(16).unwrap()
}

fn field<'a>(outcome: &'a Outcome, name: &str) -> &'a str {
    let status = outcome.of("cat /proc/self/status");
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_once(":\t").unwrap().1
}

pub fn run_scheduler(host: &Host) {
    let stat = "cat /proc/self/stat";
    let priority = format!("number {} 1 0", libc::SYS_ioprio_get);
    for (scheduler, number) in [
        (json!({"policy": "SCHED_OTHER", "nice": 5}), "0"),
        (
            json!({"policy": "SCHED_FIFO", "priority": 3, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}),
            "1",
        ),
        (json!({"policy": "SCHED_RR", "priority": 4}), "2"),
        (json!({"policy": "SCHED_BATCH", "nice": 7}), "3"),
        (json!({"policy": "SCHED_IDLE"}), "5"),
        (
            json!({"policy": "SCHED_DEADLINE", "runtime": 10_000_000, "deadline": 20_000_000,
                   "period": 20_000_000, "flags": ["SCHED_FLAG_RECLAIM", "SCHED_FLAG_DL_OVERRUN"]}),
            "6",
        ),
    ] {
        let mut spec = host.spec("a", &[stat, &priority]);
        spec["process"]["scheduler"] = scheduler.clone();
        spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_RT", "priority": 3});
        let outcome = host.run("a", &spec);
        assert_eq!(policy(outcome.of(stat)), number, "{scheduler}");
        assert_eq!(outcome.of(&priority), (1 << 13 | 3).to_string());
        if let Some(wanted) = scheduler.get("nice") {
            assert_eq!(nice(outcome.of(stat)), wanted.to_string());
        }
    }
    // Also where the process itself could not.
    let mut spec = host.spec("a", &[stat]);
    std::os::unix::fs::chown(
        host.share().join("containers/a/rootfs"),
        Some(200_000),
        Some(200_000),
    )
    .unwrap();
    super::user_namespaces::map(&mut spec);
    spec["process"]["scheduler"] = json!({"policy": "SCHED_FIFO", "priority": 3});
    assert_eq!(policy(host.run("a", &spec).of(stat)), "1");

    let mut spec = host.spec("a", &["exit 0"]);
    spec["process"]["scheduler"] =
        json!({"policy": "SCHED_DEADLINE", "runtime": 3, "deadline": 2, "period": 1});
    let error = host.create_error("a", &spec);
    assert_eq!(error, "cannot set process.scheduler to SCHED_DEADLINE");
}

pub fn exec_scheduling(host: &Host) {
    let lines = ["cat /proc/self/stat", "cat /proc/self/status"];
    let spec = host.spec("a", &["pid", "sleep"]);
    let (container, mut reader) = host.create("a", &spec).unwrap();
    container.init().start().unwrap();
    read_until(&mut reader, "pid");
    let mut process = Host::process(&spec, &lines);
    process["scheduler"] = json!({"policy": "SCHED_BATCH"});
    process["execCPUAffinity"] = json!({"initial": "0"});
    let outcome = Host::run_exec(&container, &process);
    assert_eq!(policy(outcome.of(lines[0])), "3");
    assert_eq!(field(&outcome, "Cpus_allowed_list"), "0");
    process["execCPUAffinity"] = json!({"initial": "0", "final": "1"});
    let outcome = Host::run_exec(&container, &process);
    assert_eq!(field(&outcome, "Cpus_allowed_list"), "1");
    process["execCPUAffinity"] = json!({"final": "1000"});
    let error = Host::exec(&container, &process).err().unwrap().to_string();
    assert!(
        error.contains("process.execCPUAffinity to \"1000\""),
        "{error}"
    );
    end(&container);
}

pub fn run_execution_domain(host: &Host) {
    let lines = ["number 135 4294967295", "mempolicy", "sleep"];
    let mut spec = host.spec("a", &lines);
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    spec["linux"]["memoryPolicy"] =
        json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]});
    let (container, mut reader) = match host.create("a", &spec) {
        Err(error) if error.to_string().contains("linux.memoryPolicy") => {
            // A kernel without CONFIG_NUMA has no such call.
            spec["linux"]
                .as_object_mut()
                .unwrap()
                .remove("memoryPolicy");
            host.create("a", &spec).unwrap()
        }
        created => created.unwrap(),
    };
    container.init().start().unwrap();
    let output = read_until(&mut reader, "mempolicy\n");
    assert!(output.contains("== number 135 4294967295\n8\n"), "{output}");
    let outcome = Host::run_exec(&container, &Host::process(&spec, &lines[..2]));
    assert_eq!(outcome.of(lines[0]), "8");
    if spec["linux"].get("memoryPolicy").is_some() {
        assert_eq!(outcome.of("mempolicy"), (2 | 1 << 15).to_string());
    }
    end(&container);
}

pub fn run_time_offsets(host: &Host) {
    let lines = [
        "clock 1",
        "clock 7",
        "cat /proc/self/timens_offsets",
        "link /proc/self/ns/time",
        "sleep",
    ];
    let mut spec = host.spec("a", &lines);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] = json!({
        "monotonic": {"secs": 1_000_000, "nanosecs": 5},
        "boottime": {"secs": 2_000_000},
    });
    let before = std::fs::read_to_string("/proc/uptime").unwrap();
    let before: f64 = before.split(' ').next().unwrap().parse().unwrap();
    let (container, mut reader) = host.create("a", &spec).unwrap();
    container.init().start().unwrap();
    let mut output = read_until(&mut reader, "ns/time\n");
    if !output.ends_with("]\n") {
        output += &read_until(&mut reader, "]\n");
    }
    let of_init = Outcome {
        output,
        status: std::process::ExitStatus::default(),
        warnings: Vec::new(),
    };
    let second = |line: &str| of_init.of(line).parse::<f64>().unwrap();
    assert!(second("clock 1") >= 1_000_000.0, "{}", of_init.output);
    assert!((second("clock 7") - before - 2_000_000.0).abs() < 60.0);
    let exec = Host::run_exec(&container, &Host::process(&spec, &lines[..4]));
    assert_eq!(
        exec.of("link /proc/self/ns/time"),
        of_init.of("link /proc/self/ns/time")
    );
    assert!(exec.of("clock 1").parse::<f64>().unwrap() >= 1_000_000.0);
    end(&container);
}

pub fn run_rootfs_propagation(host: &Host) {
    let line = "cat /proc/self/mountinfo";
    for (word, tag) in [
        ("shared", "shared:"),
        ("rshared", "shared:"),
        ("private", ""),
        ("rprivate", ""),
        ("slave", ""),
        ("rslave", ""),
        ("unbindable", "unbindable"),
        ("runbindable", "unbindable"),
    ] {
        let mut spec = host.spec("a", &[line]);
        spec["linux"]["rootfsPropagation"] = Value::from(word);
        let outcome = host.run("a", &spec);
        let of = |target: &str| {
            let mounts = outcome.of(line).lines();
            let mut targets = mounts.filter(|line| line.split(' ').nth(4) == Some(target));
            let found = targets.next().unwrap().split(" - ").next().unwrap();
            found.split(' ').skip(6).collect::<Vec<_>>().join(" ")
        };
        let recursive = word.starts_with('r');
        let below = if recursive { tag } else { "" };
        for (target, tag) in [("/", tag), ("/proc", below)] {
            let found = of(target);
            assert_eq!(
                found.starts_with(tag),
                !tag.is_empty() || found.is_empty(),
                "{word} {target} {found:?}"
            );
            assert_eq!(
                found.is_empty(),
                tag.is_empty(),
                "{word} {target} {found:?}"
            );
        }
    }
}

pub fn start_hooks(host: &Host) {
    let mut spec = host.spec("a", &["cat /state", "cat /env", "pid"]);
    let hook = |line: &str| json!({"path": "/payload", "args": ["hook", line], "env": ["A=b"]});
    spec["annotations"] = json!({"key": "value"});
    spec["hooks"] = json!({"startContainer": [hook("copy-input /state"), hook("copy-env /env")]});
    let outcome = host.run("a", &spec);
    let state: Value = serde_json::from_str(outcome.of("cat /state")).unwrap();
    let wanted = json!({"ociVersion": spec["ociVersion"], "id": "a", "status": "created", "pid": 1,
                        "bundle": "/the/bundle", "annotations": {"key": "value"}});
    assert_eq!(state, wanted);
    assert_eq!(outcome.of("cat /env"), "A=b");
    assert_eq!(outcome.of("pid"), "1");

    // Under the same filter and without the same privileges as the program.
    let mut confined = host.spec("a", &["cat /status"]);
    confined["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    confined["process"]["capabilities"] = json!({});
    confined["linux"]["seccomp"] = super::process::profile();
    confined["hooks"] = json!({"startContainer": [hook("copy /proc/self/status /run/status")]});
    let mounts = confined["mounts"].as_array_mut().unwrap();
    let run = mounts
        .iter_mut()
        .find(|mount| mount["destination"] == "/run");
    run.unwrap()["options"] = json!(["mode=1777"]);
    confined["process"]["args"][1] = json!("cat /run/status");
    let outcome = host.run("a", &confined);
    let status = outcome.of("cat /run/status");
    for line in [
        "Uid:\t1000\t1000",
        "CapEff:\t0000000000000000",
        "Seccomp:\t2",
        "NoNewPrivs:\t1",
    ] {
        assert!(status.contains(line), "{line}: {status}");
    }

    let failure = |hook: Value| {
        let mut spec = host.spec("a", &["exit 0"]);
        spec["hooks"] = json!({"startContainer": [hook]});
        let (container, _reader) = host.create("a", &spec).unwrap();
        let error = container.init().start().unwrap_err().to_string();
        container.delete().unwrap();
        wait(container.init().pid());
        error
    };
    let error = failure(json!({"path": "/payload", "args": ["hook", "pid", "exit 9"]}));
    assert!(error.contains("hook /payload ended with 9 "), "{error}");
    assert!(error.contains("output: == pid\n2"), "{error}");
    let error = failure(json!({"path": "/no/such"}));
    assert!(error.contains("hook /no/such ended with 126 "), "{error}");
    assert!(error.contains("ENOENT"), "{error}");
    let error = failure(json!({"path": "/payload", "args": ["hook", "sleep"], "timeout": 1}));
    assert!(
        error.contains("did not end within its timeout of 1 s"),
        "{error}"
    );
}
