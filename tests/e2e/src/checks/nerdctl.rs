//! What people do with `nerdctl` beyond running a program.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("shim_tells_its_version_and_what_it_can", shim_itself),
    ("nerdctl_detached_container_is_at_hand", detached),
    ("nerdctl_file_volume_is_read_only_as_asked", file_volume),
    ("nerdctl_compose_services_find_each_other_by_name", compose),
    (
        "nerdctl_privileged_mounts_and_sees_no_host_disk",
        privileged,
    ),
    ("clock_step_reaches_the_guest", clock_step),
    ("installing_over_a_running_pod_leaves_it_alone", upgrade),
];

/// Runs `script` between the start of a detached container `name`, whose
/// options and command follow, and its removal, after which nothing is left.
pub(super) fn with_detached(lab: &Lab, name: &str, run: &str, script: &str) -> Result<String> {
    let nerdctl = format!("nerdctl run --pull never --runtime {BULKHEAD}");
    lab.make_bridge()?;
    let before = lab.resources()?;
    let shown = lab.succeed(&format!(
        "trap 'nerdctl rm -f {name} >/dev/null' EXIT
         {nerdctl} -d --name {name} {run} >/dev/null || exit
         {script}"
    ))?;
    lab.expect_nothing_left(&before)?;
    Ok(shown)
}

fn shim_itself(lab: &Lab) -> Result<()> {
    let version = lab.succeed("containerd-shim-bulkhead-v2 -v")?;
    ensure!(version.contains("containerd-shim-bulkhead-v2"), "{version}");
    // RuntimeInfo, a protobuf message: its strings are enough to know it.
    let info = lab.succeed("containerd-shim-bulkhead-v2 -info </dev/null | tr -cd '[:print:]'")?;
    ensure!(info.contains(BULKHEAD), "{info}");
    Ok(())
}

/// logs, top, inspect, cp in both directions, limits, commit.
fn detached(lab: &Lab) -> Result<()> {
    let shown = with_detached(
        lab,
        "athand",
        &format!("--cpus 1 -m 128m {IMAGE} sh -c 'echo told; exec sleep 999'"),
        "until nerdctl logs athand | grep -q .; do sleep 0.1; done
         echo logs $(nerdctl logs athand)
         echo top $(nerdctl top athand | tail -n +2 | wc -l) $(nerdctl top athand | grep -c 'bulkhead-vmm\\|virtiofsd\\|containerd$')
         pid=$(nerdctl inspect -f '{{.State.Pid}}' athand); [ -d /proc/$pid ] && echo inspect alive
         echo content >/tmp/athand; nerdctl cp /tmp/athand athand:/copied
         echo in $(nerdctl exec athand cat /copied); [ -e /copied ] && echo on the host
         nerdctl exec athand sh -c 'echo back >/made'; nerdctl cp athand:/made /tmp/made; echo out $(cat /tmp/made)
         nerdctl exec athand sh -c 'cd /sys/fs/cgroup; echo limits $(cat cpu.max memory.max)'
         nerdctl exec athand sh -c 'mmap-write /mapped 65536 >/told 2>&1 </dev/null & until [ -s /told ]; do :; done'
         nerdctl commit athand committed >/dev/null",
    )?;
    let wanted =
        "logs told\ntop 1 0\ninspect alive\nin content\nout back\nlimits 100000 100000 134217728";
    ensure!(shown == wanted, "{shown}");
    let committed = lab.succeed(&format!(
        "nerdctl run --rm --pull never --runtime {BULKHEAD} committed \\
             sh -c 'cat /copied /made; tr -d x </mapped | wc -c'
         nerdctl rmi -f committed >/dev/null"
    ))?;
    ensure!(committed == "content\nback\n0", "{committed}");
    Ok(())
}

