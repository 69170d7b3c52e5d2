//! One container: its kernel, exit code, output, input and events.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab, RUN};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("ctr_run_prints_the_guest_kernel", guest_kernel),
    ("ctr_run_exit_code_is_the_containers", ctr_exit_code),
    ("nerdctl_run_exit_code_is_the_containers", nerdctl_exit_code),
    ("output_of_20_million_bytes_arrives_whole", large_output),
    ("input_through_a_pipe_ends_with_it", piped_input),
    ("events_come_in_order_with_pid_and_status", events),
    ("task_pid_is_a_stand_in", stand_in),
    ("clock_of_the_guest_is_the_hosts", clock),
];

fn guest_kernel(lab: &Lab) -> Result<()> {
    let guest = lab.succeed(&format!("{RUN} kernel uname -r"))?;
    let node = lab.succeed("uname -r")?;
    ensure!(
        guest.starts_with("6.12."),
        "not the guest's kernel: {guest}"
    );
    ensure!(
        guest != node,
        "the container runs on the node's kernel {node}"
    );
    Ok(())
}

fn ctr_exit_code(lab: &Lab) -> Result<()> {
    lab.expect_code(42, &format!("{RUN} exit sh -c 'exit 42'"))
}

fn nerdctl_exit_code(lab: &Lab) -> Result<()> {
    lab.expect_code(
        42,
        &format!("nerdctl run --rm --pull never --runtime {BULKHEAD} {IMAGE} sh -c 'exit 42'"),
    )
}

fn large_output(lab: &Lab) -> Result<()> {
    let counted = lab.succeed(&format!(
        "{RUN} large dd if=/dev/zero bs=20000 count=1000 | wc -c"
    ))?;
    ensure!(counted == "20000000", "{counted} bytes arrived");
    Ok(())
}

fn piped_input(lab: &Lab) -> Result<()> {
    let echoed = lab.succeed(&format!(
        "echo hi | nerdctl run --rm -i --pull never --runtime {BULKHEAD} {IMAGE} cat"
    ))?;
    ensure!(echoed == "hi", "cat printed {echoed:?}");
    Ok(())
}

fn events(lab: &Lab) -> Result<()> {
    // `ctr events` prints a line per event: its topic, then the event as JSON.
    let log = lab.succeed(&format!(
        "ctr events >/tmp/events & watcher=$!
         until ctr events --help >/dev/null; do :; done; sleep 1
         ctr run --detach --runtime {BULKHEAD} {IMAGE} events sh -c 'read never; exit 5' </dev/null
         ctr task ls | awk '$1 == \"events\" {{ print $2 }}' >/tmp/events.pid
         ctr task kill -s KILL events >/dev/null 2>&1 || true
         until ctr task ls | grep -q 'events.*STOPPED'; do sleep 0.2; done
         ctr task delete events >/dev/null 2>&1 || true
         ctr container delete events
         sleep 1; kill $watcher
         grep -o '/tasks/[a-z-]* {{.*}}' /tmp/events"
    ))?;
    let topics: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("\"events\""))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    ensure!(
        topics
            == [
                "/tasks/create",
                "/tasks/start",
                "/tasks/exit",
                "/tasks/delete"
            ],
        "order of events: {topics:?}\n{log}"
    );
    let pid = lab.succeed("cat /tmp/events.pid")?;
    let carry_pid = log
        .lines()
        .filter(|line| line.contains(&format!("\"pid\":{pid}")))
        .count();
    ensure!(carry_pid == 4, "pid {pid} is in {carry_pid} events\n{log}");
    Ok(())
}

fn stand_in(lab: &Lab) -> Result<()> {
    let facts = lab.succeed(&format!(
        "ctr run --detach --runtime {BULKHEAD} {IMAGE} standin sleep 1000
         pid=$(ctr task ls | awk '$1 == \"standin\" {{ print $2 }}')
         tr '\\0' ' ' </proc/$pid/cmdline; echo
         grep -E '^(Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs):' /proc/$pid/status
         ls /proc/$pid/root/bin/busybox
         touch /proc/$pid/root/tmp/from-host
         {}
         ls /proc/$pid 2>&1 | head -n 1",
        Lab::remove("standin")
    ))?;
    let zero = "0000000000000000";
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        ensure!(facts.contains(&format!("{set}:\t{zero}")), "{set}: {facts}");
    }
    ensure!(facts.contains("NoNewPrivs:\t1"), "{facts}");
    ensure!(
        !facts.contains("bulkhead-vmm"),
        "the VMM's pid is shown: {facts}"
    );
    ensure!(
        facts.ends_with("No such file or directory"),
        "the stand-in outlives its task: {facts}"
    );
    Ok(())
}

fn clock(lab: &Lab) -> Result<()> {
    // The guest's clock between two readings of the node's, thirty times, with
    // no program started in between; the closest pair tells the most.
    let readings = lab.succeed(&format!(
        "coproc guest {{ {RUN} clock sh -c 'while read line; do echo $EPOCHREALTIME; done'; }}
         for round in $(seq 30); do
             before=$EPOCHREALTIME
             echo >&${{guest[1]}}; read -r -u ${{guest[0]}} shown
             echo $before $shown $EPOCHREALTIME
         done
         eval \"exec ${{guest[1]}}>&-\"; wait"
    ))?;
    let mut rounds = Vec::new();
    for line in readings.lines() {
        let times: Vec<i64> = line.split(' ').filter_map(microseconds).collect();
        let [before, guest, after] = times[..] else {
            anyhow::bail!("cannot read the clocks: {line}");
        };
        rounds.push((after - before, guest - i64::midpoint(before, after)));
    }
    let (round_trip, offset) = rounds.into_iter().min().unwrap_or_default();
    println!("clock: {offset} us from the node's, round trip {round_trip} us");
    let tolerance = 10_000 + round_trip / 2;
    ensure!(
        offset.abs() <= tolerance,
        "the guest's clock is off by {offset} us"
    );
    Ok(())
}

fn microseconds(seconds: &str) -> Option<i64> {
    let (whole, fraction) = seconds.split_once('.')?;
    Some(whole.parse::<i64>().ok()? * 1_000_000 + fraction.parse::<i64>().ok()?)
}
