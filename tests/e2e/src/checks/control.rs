//! A running container stopped for a while, measured, and given other limits.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("pause_stops_the_container_until_resume", pause),
    ("stats_are_the_containers", stats),
    ("update_changes_the_limits_in_the_guest", update),
    ("out_of_memory_is_told_before_the_exit", out_of_memory),
];

/// Runs `script` beside a container of ctr that counts in its file `/n`.
fn beside(lab: &Lab, id: &str, script: &str) -> Result<String> {
    let before = lab.resources()?;
    let shown = lab.succeed(&format!(
        "ctr run --detach --null-io --runtime {BULKHEAD} {IMAGE} {id} \\
             sh -c 'i=0; while :; do i=$((i+1)); echo $i >/n; sleep 0.1; done'
         root=/proc/$(ctr task ls | awk '$1 == \"{id}\" {{ print $2 }}')/root
         until [ -s $root/n ]; do sleep 0.1; done
         {script}
         {}",
        Lab::remove(id)
    ))?;
    lab.expect_nothing_left(&before)?;
    Ok(shown)
}

fn pause(lab: &Lab) -> Result<()> {
    let shown = beside(
        lab,
        "paused",
        "ctr task pause paused; ctr task ls | awk '$1 == \"paused\" { print $3 }'
         was=$(cat $root/n); sleep 2; [ \"$(cat $root/n)\" = \"$was\" ] && echo stands
         ctr task exec --exec-id no paused true 2>/dev/null || echo refused
         ctr task resume paused; ctr task ls | awk '$1 == \"paused\" { print $3 }'
         until [ \"$(cat $root/n)\" != \"$was\" ]; do sleep 0.1; done; echo runs
         ctr task pause paused",
    )?;
    // It is left paused: a kill must end it all the same.
    ensure!(shown == "PAUSED\nstands\nrefused\nRUNNING\nruns", "{shown}");
    Ok(())
}

fn stats(lab: &Lab) -> Result<()> {
    let shown = beside(
        lab,
        "measured",
        "ctr task metrics measured | awk '/^(pids.current|cpu.usage_usec) / { print $1, $2 }'",
    )?;
    let figures: Vec<(&str, u64)> = shown
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, figure)| Some((name, figure.parse().ok()?)))
        .collect();
    ensure!(
        matches!(figures[..], [("pids.current", 1..=2), ("cpu.usage_usec", usage)] if usage > 0),
        "{shown}"
    );
    Ok(())
}

/// Through nerdctl, since ctr has no command for it.
fn update(lab: &Lab) -> Result<()> {
    let nerdctl = format!("nerdctl run --pull never --runtime {BULKHEAD}");
    lab.make_bridge()?;
    let before = lab.resources()?;
    let shown = lab.succeed(&format!(
        "{nerdctl} -d --name updated {IMAGE} sleep 1000 >/dev/null
         limits() {{ nerdctl exec updated sh -c 'cd /sys/fs/cgroup; echo $(cat memory.max pids.max)'; }}
         nerdctl update -m 64m --pids-limit 8 updated >/dev/null; limits
         nerdctl update -m 128m --pids-limit 20 updated >/dev/null; limits
         nerdctl rm -f updated >/dev/null"
    ))?;
    ensure!(shown == "67108864 8\n134217728 20", "{shown}");
    lab.expect_nothing_left(&before)
}

fn out_of_memory(lab: &Lab) -> Result<()> {
    let log = lab.succeed(&format!(
        "ctr events >/tmp/oom.events & watcher=$!; sleep 1
         ctr run --rm --memory-limit 33554432 --runtime {BULKHEAD} {IMAGE} hungry \\
             sh -c 'x=a; while :; do x=$x$x; done'; echo code $?
         until grep -q /tasks/delete /tmp/oom.events; do sleep 0.1; done
         kill $watcher
         grep hungry /tmp/oom.events | grep -o '/tasks/[a-z]*'"
    ))?;
    let wanted = "code 137\n/tasks/create\n/tasks/start\n/tasks/oom\n/tasks/exit\n/tasks/delete";
    ensure!(log == wanted, "{log}");
    Ok(())
}