/// Two services on a network of their own, of which the second waits for the first.
fn compose(lab: &Lab) -> Result<()> {
    let service = format!("image: {IMAGE}\n    pull_policy: never\n    runtime: {BULKHEAD}");
    let file = format!(
        "services:
  web:
    {service}
    command: [httpd, -f, -p, \"80\", -h, /etc]
  client:
    {service}
    command: [sleep, \"1000\"]
    depends_on: [web]
"
    );
    let shown = lab.succeed(&format!(
        "mkdir -p /tmp/compose && cd /tmp/compose && cat >compose.yaml <<'END'
{file}END
         trap 'nerdctl compose -p e2e down >/dev/null 2>&1' EXIT
         nerdctl compose -p e2e up -d >up.log 2>&1 || {{ cat up.log; exit 1; }}
         # The second's name is written into the first's file once both run.
         for try in $(seq 300); do
             nerdctl exec e2e-client-1 wget -qO- http://web/hostname 2>/dev/null && break
             sleep 0.1
         done
         for try in $(seq 300); do
             nerdctl exec e2e-web-1 ping -c 1 client >/dev/null 2>&1 && echo client answers && break
             sleep 0.1
         done"
    ))?;
    ensure!(shown == "web\nclient answers", "{shown}");
    Ok(())
}

fn file_volume(lab: &Lab) -> Result<()> {
    let shown = lab.succeed(&format!(
        "echo given >/tmp/volume-file
         nerdctl run --rm --pull never --runtime {BULKHEAD} -v /tmp/volume-file:/f:ro {IMAGE} \\
             sh -c 'cat /f; echo no >/f || echo refused' 2>/dev/null
         cat /tmp/volume-file"
    ))?;
    ensure!(shown == "given\nrefused\ngiven", "{shown}");
    Ok(())
}

fn privileged(lab: &Lab) -> Result<()> {
    let shown = lab.succeed(&format!(
        "nerdctl run --rm --pull never --privileged --runtime {BULKHEAD} {IMAGE} \\
             sh -c 'mkdir -p /mnt; mount -t tmpfs x /mnt && echo mounted; ls /dev /sys/block | grep -E \"^(vd|sd|nvme|kvm)\"; true'"
    ))?;
    ensure!(shown == "mounted", "{shown}");
    Ok(())
}

/// The node's clock goes an hour ahead and back again.
fn clock_step(lab: &Lab) -> Result<()> {
    let shown = lab.succeed(&format!(
        "coproc guest {{ ctr run --rm --runtime {BULKHEAD} {IMAGE} stepped \\
             sh -c 'while read line; do echo $EPOCHREALTIME; done'; }}
         ask() {{ echo >&${{guest[1]}}; read -r -u ${{guest[0]}} shown; }}
         apart() {{ ask; echo $((${{shown%.*}} - EPOCHSECONDS)); }}
         follow() {{
             since=${{EPOCHREALTIME/./}}
             until apart=$(apart); [ ${{apart#-}} -le 1 ]; do sleep 0.05; done
             echo $(((${{EPOCHREALTIME/./}} - since) / 1000))
         }}
         ask
         date -s @$((EPOCHSECONDS + 3600)) >/dev/null; follow
         date -s @$((EPOCHSECONDS - 3600)) >/dev/null; follow
         eval \"exec ${{guest[1]}}>&-\"; wait"
    ))?;
    println!("the guest followed steps of the clock in (ms) {shown:?}");
    let limit = 2000 * u64::from(lab.node().time_factor());
    let took: Vec<u64> = shown.lines().filter_map(|ms| ms.parse().ok()).collect();
    ensure!(
        took.len() == 2 && took.iter().all(|&ms| ms <= limit),
        "{shown}"
    );
    Ok(())
}

/// Files are replaced by renames, as packages do; then the old shim goes on,
/// and the new one's `delete` understands what it left.
fn upgrade(lab: &Lab) -> Result<()> {
    let inode = "stat -c %i /opt/bulkhead/bin/containerd-shim-bulkhead-v2";
    let shown = with_detached(
        lab,
        "upgraded",
        &format!("{IMAGE} sh -c 'while :; do echo line; sleep 1; done'"),
        &format!(
            "was=$({inode})
             find /opt/bulkhead -type f | while read -r file; do
                 cp -p \"$file\" \"$file.new\" && mv \"$file.new\" \"$file\"
             done
             [ $was != $({inode}) ] && echo replaced
             nerdctl exec upgraded echo runs
             lines=$(nerdctl logs upgraded | wc -l)
             until [ $(nerdctl logs upgraded | wc -l) -gt $lines ]; do sleep 0.2; done; echo logs
             nerdctl run --rm --pull never --runtime {BULKHEAD} {IMAGE} echo new"
        ),
    )?;
    ensure!(shown == "replaced\nruns\nlogs\nnew", "{shown}");
    let left = lab.succeed("pgrep -c containerd-shim-b || true")?;
    ensure!(left == "0", "{left} shims are left");
    Ok(())
}
