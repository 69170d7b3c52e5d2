//! What goes wrong is told by its cause, at the prompt or on the container's
//! standard error, and leaves nothing.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab, RUN};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("missing_kernel_is_named_at_the_prompt", missing_kernel),
    ("missing_kvm_is_named_at_the_prompt", missing_kvm),
    ("unusable_kvm_is_named_at_the_prompt", unusable_kvm),
    ("corrupt_config_is_named_at_the_prompt", corrupt_config),
    ("missing_rootfs_is_named_at_the_prompt", missing_rootfs),
    (
        "program_that_is_not_there_is_named_at_the_prompt",
        missing_program,
    ),
    ("host_network_is_refused_by_name", host_network),
    ("guest_panic_ends_with_255_and_a_last_line", guest_panic),
    (
        "death_of_virtiofsd_ends_with_255_and_a_last_line",
        virtiofsd_dies,
    ),
    (
        "death_of_the_monitor_ends_with_255_and_a_last_line",
        monitor_dies,
    ),
];

const KERNEL: &str = "/opt/bulkhead/share/bulkhead/vmlinux";

/// A refusal before Start returns: `spoil`, run, `mend`.
fn refused(lab: &Lab, words: &str, spoil: &str, run: &str, mend: &str) -> Result<()> {
    let before = lab.resources()?;
    let outcome = lab.run(&format!("{spoil}; {run}; code=$?; {mend}; exit $code"))?;
    ensure!(
        outcome.code != 0 && outcome.stderr.contains(words),
        "wanted a failure that says {words:?}: {outcome:#?}"
    );
    lab.run("ctr container delete refused")?;
    lab.expect_nothing_left(&before)
}

fn missing_kernel(lab: &Lab) -> Result<()> {
    let spoil = format!("mv {KERNEL} {KERNEL}.away");
    let mend = format!("mv {KERNEL}.away {KERNEL}");
    refused(
        lab,
        "vmlinux",
        &spoil,
        &format!("{RUN} refused true"),
        &mend,
    )
}

fn missing_kvm(lab: &Lab) -> Result<()> {
    let run = format!("{RUN} refused true");
    refused(
        lab,
        "/dev/kvm",
        "mv /dev/kvm /dev/kvm.away",
        &run,
        "mv /dev/kvm.away /dev/kvm",
    )
}

/// Something that opens, but is no KVM.
fn unusable_kvm(lab: &Lab) -> Result<()> {
    refused(
        lab,
        "/dev/kvm",
        "mv /dev/kvm /dev/kvm.away; mknod /dev/kvm c 1 3",
        &format!("{RUN} refused true"),
        "rm /dev/kvm; mv /dev/kvm.away /dev/kvm",
    )
}

/// containerd writes config.json itself, so the shim is called as containerd
/// would.
fn corrupt_config(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    lab.fails_saying(
        "config.json",
        "mkdir -p /tmp/corrupt/rootfs && cd /tmp/corrupt && echo '{\"ociVersion\": ' >config.json
         TTRPC_ADDRESS=/run/containerd/containerd.sock.ttrpc containerd-shim-bulkhead-v2 \
             -namespace default -address /run/containerd/containerd.sock -publish-binary /bin/true \
             -id corrupt -bundle /tmp/corrupt start </dev/null >/tmp/corrupt/out 2>&1
         code=$?; cat /tmp/corrupt/out >&2; rm -r /tmp/corrupt; exit $code",
    )?;
    lab.expect_nothing_left(&before)
}

fn missing_rootfs(lab: &Lab) -> Result<()> {
    let run = format!("ctr run --rm --rootfs --runtime {BULKHEAD} /nowhere/rootfs refused true");
    refused(lab, "/nowhere/rootfs", "true", &run, "true")
}

fn missing_program(lab: &Lab) -> Result<()> {
    let run = format!("{RUN} refused no-such-program");
    refused(lab, "no-such-program", "true", &run, "true")
}

fn host_network(lab: &Lab) -> Result<()> {
    let run = format!("ctr run --rm --net-host --runtime {BULKHEAD} {IMAGE} refused true");
    refused(lab, "network", "true", &run, "true")
}

/// A failure after Start has returned: `spoil` while the container runs.
fn ends_with_255(lab: &Lab, words: &str, command: &str, spoil: &str) -> Result<()> {
    let before = lab.resources()?;
    let outcome = lab.run(&format!(
        "rm -f /tmp/broken.in; mkfifo /tmp/broken.in; exec 3<>/tmp/broken.in
         ctr run --rm --privileged --runtime {BULKHEAD} {IMAGE} broken sh -c 'echo ready; {command}' \
             <&3 >/tmp/broken.out 2>/tmp/broken.err 3<&- & run=$!
         until grep -q ready /tmp/broken.out; do kill -0 $run || break; sleep 0.1; done
         {spoil}
         wait $run; code=$?
         cat /tmp/broken.err >&2; exit $code"
    ))?;
    ensure!(outcome.code == 255, "wanted exit status 255: {outcome:#?}");
    ensure!(
        outcome.stderr.contains(words),
        "wanted a last line that says {words:?}: {outcome:#?}"
    );
    lab.expect_nothing_left(&before)
}

fn guest_panic(lab: &Lab) -> Result<()> {
    ends_with_255(
        lab,
        "Kernel panic - not syncing",
        "read go; echo c >/proc/sysrq-trigger; sleep 1000",
        "echo go >&3",
    )
}

fn virtiofsd_dies(lab: &Lab) -> Result<()> {
    let command = "sleep 1000";
    ends_with_255(lab, "virtiofsd", command, "pkill -KILL -x virtiofsd")
}

fn monitor_dies(lab: &Lab) -> Result<()> {
    let command = "sleep 1000";
    ends_with_255(lab, "bulkhead-vmm", command, "pkill -KILL -x bulkhead-vmm")
}
