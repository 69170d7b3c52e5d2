//! Files: what the container writes is in its snapshot on the host.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab, RUN};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("file_owner_and_mode_are_on_the_host", owner_and_mode),
    ("small_files_read_back", small_files),
    ("large_file_reads_back", large_file),
    ("links_renames_xattrs_holes_and_locks_work", kinds),
    ("mmap_writes_survive_a_kill", mmap_survives_kill),
];

/// Where `ctr` mounts a container's snapshot for the checks.
const SNAPSHOT: &str = "/tmp/snapshot";

/// The script that shows the container's snapshot at [`SNAPSHOT`] while
/// `script` runs. The container must have no task.
fn in_snapshot(id: &str, script: &str) -> String {
    format!(
        "mkdir -p {SNAPSHOT}
         eval \"$(ctr snapshots mounts {SNAPSHOT} {id})\"
         ( cd {SNAPSHOT} && {{ {script}
         }} ); code=$?
         umount {SNAPSHOT}; ctr container delete {id}; exit $code"
    )
}

/// The script that runs a container to its end and keeps its snapshot.
fn run_and_keep(id: &str, command: &str) -> String {
    format!(
        "ctr run --runtime {BULKHEAD} {IMAGE} {id} sh -c '{command}' && ctr task delete {id} >/dev/null 2>&1 || true"
    )
}

fn owner_and_mode(lab: &Lab) -> Result<()> {
    lab.succeed(&run_and_keep(
        "owner",
        "echo kept >/root/f && chown 1234:5678 /root/f && chmod 4751 /root/f",
    ))?;
    let shown = lab.succeed(&in_snapshot(
        "owner",
        "stat -c '%u:%g %a' root/f && cat root/f",
    ))?;
    ensure!(shown == "1234:5678 4751\nkept", "{shown}");
    Ok(())
}

fn small_files(lab: &Lab) -> Result<()> {
    let count = if lab.soak() { 10_000 } else { 500 };
    let counted = lab.succeed(&format!(
        "{RUN} small sh -c 'mkdir /d && cd /d
             i=0; while [ $i -lt {count} ]; do echo $i >f$i; i=$((i+1)); done
             cat f* | sort -n | uniq | wc -l; ls | wc -l'"
    ))?;
    ensure!(counted == format!("{count}\n{count}"), "{counted}");
    Ok(())
}

fn large_file(lab: &Lab) -> Result<()> {
    let mib: u64 = if lab.soak() { 256 } else { 64 };
    let times = mib / 16;
    let sums = lab.succeed(&format!(
        "{RUN} large sh -c '
             dd if=/dev/urandom of=/seed bs=1M count=16 2>/dev/null
             i=0; while [ $i -lt {times} ]; do dd if=/seed bs=1M 2>/dev/null; i=$((i+1)); done >/big
             i=0; while [ $i -lt {times} ]; do cat /seed; i=$((i+1)); done | md5sum
             md5sum </big; stat -c %s /big'"
    ))?;
    let lines: Vec<&str> = sums.lines().collect();
    ensure!(lines.len() == 3, "{sums}");
    ensure!(lines[0] == lines[1], "read back differently: {sums}");
    ensure!(lines[2] == (mib << 20).to_string(), "{sums}");
    Ok(())
}

fn kinds(lab: &Lab) -> Result<()> {
    let shown = lab.succeed(&format!(
        "{RUN} kinds sh -c '
             set -e; mkdir /k; cd /k
             echo one >a; ln a b; stat -c %h a
             ln -s a s; readlink s; cat s
             mv a c; cat c; test ! -e a && echo renamed
             setfattr -n user.colour -v blue c; getfattr --only-values -n user.colour c; echo
             truncate -s 1G hole; stat -c %s hole; test $(stat -c %b hole) -lt 100 && echo sparse
             flock c sh -c \"flock -n c true || echo held\"'"
    ))?;
    let wanted = "2\na\none\none\nrenamed\nblue\n1073741824\nsparse\nheld";
    ensure!(shown == wanted, "{shown}");
    Ok(())
}

fn mmap_survives_kill(lab: &Lab) -> Result<()> {
    // The task's pid leads to its root file system: there the program tells
    // when it has written.
    lab.succeed(&format!(
        "ctr run --detach --runtime {BULKHEAD} {IMAGE} mapped \\
             sh -c 'exec mmap-write /root/mapped 4194304 >/root/told' </dev/null
         pid=$(ctr task ls | awk '$1 == \"mapped\" {{ print $2 }}')
         until grep -q written /proc/$pid/root/root/told; do sleep 0.1; done
         ctr task kill -s KILL mapped
         until ctr task ls | grep -q 'mapped.*STOPPED'; do sleep 0.1; done
         ctr task delete mapped || true"
    ))?;
    let shown = lab.succeed(&in_snapshot(
        "mapped",
        "stat -c %s root/mapped; tr -d x <root/mapped | wc -c",
    ))?;
    ensure!(shown == "4194304\n0", "bytes were lost: {shown}");
    Ok(())
}
