//! Whatever happens, nothing is left behind.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab, RUN};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("containers_one_after_another_leave_nothing", in_turn),
    ("eight_containers_at_once_leave_nothing", at_once),
    ("delete_killed_at_random_points_ends_clean", delete_killed),
    ("killed_shim_leaves_nothing", killed_shim),
    (
        "nerdctl_with_its_default_network_leaves_nothing",
        nerdctl_network,
    ),
    ("hooks_run_on_the_host_in_their_order", hooks),
];

fn in_turn(lab: &Lab) -> Result<()> {
    let count = if lab.soak() { 50 } else { 5 };
    // The first of all makes what stays on purpose: lock files, caches.
    lab.succeed(&format!("{RUN} turn true"))?;
    let before = lab.resources()?;
    for number in 0..count {
        lab.succeed(&format!("{RUN} turn-{number} true"))?;
    }
    lab.expect_nothing_left(&before)
}

fn at_once(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let failed = lab.succeed(&format!(
        "for n in 1 2 3 4 5 6 7 8; do
             ( {RUN} once-$n sh -c \"exit $n\"; [ $? = $n ] || echo \"container $n: $?\" ) &
         done; wait"
    ))?;
    ensure!(failed.is_empty(), "{failed}");
    lab.expect_nothing_left(&before)
}

/// The pattern, for `pkill -f`, of the shim that serves a lone container; not
/// of a shell whose script holds these words.
fn server_of(id: &str) -> String {
    format!("^[^ ]*containerd-shim-bulkhead-v2 .*-id {id} .*serve$")
}

/// The shim and all are killed, then `delete` is, at different points, before
/// it may finish.
fn delete_killed(lab: &Lab) -> Result<()> {
    let rounds = if lab.soak() { 20 } else { 4 };
    let before = lab.resources()?;
    for round in 0..rounds {
        // A delay that covers the whole of a delete over the rounds.
        let delay_ms = round * 400 / rounds;
        lab.succeed(&format!(
            "trap 'kill -CONT $(pidof containerd)' EXIT
             ctr run --detach --null-io --runtime {BULKHEAD} {IMAGE} victim sleep 1000
             bundle=/run/containerd/io.containerd.runtime.v2.task/default/victim
             # Or it would call delete itself.
             kill -STOP $(pidof containerd)
             pkill -KILL -f '{}'
             cd $bundle
             delete() {{ exec containerd-shim-bulkhead-v2 -namespace default -address /run/containerd/containerd.sock \
                 -publish-binary /bin/true -id victim -bundle $bundle delete >/dev/null; }}
             delete & sleep 0.{delay_ms:03}; kill -KILL $! 2>/dev/null; wait $! 2>/dev/null
             ( delete ) || exit
             ls -d /run/bulkhead/default/victim 2>/dev/null && exit 1
             kill -CONT $(pidof containerd)
             {}",
            server_of("victim"),
            Lab::remove("victim")
        ))?;
        lab.expect_nothing_left(&before)?;
    }
    Ok(())
}

fn killed_shim(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    lab.succeed(&format!(
        "ctr run --detach --null-io --runtime {BULKHEAD} {IMAGE} orphan sleep 1000
         pkill -KILL -f '{}'
         for try in $(seq 300); do pgrep -x bulkhead-vmm >/dev/null || break; sleep 0.1; done
         {}",
        server_of("orphan"),
        Lab::remove("orphan")
    ))?;
    lab.expect_nothing_left(&before)
}

fn nerdctl_network(lab: &Lab) -> Result<()> {
    let run = format!("nerdctl run --rm --pull never --runtime {BULKHEAD} {IMAGE}");
    lab.make_bridge()?;
    let before = lab.resources()?;
    let hosts = lab.succeed(&format!("{run} sh -c 'cat /etc/hosts; ls /sys/class/net'"))?;
    ensure!(hosts.contains("localhost"), "no hosts file: {hosts}");
    ensure!(
        hosts.lines().any(|line| line == "lo"),
        "no loopback: {hosts}"
    );
    lab.expect_nothing_left(&before)
}

/// nerdctl's network is made by hooks: the address that they gave is in the
/// namespace of the pid that they were given. And hooks of one's own run in
/// their order, with that pid.
fn hooks(lab: &Lab) -> Result<()> {
    lab.make_bridge()?;
    let before = lab.resources()?;
    let addresses = lab.succeed(&format!(
        "nerdctl run -d --name hooked --pull never --runtime {BULKHEAD} {IMAGE} sleep 1000 >/dev/null
         pid=$(nerdctl inspect -f '{{{{.State.Pid}}}}' hooked)
         nsenter -n -t $pid ip -4 -o addr show dev eth0
         nerdctl rm -f hooked >/dev/null"
    ))?;
    ensure!(addresses.contains("inet "), "no address: {addresses}");
    own_hooks(lab)?;
    lab.expect_nothing_left(&before)
}

/// The default specification with a hook of each kind that runs on the host.
fn own_hooks(lab: &Lab) -> Result<()> {
    let script = include_str!("hooks.sh");
    let shown = lab.succeed(&format!("set -- {BULKHEAD} {IMAGE}\n{script}"))?;
    let lines: Vec<Vec<&str>> = shown
        .lines()
        .map(|line| line.split(' ').collect())
        .collect();
    let kinds: Vec<_> = lines.iter().map(|line| &line[..3]).collect();
    ensure!(
        kinds
            == [
                ["createRuntime", "hooks", "creating"],
                ["poststart", "hooks", "running"],
                ["poststop", "hooks", "stopped"],
            ],
        "{shown}"
    );
    Ok(())
}
