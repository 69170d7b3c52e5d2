//! A VM as large as its container may be, and what happens when that is full.

use anyhow::{Context, Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab, RUN};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("vm_has_the_size_that_its_container_asks_for", size),
    ("full_container_meets_the_guests_oom_killer_only", full),
    (
        "memory_of_a_pod_follows_its_containers_limits",
        follows_limits,
    ),
    ("pod_that_its_cgroup_has_no_room_for_is_refused", no_room),
];

/// Processors and MiB of memory of the guest, with these flags.
fn guest(lab: &Lab, flags: &str) -> Result<(u32, u32)> {
    let run = RUN.replace("--rm", &format!("--rm {flags}"));
    let shown = lab.succeed(&format!(
        "{run} size sh -c 'grep -c ^processor /proc/cpuinfo; awk \"/^MemTotal/ {{ print int(\\$2 / 1024) }}\" /proc/meminfo'"
    ))?;
    let (cpus, mib) = shown.split_once('\n').context(shown.clone())?;
    Ok((cpus.parse()?, mib.parse()?))
}

fn size(lab: &Lab) -> Result<()> {
    let host: u32 = lab.succeed("nproc")?.parse()?;
    let (cpus, mib) = guest(lab, "")?;
    ensure!(
        cpus == 1 && (450..512).contains(&mib),
        "by default: {cpus}, {mib}"
    );
    // More than the container may have, by what the guest needs itself.
    let (cpus, mib) = guest(lab, "--cpus 1.5 --memory-limit 1073741824")?;
    ensure!(
        cpus == host.min(2),
        "{cpus} CPUs for 1.5, {host} on the host"
    );
    ensure!((1024 + 32..1024 + 80).contains(&mib), "{mib} MiB for 1024");
    let (_, mib) = guest(lab, "--memory-limit 16777216")?;
    ensure!((80..128).contains(&mib), "{mib} MiB for 16");
    Ok(())
}

/// Fills page cache, a tmpfs and, until it is killed, anonymous memory.
const HUNGRY: &str = "rm -f /big /dev/shm/f
    dd if=/dev/zero of=/big bs=1M count=96 2>/dev/null; cat /big >/dev/null
    dd if=/dev/zero of=/dev/shm/f bs=1M count=40 2>/dev/null
    x=a; while :; do x=$x$x; done";

fn full(lab: &Lab) -> Result<()> {
    let rounds = if lab.soak() { 20 } else { 3 };
    let before = lab.resources()?;
    lab.succeed(&format!(
        "ctr run --detach --null-io --memory-limit 67108864 --runtime {BULKHEAD} {IMAGE} full sleep 100000"
    ))?;
    for round in 1..=rounds {
        let outcome = lab.run(&format!(
            "ctr task exec --exec-id hungry{round} full sh -c '{HUNGRY}'"
        ))?;
        ensure!(outcome.code == 137, "round {round}: {outcome:#?}");
        // The agent answers, and so does what else is in the container.
        let lives = lab.succeed(&format!(
            "ctr task exec --exec-id after{round} full echo lives"
        ))?;
        ensure!(lives == "lives", "round {round}: {lives}");
    }
    let shown = lab.succeed(&format!(
        "ctr task metrics full | awk '/oom_kill/ {{ print \"guest\", $2 }}' | head -n 1
         awk '/^oom_kill / {{ print \"host\", $2 }}' /sys/fs/cgroup/default/full/memory.events
         awk '{{ print \"limit\", $1 }}' /sys/fs/cgroup/default/full/memory.max
         {}",
        Lab::remove("full")
    ))?;
    let figure = |name: &str| -> Option<u64> {
        let line = shown.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    };
    ensure!(
        figure("guest").is_none_or(|kills| kills >= rounds),
        "{shown}"
    );
    ensure!(figure("host") == Some(0), "{shown}");
    // 3 times the VM's 129 MiB, and 256.
    ensure!(figure("limit") == Some(643 << 20), "{shown}");
    lab.expect_nothing_left(&before)
}

/// Writes a number for ever: it stops when its memory is taken from it.
const WORK: &str = "i=0; while :; do i=$((i+1)); echo $i >/tmp/m; mv /tmp/m /tmp/n; done";

