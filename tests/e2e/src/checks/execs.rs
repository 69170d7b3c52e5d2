//! Processes that join a running container.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("exec_runs_in_the_container_with_its_own_code", code),
    (
        "exec_has_streams_user_and_directory_of_its_own",
        own_process,
    ),
    ("execs_at_once_each_return_their_code", at_once),
    ("exec_ends_with_its_container", ends_with_container),
];

/// Runs `script` while a container `id` of `nerdctl` sleeps, which is removed
/// afterwards and must leave nothing.
fn beside(lab: &Lab, id: &str, script: &str) -> Result<String> {
    let nerdctl = format!("nerdctl run --pull never --runtime {BULKHEAD}");
    lab.make_bridge()?;
    let before = lab.resources()?;
    lab.succeed(&format!("{nerdctl} -d --name {id} {IMAGE} sleep 1000"))?;
    let shown = lab.succeed(script);
    let removed = lab.succeed(&format!("nerdctl rm -f {id}"));
    let shown = shown?;
    removed?;
    lab.expect_nothing_left(&before)?;
    Ok(shown)
}

fn code(lab: &Lab) -> Result<()> {
    let shown = beside(
        lab,
        "execcode",
        // nerdctl itself ends with 1 and says the code; ctr ends with it.
        "id=$(nerdctl ps -q --no-trunc --filter name=execcode)
         ctr task exec --exec-id seven $id sh -c 'exit 7'; echo code $?
         ctr task exec --exec-id killed $id sh -c 'kill -KILL $$'; echo code $?
         nerdctl exec execcode sh -c 'exit 7' 2>&1 | grep -o 'exit code 7'
         nerdctl exec execcode cat /proc/1/cmdline | tr '\\0' ' '; echo
         nerdctl exec execcode no-such-program 2>&1 | grep -o 'no-such-program.*not found' | head -n 1",
    )?;
    let lines: Vec<&str> = shown.lines().collect();
    ensure!(
        lines.len() == 5
            && lines[..3] == ["code 7", "code 137", "exit code 7"]
            && lines[3].starts_with("sleep 1000")
            && lines[4].starts_with("no-such-program"),
        "{shown}"
    );
    Ok(())
}

fn own_process(lab: &Lab) -> Result<()> {
    let shown = beside(
        lab,
        "execown",
        "echo in | nerdctl exec -i execown cat
         nerdctl exec -u 1234:5678 -w /tmp -e COLOUR=blue execown sh -c 'echo $(id -u):$(id -g) $(pwd) $COLOUR'
         nerdctl exec execown dd if=/dev/zero bs=50000 count=100 2>/dev/null | wc -c
         nerdctl exec execown sh -c 'echo out; echo err >&2' 2>/dev/null",
    )?;
    ensure!(shown == "in\n1234:5678 /tmp blue\n5000000\nout", "{shown}");
    Ok(())
}

fn at_once(lab: &Lab) -> Result<()> {
    let count = if lab.soak() { 64 } else { 8 };
    let shown = beside(
        lab,
        "execmany",
        &format!(
            "id=$(nerdctl ps -q --no-trunc --filter name=execmany)
             for n in $(seq {count}); do
                 ( ctr task exec --exec-id e$n $id sh -c \"exit $n\"; [ $? = $n ] || echo \"exec $n: $?\" ) &
             done; wait"
        ),
    )?;
    ensure!(shown.is_empty(), "{shown}");
    Ok(())
}

/// The exec's stand-in is there while it runs, and gone with its container.
fn ends_with_container(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let shown = lab.succeed(&format!(
        "ctr run --detach --null-io --runtime {BULKHEAD} {IMAGE} execend sleep 1000
         ctr task exec --exec-id side execend sleep 1000 & side=$!
         until [ $(ctr task ps execend | grep -c '^[0-9]') = 2 ]; do sleep 0.1; done
         ctr task ps execend | awk '/^[0-9]/ {{ print $1 }}' |
             while read pid; do readlink /proc/$pid/exe | cut -d' ' -f1; done
         ctr task kill -s KILL execend; wait $side; echo code $?
         {}",
        Lab::remove("execend")
    ))?;
    ensure!(
        shown == "/memfd:bulkhead-stand-in\n/memfd:bulkhead-stand-in\ncode 137",
        "{shown}"
    );
    lab.expect_nothing_left(&before)
}
