//! Two tenants on one host: what a privileged container of one tries against the
//! other's pod and against the host.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab};

/// See the names.
pub const CHECKS: &[Check] = &[(
    "privileged_container_reaches_neither_another_pod_nor_the_host",
    attempts,
)];

/// What is the other tenant's, and the host's.
const SECRET: &str = "of-the-other-tenant";

/// The same for `grep`, whose own command line it is not found in.
const PATTERN: &str = "of-the-other-tenan[t]";

/// Each attempt prints its name only when it succeeds.
const ATTEMPTS: &str = r#"
tried=0
try() { # a name, and a command that succeeds if the wall has a hole
    name=$1; shift; tried=$((tried+1))
    if sh -c "$*" >/dev/null 2>&1; then echo "succeeded: $name"; fi
}
mkdir -p /mnt/share /mnt/other; mount -t virtiofs share /mnt/share || exit 3
try 'files of the other in the share' 'find /mnt/share -name secret -o -name host-secret | grep -q .'
ln -s /run/bulkhead /mnt/share/link; ln -s ../../../../../.. /mnt/share/up
try 'files of the host by a link in the share' 'grep -qs PATTERN /mnt/share/link/host-secret /mnt/share/up/host-secret'
try 'the host above the share' 'ls /mnt/share/.. /mnt/share/../.. | grep -q host-secret'
for tag in share0 share-1 remote0 remote1 root host /; do
    try "another share, $tag" "mount -t virtiofs $tag /mnt/other"
done
try 'environment of another process' 'grep -qs PATTERN /proc/[0-9]*/environ'
try 'a program of the other' 'grep -qs PATTERN /proc/[0-9]*/cmdline'
try 'the root of another process' 'grep -rqs PATTERN /proc/1/root/secret'
for device in mem kmem port kvm vhost-vsock vhost-net; do
    try "the device $device" "[ -e /dev/$device ]"
done
mknod /dev/try-mem c 1 1; mknod /dev/try-port c 1 4; mknod /dev/try-disk b 254 0; mknod /dev/try-kvm c 10 232
for device in mem port disk kvm; do try "a node of $device" "dd if=/dev/try-$device of=/dev/null count=1"; done
try 'a disk of the host' 'ls /sys/block | grep -q .'
try 'a PCI device of the host' 'ls /sys/bus/pci/devices | grep -q .'
echo x >/x.ko; try 'a kernel module' 'insmod /x.ko'
mkdir -p /mnt/cgroup; mount -t cgroup2 cgroup /mnt/cgroup
try 'cgroups of the host' 'find /mnt/cgroup | grep -q bulkhead'
try 'processes of the host in its cgroups' 'grep -qs containerd /proc/*/comm'
try 'the host name' '[ "$(cat /proc/sys/kernel/hostname)" = HOSTNAME ]'
try 'a namespace of the host' 'nsenter -t 1 -m -u -i -n -- grep -qs PATTERN /host-secret'
echo tried $tried"#;

fn attempts(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let hostname = lab.succeed("hostname")?;
    let attempts = ATTEMPTS
        .replace("PATTERN", PATTERN)
        .replace("HOSTNAME", &hostname);
    let shown = lab.succeed(&format!(
        "echo {SECRET} >/host-secret; mkdir -p /run/bulkhead; echo {SECRET} >/run/bulkhead/host-secret
         trap 'rm -f /host-secret /run/bulkhead/host-secret; nerdctl rm -f other >/dev/null' EXIT
         run='nerdctl run --pull never --runtime {BULKHEAD}'
         $run -d --name other -e WORD={SECRET} {IMAGE} sh -c 'echo {SECRET} >/secret; sleep 1000' {SECRET} >/dev/null
         cat >/tmp/attempts.sh <<'END'
{attempts}
END
         $run --rm -i --privileged {IMAGE} sh -s </tmp/attempts.sh
         # The end of one is nobody else's.
         timeout 60 $run --rm --privileged {IMAGE} sh -c 'echo c >/proc/sysrq-trigger; sleep 60' 2>&1 | grep -o panicked | head -n 1
         nerdctl exec other cat /secret"
    ))?;
    let lines: Vec<_> = shown.lines().collect();
    println!("{}", lines.first().copied().unwrap_or_default());
    ensure!(
        lines == ["tried 30", "panicked", SECRET],
        "what succeeded, and what became of the other: {shown}"
    );
    lab.expect_nothing_left(&before)
}
