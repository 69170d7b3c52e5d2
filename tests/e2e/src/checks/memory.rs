//! A VM as large as its container may be, and what happens when that is full.

use anyhow::{Context, Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab, RUN};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("vm_has_the_size_that_its_container_asks_for", size),
    ("full_container_meets_the_guests_oom_killer_only", full),
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
