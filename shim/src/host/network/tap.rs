//! Taps: interfaces whose other end is a descriptor, for the monitor.
#![expect(unsafe_code, reason = "an ioctl takes a pointer to a structure")]

use std::fs::{self, File};
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use agent_protocol::rtnetlink::{self, Rtnetlink};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

/// What to check when none can be made.
pub(super) const HINT: &str = "check that the host has /dev/net/tun (module tun)";
/// What their names begin with; the index of the interface that each is for
/// follows.
pub(super) const PREFIX: &str = "bulkhead";

const DEVICE: &str = "/dev/net/tun";

nix::ioctl_write_ptr_bad!(
    /// `TUNSETIFF` of `linux/if_tun.h`: its number says `int`, but what it takes
    /// is a `struct ifreq`.
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// A tap of the calling thread's network namespace.
pub(super) struct Tap {
    pub(super) name: String,
    /// Whole Ethernet frames, each after a header of virtio's; when the last copy
    /// is closed the interface is gone.
    pub(super) descriptor: OwnedFd,
}

impl Tap {
    /// Makes the tap for an interface.
    pub(super) fn open(interface: u32) -> io::Result<Self> {
        let name = format!("{PREFIX}{interface}");
        let device = File::options().read(true).write(true).open(DEVICE)?;
        // SAFETY: ifreq is a byte array and a union of plain values, for which all
        // zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { zeroed() };
        // One byte less than there is, so that the name stays terminated.
        let room = &mut request.ifr_name[..libc::IFNAMSIZ - 1];
        for (to, from) in room.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the descriptor is open, and the kernel reads and writes one ifreq
        // at a pointer to one that lives for the call.
        unsafe { tun_set_iff(device.as_raw_fd(), &raw const request) }?;
        Ok(Self {
            name,
            descriptor: device.into(),
        })
    }
}

/// Brings a tap up that only passes frames on: it has no address, and says
/// nothing of its own to the guest.
pub(super) fn set_up(
    netlink: &mut Rtnetlink,
    index: u32,
    mtu: u32,
) -> Result<(), rtnetlink::Error> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes = vec![LinkAttribute::Mtu(mtu)];
    netlink.change(RouteNetlinkMessage::SetLink(link), 0)
}

/// Keeps the namespace's stack from talking IPv6 to the guest by this tap.
pub(super) fn silence(name: &str) {
    let setting = Path::new("/proc/sys/net/ipv6/conf")
        .join(name)
        .join("disable_ipv6");
    // Without IPv6 there is no such file, and nothing to keep from talking.
    let _ = fs::write(setting, "1");
}
