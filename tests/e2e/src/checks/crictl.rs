//! What a node's operator does with crictl: attach, logs, statistics, and taking pods away.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Check;
use crate::lab::Lab;

/// See the names.
pub const CHECKS: &[Check] = &[
    ("crictl_attaches_and_has_the_logs", attach),
    ("crictl_has_statistics_of_containers_and_pods", statistics),
    ("pods_taken_away_leave_nothing", taken_away),
    (
        "containers_of_a_pod_leave_its_file_server_as_it_was",
        many_in_one,
    ),
];

/// `pod NAME` and `container POD NAME CONFIGURATION COMMAND...` print an id.
const WORDS: &str = r#"
set -e
rm -rf /tmp/crictl; mkdir -p /tmp/crictl; cd /tmp/crictl
pod() {
    echo '{"metadata": {"name": "'$1'", "namespace": "e2e", "uid": "'$1'", "attempt": 0}, "log_directory": "/tmp/crictl",
      "linux": {"cgroup_parent": "/e2e", "security_context": {"namespace_options": {"network": 0, "pid": 1, "ipc": 0}}}}' >$1.json
    crictl runp --runtime bulkhead $1.json
}
container() { # the pod's name and id, then a name, fields, and a command in JSON
    echo '{"metadata": {"name": "'$3'", "attempt": 0}, "image": {"image": "docker.io/library/busybox:latest"},
      "command": '"$5"', "log_path": "'$3'.log", '"$4"'
      "linux": {"security_context": {"namespace_options": {"network": 0, "pid": 1, "ipc": 0}}}}' >$3.json
    local id; id=$(crictl create $2 $3.json $1.json); crictl start $id >/dev/null; echo $id
}
"#;

fn attach(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let printed = lab.succeed(&format!(
        r#"{WORDS}
pod=$(pod attach)
id=$(container attach $pod talker '"stdin": true, "stdin_once": true,' \
    '["sh", "-c", "echo to stderr >&2; while read line; do echo got $line; done; exit 7"]')
printf 'one\ntwo\n' | crictl attach --stdin $id
# It has ended with its input.
for n in $(seq 100); do [ "$(crictl inspect --output go-template --template '{{{{.status.state}}}}' $id)" != CONTAINER_EXITED ] || break; sleep 0.2; done
crictl inspect --output go-template --template '{{{{.status.exitCode}}}}' $id
crictl logs $id 2>&1 | sort
crictl rmp -fa >/dev/null"#
    ))?;
    ensure!(
        printed == "got one\ngot two\n7\ngot one\ngot two\nto stderr",
        "{printed}"
    );
    lab.expect_nothing_left(&before)
}

fn statistics(lab: &Lab) -> Result<()> {
    let printed = lab.succeed(&format!(
        r#"{WORDS}
pod=$(pod stats)
id=$(container stats $pod busy '' '["sh", "-c", "head -c 30000000 /dev/zero >/dev/shm/part; mv /dev/shm/part /dev/shm/held; while :; do :; done"]')
until crictl exec $id test -e /dev/shm/held; do sleep 0.2; done
# Usage is told by what has changed since it was last looked at.
crictl stats $id >/dev/null; crictl statsp $pod >/dev/null
crictl exec $id sh -c 'for n in 1 2 3 4 5 6 7 8 9; do :; done'
crictl stats --output json $id >container.json
crictl statsp --output json $pod >pod-stats.json
crictl rmp -fa >/dev/null"#
    ))?;
    ensure!(printed.is_empty(), "{printed}");
    let read = |file: &str| -> Result<Value> {
        let text = lab.succeed(&format!("cat /tmp/crictl/{file}"))?;
        serde_json::from_str(&text).context(text)
    };
    // Numbers of 64 bits are text (protobuf's JSON mapping).
    let number = |stats: &Value, pointer: &str| -> Result<u64> {
        let number = stats.pointer(pointer).and_then(Value::as_str);
        let number = number.with_context(|| format!("no {pointer} in {stats}"))?;
        Ok(number.parse()?)
    };
    for (file, of) in [
        ("container.json", "/stats/0"),
        ("pod-stats.json", "/stats/0/linux"),
    ] {
        let stats = read(file)?;
        let cpu = number(&stats, &format!("{of}/cpu/usageCoreNanoSeconds/value"))?;
        let memory = number(&stats, &format!("{of}/memory/workingSetBytes/value"))?;
        // What it holds, at the least; a pod's is that of its VM.
        ensure!(
            cpu > 0 && memory > 30_000_000,
            "{cpu} ns, {memory} bytes: {stats}"
        );
    }
    let stats = read("pod-stats.json")?;
    let interface = "/stats/0/linux/network/defaultInterface";
    ensure!(
        stats.pointer(&format!("{interface}/name")) == Some(&json!("eth0")),
        "{stats}"
    );
    let sent = number(&stats, &format!("{interface}/txBytes/value"))?;
    ensure!(sent > 0, "nothing was sent: {stats}");
    Ok(())
}

fn taken_away(lab: &Lab) -> Result<()> {
    let count = if lab.soak() { 100 } else { 1 };
    let before = lab.resources()?;
    for number in 0..count {
        lab.succeed(&format!(
            r#"{WORDS}
pod=$(pod away-{number})
for name in one two; do container away-{number} $pod $name '' '["sleep", "1000"]' >/dev/null; done
crictl rmp -fa >/dev/null"#
        ))?;
    }
    lab.expect_nothing_left(&before)
}

/// What the guest has looked at, the file server holds open: not for longer than
/// the container is there that looked.
fn many_in_one(lab: &Lab) -> Result<()> {
    let count = if lab.soak() { 100 } else { 2 };
    let printed = lab.succeed(&format!(
        r#"{WORDS}
pod=$(pod many)
run() {{
    id=$(container many $pod $1 '' '["sh", "-c", "find / -xdev >/dev/null; sleep 1000"]')
    until crictl exec $id true; do sleep 0.2; done
    crictl rm -f $id >/dev/null
}}
held() {{ for server in $(pgrep -x virtiofsd); do ls /proc/$server/fd | wc -l; done | xargs; wc -l </proc/self/mountinfo; }}
run first
held
for n in $(seq {count}); do run c$n; done
held
crictl rmp -fa >/dev/null"#
    ))?;
    let lines: Vec<_> = printed.lines().collect();
    ensure!(lines.len() == 4, "{printed}");
    ensure!(
        lines[..2] == lines[2..],
        "descriptors of the file servers, and mounts, after one container and after {count} more: {printed}"
    );
    Ok(())
}
