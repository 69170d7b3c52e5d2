//! The Debian 13 root directory.

use std::path::PathBuf;

use rootfs_builder::cache::Cache;
use rootfs_builder::debian_root::DebianRoot;

use super::ImageError;

const PACKAGES: [&str; 23] = [
    // The node's own life. busybox-static is its init and its initial RAM disk.
    "busybox-static",
    "kmod",
    "linux-image-cloud-amd64",
    "iproute2",
    // Containers: containerd 1.7 for the compatibility test, AppArmor's profiles and parser.
    "apparmor",
    "containerd",
    "runc",
    "iptables",
    "nftables",
    "ca-certificates",
    // What tests look with.
    "acl",
    "attr",
    "e2fsprogs",
    "iperf3",
    "iputils-ping",
    "netcat-openbsd",
    "procps",
    "protobuf-compiler",
    "psmisc",
    "socat",
    "strace",
    "util-linux",
    "xfsprogs",
];

/// QEMU runs the node on the host, and microvm in the node, which the benchmark compares with. Backported: Debian 13's own
/// guests under 10.0 crashed or hung on heavy file traffic where it emulated SVM on two CPUs, and did not under 11.1 (see the
/// README, "What emulation costs").
const QEMU: [&str; 5] = [
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "qemu-utils",
    "seabios",
];

/// The root, made when the store does not have it.
pub(super) fn or_build(cache: &Cache) -> Result<PathBuf, ImageError> {
    Ok(DebianRoot::new("the node's Debian 13 root")
        .packages(PACKAGES)
        .backports(QEMU)
        // Mount points of the tools' and the product's disks; an empty root password, for `shell` on the console; the
        // generated initrd is not used.
        .customize("mkdir -p \"$1/opt/node\" \"$1/opt/bulkhead\"")
        .customize("rm -f \"$1\"/boot/initrd.img-*")
        .or_build(cache)?)
}