/// `MemTotal` of the guest in MiB, once it is within the range.
fn total_within(lab: &Lab, container: &str, least: u32, most: u32) -> Result<u32> {
    let shown = lab.succeed(&format!(
        "for try in $(seq 300); do
             mib=$(crictl exec {container} awk '/^MemTotal/ {{ print int($2 / 1024) }}' /proc/meminfo)
             [ \"$mib\" -ge {least} ] && [ \"$mib\" -lt {most} ] && break
             sleep 0.2
         done
         echo $mib"
    ))?;
    let mib = shown.parse().context(shown)?;
    ensure!(
        (least..most).contains(&mib),
        "MemTotal is {mib} MiB, and is to be {least} to {most}"
    );
    Ok(mib)
}

/// Anonymous memory that the pod takes on the host, in MiB, and the node's
/// `MemAvailable`.
fn on_the_node(lab: &Lab) -> Result<(u64, u64)> {
    let shown = lab.succeed(
        "awk '/^anon / { print int($2 / 1048576) }' /sys/fs/cgroup/e2e-memory/bulkhead-*/memory.stat
         awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo",
    )?;
    let (anon, available) = shown.split_once('\n').context(shown.clone())?;
    Ok((anon.parse()?, available.parse()?))
}

fn follows_limits(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let container = container();
    let ids = lab.succeed(&format!(
        "mkdir -p /tmp/memory && cd /tmp/memory
         echo '{POD}' >pod.json
         echo '{container}' >w.json
         pod=$(crictl runp --runtime bulkhead pod.json)
         id=$(crictl create $pod w.json pod.json) && crictl start $id >/dev/null && echo $pod $id"
    ))?;
    let (pod, id) = ids.split_once(' ').context(ids.clone())?;
    let update = |mib: u64| lab.succeed(&format!("crictl update --memory {} {id}", mib << 20));
    let small = total_within(lab, id, 450, 512)?;
    update(512)?;
    // 512, 8 of page structures and 64 of its own, in steps of the device.
    let larger = total_within(lab, id, small + 60, small + 60 + 128)?;
    update(1024)?;
    let largest = total_within(lab, id, 1024, 1024 + 64 + 128)?;
    let (_, available_before) = on_the_node(lab)?;
    lab.succeed(&format!(
        "crictl exec {id} dd if=/dev/zero of=/dev/null bs=700M count=1"
    ))?;
    // Until the guest has told what it has freed.
    let (used, _) = on_the_node(lab)?;
    update(256)?;
    let again = total_within(lab, id, small - 1, small + 2)?;
    let (kept, available_after) = on_the_node(lab)?;
    println!(
        "MemTotal {small}, {larger}, {largest}, {again} MiB; the pod's memory on the host {used}, \
         then {kept}; MemAvailable {available_before}, then {available_after}"
    );
    ensure!(kept < 512, "{kept} MiB after all but 512 were given back");
    ensure!(
        available_after + 256 > available_before,
        "MemAvailable {available_before}, then {available_after}"
    );
    lab.succeed(&format!(
        "one=$(crictl exec {id} cat /tmp/n); sleep 3; two=$(crictl exec {id} cat /tmp/n)
         [ $one -lt $two ] && crictl rmp -f {pod}"
    ))?;
    lab.expect_nothing_left(&before)
}

fn no_room(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let container = container();
    lab.succeed(&format!(
        "mkdir -p /tmp/memory /sys/fs/cgroup/e2e-memory && cd /tmp/memory
         echo '{POD}' >pod.json; echo '{container}' >w.json
         echo 150M >/sys/fs/cgroup/e2e-memory/memory.max"
    ))?;
    lab.fails_saying(
        "set overhead.podFixed.memory of its RuntimeClass to 192Mi",
        "crictl runp --runtime bulkhead /tmp/memory/pod.json",
    )?;
    lab.run("crictl rmp -fa")?;
    // As a RuntimeClass with that overhead grants it.
    let shown = lab.succeed(
        "echo 448M >/sys/fs/cgroup/e2e-memory/memory.max; cd /tmp/memory
         pod=$(crictl runp --runtime bulkhead pod.json)
         id=$(crictl create $pod w.json pod.json) && crictl start $id >/dev/null
         crictl exec $id dd if=/dev/zero of=/dev/null bs=200M count=1 2>/dev/null
         crictl exec $id awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo
         awk '/^oom_kill / { print $2 }' /sys/fs/cgroup/e2e-memory/memory.events
         crictl rmp -f $pod >/dev/null; rmdir /sys/fs/cgroup/e2e-memory",
    )?;
    let (mib, kills) = shown.split_once('\n').context(shown.clone())?;
    let mib: u32 = mib.parse().context(shown.clone())?;
    ensure!((320..384).contains(&mib) && kills == "0", "{shown}");
    lab.expect_nothing_left(&before)
}

const POD: &str = r#"{
  "metadata": { "name": "memory", "namespace": "e2e", "uid": "e2e-memory", "attempt": 0 },
  "log_directory": "/tmp/memory/logs",
  "linux": { "cgroup_parent": "/e2e-memory" }
}"#;

fn container() -> String {
    CONTAINER.replace("WORK", WORK)
}

const CONTAINER: &str = r#"{
  "metadata": { "name": "w" },
  "image": { "image": "docker.io/library/busybox:latest" },
  "command": ["sh", "-c", "WORK"],
  "log_path": "w.log",
  "linux": { "resources": { "memory_limit_in_bytes": 268435456 } }
}"#;
