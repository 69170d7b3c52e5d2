//! Pods through crictl: two containers, one VM, on each containerd.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::Lab;

/// See the names.
pub const CHECKS: &[Check] = &[
    (
        "pod_survives_its_containers_and_a_restart_on_containerd_2_4",
        on_2_4,
    ),
    (
        "pod_survives_its_containers_and_a_restart_on_containerd_2_3",
        on_2_3,
    ),
    (
        "pod_survives_its_containers_and_a_restart_on_containerd_1_7",
        on_1_7,
    ),
    (
        "pod_of_the_shims_sandboxer_survives_its_containers_and_a_restart_on_containerd_2_4",
        sandboxer_on_2_4,
    ),
    (
        "pod_of_the_shims_sandboxer_survives_its_containers_and_a_restart_on_containerd_2_3",
        sandboxer_on_2_3,
    ),
];

fn on_2_4(lab: &Lab) -> Result<()> {
    grouping(lab, "2.4")
}

fn on_2_3(lab: &Lab) -> Result<()> {
    grouping(lab, "2.3")
}

fn on_1_7(lab: &Lab) -> Result<()> {
    grouping(lab, "1.7")
}

fn sandboxer_on_2_4(lab: &Lab) -> Result<()> {
    sandboxer(lab, "2.4")
}

fn sandboxer_on_2_3(lab: &Lab) -> Result<()> {
    sandboxer(lab, "2.3")
}

/// The same with `sandboxer = "shim"`, and no pause container.
fn sandboxer(lab: &Lab, version: &str) -> Result<()> {
    let choose = |from: &str, to: &str| {
        format!(
            "sed -i 's/sandboxer = \"{from}\"/sandboxer = \"{to}\"/' /etc/containerd/{version}.toml"
        )
    };
    lab.succeed(&choose("podsandbox", "shim"))?;
    let outcome = grouping(lab, version).and_then(|()| {
        lab.succeed(&format!("containerd-use {version}"))?;
        shared_files(lab)
    });
    lab.run("crictl rmp -fa")?;
    lab.succeed(&format!(
        "{}; containerd-use 2.4",
        choose("shim", "podsandbox")
    ))?;
    outcome
}

/// What CRI leaves to the shim then: names, resolver, shared memory; and what it asks
/// of the pod.
fn shared_files(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let shown = lab.succeed(&format!(
        "rm -rf /tmp/pod && mkdir -p /tmp/pod && cd /tmp/pod
         echo '{POD}' | sed 's/\"linux\": {{/\"dns_config\": {{ \"servers\": [\"192.0.2.53\"], \"searches\": [\"e2e.test\"] }}, &\
             \"cgroup_parent\": \"\\/e2e\",/' >pod.json
         for name in one two; do echo '{CONTAINER}' | sed \"s/NAME/$name/\" >$name.json; done
         pod=$(crictl runp --runtime bulkhead pod.json)
         one=$(crictl create $pod one.json pod.json); two=$(crictl create $pod two.json pod.json)
         crictl start $one $two >/dev/null
         crictl exec $one sh -c 'cat /etc/hostname /etc/resolv.conf; grep -c localhost /etc/hosts; echo kept >/dev/shm/x'
         crictl exec $two cat /dev/shm/x
         crictl statsp $pod | tail -n 1 | cut -d' ' -f1
         crictl pods --state ready -q | grep -c .
         kill -KILL $(pgrep -x bulkhead-vmm)
         for try in $(seq 300); do crictl pods --state notready -q | grep -q . && break; sleep 0.1; done
         crictl pods --state notready -q | grep -c .
         crictl rmp -fa >/dev/null"
    ))?;
    let lines: Vec<_> = shown.lines().collect();
    ensure!(lines.len() == 8, "{shown}");
    ensure!(
        lines[..3] == ["podhost", "search e2e.test", "nameserver 192.0.2.53"],
        "{shown}"
    );
    ensure!(lines[3] != "0" && lines[4] == "kept", "{shown}");
    ensure!(lines[5] == "pod" && lines[6..] == ["1", "1"], "{shown}");
    lab.expect_nothing_left(&before)
}

fn grouping(lab: &Lab, version: &str) -> Result<()> {
    lab.succeed(&format!("containerd-use {version}"))?;
    let outcome = live(lab);
    lab.run("crictl rmp -fa")?;
    let restored = lab.succeed("containerd-use 2.4");
    outcome?;
    restored.map(drop)
}

