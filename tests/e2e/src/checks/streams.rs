//! Standard output: all of it, at speed, and held back when nobody reads.

use anyhow::{Context, Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("output_before_an_exit_arrives_whole", last_words),
    ("output_that_nobody_reads_is_held_back", held_back),
    ("output_rate_beside_runc", rate),
];

/// Of runc's rate, in the same node and run.
const LEAST_RATIO: f64 = 0.5;

/// Runs `script` beside a container of this id that does nothing.
fn beside(lab: &Lab, id: &str, runtime: &str, script: &str) -> Result<String> {
    lab.succeed(&format!(
        "ctr run --detach --null-io --runtime {runtime} {IMAGE} {id} sleep 100000
         {script}
         {}",
        Lab::remove(id)
    ))
}

/// Far more than pipes and sockets hold: what is on its way when the program
/// ends must still arrive.
fn last_words(lab: &Lab) -> Result<()> {
    let rounds = if lab.soak() { 100 } else { 5 };
    let before = lab.resources()?;
    let counted = beside(
        lab,
        "last",
        BULKHEAD,
        &format!(
            "for round in $(seq {rounds}); do
                 ctr task exec --exec-id e$round last dd if=/dev/zero bs=64k count=128 | wc -c
             done"
        ),
    )?;
    let whole = counted.lines().filter(|line| *line == "8388608").count();
    ensure!(whole == rounds, "{counted}");
    let counted = lab.succeed(&format!(
        "ctr run --rm --runtime {BULKHEAD} {IMAGE} init dd if=/dev/zero bs=64k count=128 | wc -c"
    ))?;
    ensure!(counted == "8388608", "of an init: {counted}");
    lab.expect_nothing_left(&before)
}

/// The program counts in its file `/n` how often it got rid of 128 KiB.
const COUNTING: &str = "echo 0 >/n; i=0; while [ $i -lt 128 ]; do dd if=/dev/zero bs=128k count=1 2>/dev/null; i=$((i+1)); echo $i >/n; done";

fn held_back(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let shown = beside(
        lab,
        "slow",
        BULKHEAD,
        &format!(
            r#"root=/proc/$(ctr task ls | awk '$1 == "slow" {{ print $2 }}')/root
             shim=$(tr -d ' \n' </run/bulkhead/default/slow/pod.json |
                 grep -o '"shim":{{"pid":[0-9]*' | grep -o '[0-9]*$')
             resident() {{ awk '/^VmRSS/ {{ print $2 }}' /proc/$shim/status; }}
             was=$(resident)
             # It reads when it is told to.
             rm -f /tmp/go; mkfifo /tmp/go
             ctr task exec --exec-id e slow sh -c '{COUNTING}' | {{ read </tmp/go; wc -c; }} >/tmp/counted &
             reader=$!
             # Until it stands still for six seconds.
             until [ -s $root/n ]; do sleep 0.1; done
             last=none; stood=0; while [ $stood -lt 3 ]; do
                 sleep 2; now=$(cat $root/n)
                 [ "$now" = "$last" ] && stood=$((stood + 1)) || stood=0
                 last=$now
             done
             echo "held at $last"
             echo "grown $(($(resident) - was))"
             echo >/tmp/go; wait $reader; echo "counted $(cat /tmp/counted)"
             # A reader that has gone: the program waits, and can be killed.
             rm -f $root/n
             exec 8<>/tmp/go
             ctr task exec --exec-id gone slow sh -c '{COUNTING}' >/tmp/go 8>&- & client=$!
             until [ -e $root/n ]; do sleep 0.1; done
             kill -KILL $client; exec 8>&-
             ctr task exec --exec-id after slow echo answers
             # What the client would have removed.
             rm -rf /run/containerd/fifo/*"#
        ),
    )?;
    let figure = |name: &str| -> Result<i64> {
        let line = shown.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.with_context(|| shown.clone())?.trim().parse()?)
    };
    // Pipes, sockets and the credit of the guest's socket, never what the program wants.
    ensure!(figure("held at")? <= 32, "{shown}");
    ensure!(figure("grown")? < 16 * 1024, "KiB of the shim: {shown}");
    ensure!(figure("counted")? == 16 << 20, "{shown}");
    ensure!(shown.ends_with("answers"), "{shown}");
    lab.expect_nothing_left(&before)
}

/// In a container that runs already, so that its start does not count.
fn rate(lab: &Lab) -> Result<()> {
    let blocks: u64 = if lab.soak() { 16384 } else { 512 };
    let out = format!(
        "ctr task exec --exec-id out ID dd if=/dev/zero bs=64k count={blocks} 2>/dev/null |
             echo $(($(wc -c) / 65536))"
    );
    let into = format!(
        "dd if=/dev/zero bs=64k count={blocks} 2>/dev/null |
             ctr task exec --exec-id in ID sh -c 'dd of=/dev/null bs=64k iflag=fullblock 2>&1' |
             sed -n 's/+0 records in//p'"
    );
    for (direction, script) in [("stdout", out), ("stdin", into)] {
        let theirs = seconds(lab, "runc", "io.containerd.runc.v2", blocks, &script)?;
        let ours = seconds(lab, "bulkhead", BULKHEAD, blocks, &script)?;
        let ratio = theirs / ours;
        println!(
            "  {} MiB through {direction}: runc {theirs:.1} s, bulkhead {ours:.1} s, {ratio:.2} of runc's rate",
            blocks / 16
        );
        ensure!(
            ratio >= LEAST_RATIO,
            "{direction} at {ratio:.2} of runc's rate"
        );
    }
    Ok(())
}

/// How long the script takes beside the container `ID`; it prints how many blocks
/// of 64 KiB came through.
fn seconds(lab: &Lab, id: &str, runtime: &str, blocks: u64, script: &str) -> Result<f64> {
    let script = script.replace("ID", id);
    let timed = format!(
        "began=$EPOCHREALTIME
         {script}
         awk \"BEGIN {{ print $EPOCHREALTIME - $began }}\""
    );
    let shown = beside(lab, id, runtime, &timed)?;
    let (counted, seconds) = shown.split_once('\n').context(shown.clone())?;
    ensure!(counted == blocks.to_string(), "{id}: {shown}");
    Ok(seconds.parse()?)
}
