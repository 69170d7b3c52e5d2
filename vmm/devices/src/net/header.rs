//! The header before each frame (virtio 1.2 section 5.1.6), and the features
//! that decide what may be in it.

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Length of `struct virtio_net_hdr` since virtio 1.0, with `num_buffers`.
pub(super) const HEADER_BYTES: usize = 12;
/// Offset of `flags`; `gso_type` follows.
pub(super) const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
/// Offset of `num_buffers`.
pub(super) const NUM_BUFFERS: usize = 10;

/// Ethernet's header.
pub(super) const ETHERNET_BYTES: usize = 14;
/// A VLAN's tag in it.
const VLAN_BYTES: usize = 4;
/// Longest packet: `GSO_LEGACY_MAX_SIZE` of Linux, more than IP itself can say.
const MAX_PACKET_BYTES: usize = 0x1_0000;
/// Longest frame, with the header before it.
pub(super) const MAX_FRAME_BYTES: usize =
    HEADER_BYTES + ETHERNET_BYTES + VLAN_BYTES + MAX_PACKET_BYTES;

/// What the device offers, of section 5.1.3. UDP is not among what is cut into
/// segments: hosts' taps know that since Linux 6.2 only.
pub(super) const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

/// Which feature needs one of which others (section 5.1.3.1), those first that
/// others need.
const NEEDS: [(u32, u64); 6] = [
    (VIRTIO_NET_F_HOST_TSO4, 1 << VIRTIO_NET_F_CSUM),
    (VIRTIO_NET_F_HOST_TSO6, 1 << VIRTIO_NET_F_CSUM),
    (
        VIRTIO_NET_F_HOST_ECN,
        1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_HOST_TSO6,
    ),
    (VIRTIO_NET_F_GUEST_TSO4, 1 << VIRTIO_NET_F_GUEST_CSUM),
    (VIRTIO_NET_F_GUEST_TSO6, 1 << VIRTIO_NET_F_GUEST_CSUM),
    (
        VIRTIO_NET_F_GUEST_ECN,
        1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6,
    ),
];

/// What the tap calls the features of the receiving side.
const OFFLOADS: [(u32, u32); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
];

/// The features that both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Accepted(u64);

impl Accepted {
    /// A feature without one that it needs, which no driver may accept, counts
    /// as not accepted: a tap would refuse it.
    pub(super) fn new(mut features: u64) -> Self {
        for (feature, needs) in NEEDS {
            if features & needs == 0 {
                features &= !(1 << feature);
            }
        }
        Self(features)
    }

    pub(super) fn has(self, feature: u32) -> bool {
        self.0 & (1 << feature) != 0
    }

    /// `TUN_F_*`: what may be left undone in frames for the guest.
    pub(super) fn offloads(self) -> u32 {
        OFFLOADS
            .into_iter()
            .filter(|&(feature, _)| self.has(feature))
            .fold(0, |offloads, (_, offload)| offloads | offload)
    }

    /// Longest frame for the guest, with the header before it.
    pub(super) fn largest_frame(self, mtu: u16) -> usize {
        if self.has(VIRTIO_NET_F_GUEST_TSO4) || self.has(VIRTIO_NET_F_GUEST_TSO6) {
            MAX_FRAME_BYTES
        } else {
            HEADER_BYTES + ETHERNET_BYTES + VLAN_BYTES + usize::from(mtu)
        }
    }

    /// The header for the tap of a frame that the guest sends with this one;
    /// nothing if the driver may not. The kernel checks the rest, lengths and
    /// offsets, against the frame. What was not negotiated must not get as far:
    /// to cut what a guest made into segments is more than one hole in the
    /// host's kernel has come of.
    pub(super) fn sendable(self, mut header: [u8; HEADER_BYTES]) -> Option<[u8; HEADER_BYTES]> {
        // Section 5.1.6.2.2: the device ignores flags that it does not know.
        header[FLAGS] &= VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        // The tap does not look at it.
        header[NUM_BUFFERS..].fill(0);
        let needs_checksum = header[FLAGS] != 0;
        if needs_checksum && !self.has(VIRTIO_NET_F_CSUM) {
            return None;
        }
        let gso = u32::from(header[GSO_TYPE]);
        let negotiated = match gso & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => gso == VIRTIO_NET_HDR_GSO_NONE,
            // Section 5.1.6.2.1: each segment needs a checksum.
            VIRTIO_NET_HDR_GSO_TCPV4 => self.has(VIRTIO_NET_F_HOST_TSO4) && needs_checksum,
            VIRTIO_NET_HDR_GSO_TCPV6 => self.has(VIRTIO_NET_F_HOST_TSO6) && needs_checksum,
            _ => false,
        };
        let ecn = gso & VIRTIO_NET_HDR_GSO_ECN != 0;
        (negotiated && (!ecn || self.has(VIRTIO_NET_F_HOST_ECN))).then_some(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn offloads_without_the_checksum_are_none() {
        let all = Accepted::new(FEATURES).offloads();
        assert_eq!(all, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN);
        let without = Accepted::new(FEATURES & !(1 << VIRTIO_NET_F_GUEST_CSUM));
        assert_eq!(without.offloads(), 0);
        assert_eq!(without.largest_frame(1500), 12 + 14 + 4 + 1500);
    }

    proptest! {
        /// What a tap takes: segments only with checksums, their marks only
        /// with segments.
        #[test]
        fn offloads_of_any_features_are_taken_by_a_tap(features: u64) {
            let offloads = Accepted::new(features).offloads();
            let segments = offloads & (TUN_F_TSO4 | TUN_F_TSO6) != 0;
            prop_assert!(!segments || offloads & TUN_F_CSUM != 0);
            prop_assert!(segments || offloads & TUN_F_TSO_ECN == 0);
        }

        #[test]
        fn sendable_header_has_only_what_was_negotiated(
            features: u64,
            mut header: [u8; HEADER_BYTES],
            gso in prop::sample::select(vec![0u8, 1, 3, 4, 5, 0x80, 0x81, 0x84]),
            any_gso: bool,
        ) {
            if !any_gso {
                header[GSO_TYPE] = gso;
            }
            let accepted = Accepted::new(features);
            let has = |feature: u32| features & (1 << feature) != 0;
            let Some(sent) = accepted.sendable(header) else {
                prop_assert!(header[FLAGS] & 1 != 0 || header[GSO_TYPE] != 0);
                return Ok(());
            };
            prop_assert_eq!(sent[FLAGS], header[FLAGS] & 1);
            prop_assert_eq!(&sent[1..NUM_BUFFERS], &header[1..NUM_BUFFERS]);
            prop_assert!(sent[FLAGS] == 0 || has(VIRTIO_NET_F_CSUM));
            match sent[GSO_TYPE] {
                0 => {}
                1 | 0x81 => prop_assert!(has(VIRTIO_NET_F_HOST_TSO4) && sent[FLAGS] == 1),
                4 | 0x84 => prop_assert!(has(VIRTIO_NET_F_HOST_TSO6) && sent[FLAGS] == 1),
                other => prop_assert!(false, "segments of type {}", other),
            }
            prop_assert!(sent[GSO_TYPE] < 0x80 || has(VIRTIO_NET_F_HOST_ECN));
        }
    }
}