/// The life of a pod of two containers.
fn live(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let pod = lab.succeed(&format!(
        "rm -rf /tmp/pod && mkdir -p /tmp/pod && cd /tmp/pod
         echo '{POD}' >pod.json
         for name in one two three; do
             echo '{CONTAINER}' | sed \"s/NAME/$name/\" >$name.json
         done
         crictl runp --runtime bulkhead pod.json"
    ))?;
    let monitor = vm(lab)?;
    let one = start(lab, &pod, "one")?;
    let two = start(lab, &pod, "two")?;
    same_vm(lab, &pod, &monitor, "with two containers")?;
    shared_namespaces(lab, &pod)?;

    lab.succeed(&format!("crictl rm -f {one}"))?;
    same_vm(lab, &pod, &monitor, "after one container is gone")?;
    lab.succeed("containerd-use restart")?;
    same_vm(lab, &pod, &monitor, "after containerd restarted")?;
    let state = lab.succeed(&format!("crictl inspect {two} | grep -o CONTAINER_RUNNING"))?;
    ensure!(state == "CONTAINER_RUNNING", "{state}");
    lab.succeed(&format!("crictl rm -f {two}"))?;
    same_vm(lab, &pod, &monitor, "after both containers are gone")?;
    let three = start(lab, &pod, "three")?;
    same_vm(lab, &pod, &monitor, "with a third container")?;
    lab.succeed(&format!("crictl rm -f {three}; crictl rmp -f {pod}"))?;
    lab.expect_nothing_left(&before)
}

fn start(lab: &Lab, pod: &str, name: &str) -> Result<String> {
    lab.succeed(&format!(
        "cd /tmp/pod && id=$(crictl create {pod} {name}.json pod.json) && crictl start $id"
    ))
}

/// The pid of the one monitor.
fn vm(lab: &Lab) -> Result<String> {
    let pids = lab.succeed("pgrep -x bulkhead-vmm")?;
    ensure!(pids.lines().count() == 1, "not one VM: {pids}");
    Ok(pids)
}

fn same_vm(lab: &Lab, pod: &str, monitor: &str, when: &str) -> Result<()> {
    let now = vm(lab)?;
    ensure!(now == monitor, "another VM {when}: {now}, was {monitor}");
    let state = lab.succeed(&format!(
        "crictl inspectp {pod} | grep -o 'SANDBOX_[A-Z]*' | head -n 1"
    ))?;
    ensure!(state == "SANDBOX_READY", "{state} {when}");
    Ok(())
}

/// Both containers see the pod's hostname, and each only its own processes.
fn shared_namespaces(lab: &Lab, pod: &str) -> Result<()> {
    let logs = lab.succeed(&format!(
        "for id in $(crictl ps -q --pod {pod}); do
             for try in $(seq 300); do crictl logs $id 2>/dev/null | grep -q '^ns' && break; sleep 0.1; done
             crictl logs $id
         done"
    ))?;
    let lines: Vec<&str> = logs.lines().filter(|line| line.starts_with("ns")).collect();
    ensure!(lines.len() == 2, "{logs}");
    ensure!(
        lines[0] == lines[1],
        "net, ipc and uts are not the pod's: {logs}"
    );
    let named = ["net:[", "ipc:[", "uts:["];
    ensure!(named.iter().all(|kind| lines[0].contains(kind)), "{logs}");
    ensure!(lines[0].ends_with("podhost"), "hostname: {logs}");
    let set = logs.lines().filter(|line| *line == "sysctls 1 80").count();
    ensure!(set == 2, "the pod's sysctls: {logs}");
    sized(&logs)?;
    let alone = logs.lines().filter(|line| *line == "pid 1").count();
    ensure!(alone == 2, "a container is not pid 1 of its own: {logs}");
    Ok(())
}

/// 700 MiB, which the pod is limited to, fit into the VM, and not much more.
fn sized(logs: &str) -> Result<()> {
    let sizes = logs
        .lines()
        .filter_map(|line| line.strip_prefix("MemTotal:"));
    let sizes: Vec<_> = sizes.collect();
    ensure!(sizes.len() == 2, "{logs}");
    for size in sizes {
        let kib: u64 = size.trim().trim_end_matches("kB").trim().parse()?;
        ensure!((700..776).contains(&(kib / 1024)), "the VM has {size}");
    }
    Ok(())
}

const POD: &str = r#"{
  "metadata": { "name": "pod", "namespace": "e2e", "uid": "e2e-pod", "attempt": 0 },
  "hostname": "podhost", "log_directory": "/tmp/pod/logs",
  "linux": {
    "sysctls": { "kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "80" },
    "security_context": { "namespace_options": { "network": 0, "pid": 1, "ipc": 0 } },
    "resources": { "memory_limit_in_bytes": 734003200 }
  }
}"#;

const CONTAINER: &str = r#"{
  "metadata": { "name": "NAME", "attempt": 0 },
  "image": { "image": "docker.io/library/busybox:latest" },
  "command": ["sh", "-c",
    "echo pid $$; grep MemTotal /proc/meminfo; echo sysctls $(cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start); echo ns $(for ns in net ipc uts; do readlink /proc/self/ns/$ns; done) $(hostname); exec sleep 1000"],
  "log_path": "NAME.log",
  "linux": { "security_context": { "namespace_options": { "network": 0, "pid": 1, "ipc": 0 } } }
}"#;
