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
        "mkdir -p /tmp/pod && cd /tmp/pod
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
    "echo pid $$; grep MemTotal /proc/meminfo; echo sysctls $(cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start); echo ns $(readlink /proc/self/ns/net /proc/self/ns/ipc /proc/self/ns/uts) $(hostname); exec sleep 1000"],
  "log_path": "NAME.log",
  "linux": { "security_context": { "namespace_options": { "network": 0, "pid": 1, "ipc": 0 } } }
}"#;
