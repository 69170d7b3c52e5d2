//! Buffer space of one connection, both ways (virtio 1.2 section 5.10.6.3).

use std::num::Wrapping;

/// Bytes of a connection that are kept for a host client which does not read:
/// what the guest is told as `buf_alloc`.
pub(super) const BUF_ALLOC: u32 = 256 * 1024;

/// All counters run freely and wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Credit {
    /// The guest's buffer for this connection.
    guest_buf_alloc: u32,
    /// What of our bytes has left that buffer.
    guest_forwarded: Wrapping<u32>,
    /// Sent to the guest.
    sent: Wrapping<u32>,
    /// Received from the guest.
    received: Wrapping<u32>,
    /// What of it has left our buffer.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest knows it.
    told: Wrapping<u32>,
}

impl Credit {
    /// Takes up what a packet of the guest says.
    pub(super) fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_buf_alloc = buf_alloc;
        self.guest_forwarded = Wrapping(fwd_cnt);
    }

    /// Bytes that the guest has room for. None when it says that it has
    /// forwarded more than it got.
    pub(super) fn room_in_guest(&self) -> u32 {
        let in_guest = self.sent - self.guest_forwarded;
        self.guest_buf_alloc.saturating_sub(in_guest.0)
    }

    pub(super) fn send(&mut self, bytes: u32) {
        self.sent += bytes;
    }

    /// Counts bytes of the guest. False when it sends more than it was told
    /// there is room for.
    #[must_use]
    pub(super) fn receive(&mut self, bytes: u32) -> bool {
        let held = self.received - self.forwarded;
        if bytes > BUF_ALLOC.saturating_sub(held.0) {
            return false;
        }
        self.received += bytes;
        true
    }

    /// Counts bytes that have left our buffer.
    pub(super) fn forward(&mut self, bytes: u32) {
        self.forwarded += bytes;
    }

    /// The guest believes that less than half of our buffer is free, and is
    /// wrong: it should be told before it stops to send.
    pub(super) fn is_update_due(&self) -> bool {
        self.told != self.forwarded && (self.received - self.told).0 > BUF_ALLOC / 2
    }

    /// `fwd_cnt` of the packet that is sent now.
    pub(super) fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.told.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn room_in_guest_that_forwarded_more_than_it_got_is_none() {
        let mut credit = Credit::default();
        credit.hear(1000, 1);
        assert_eq!(credit.room_in_guest(), 0);
    }

    #[test]
    fn receive_beyond_the_buffer_is_refused_and_not_counted() {
        let mut credit = Credit::default();
        assert!(credit.receive(BUF_ALLOC));
        assert!(!credit.receive(1));
        credit.forward(1);
        assert!(credit.receive(1));
    }

    proptest! {
        /// Two ends that keep to the rules never stall and never overflow,
        /// however the counters wrap.
        #[test]
        fn guest_that_keeps_to_credit_never_stalls(
            start: u32,
            steps in proptest::collection::vec((1u32..20_000, 1u32..20_000), 1..400),
        ) {
            let start = Wrapping(start);
            let mut credit = Credit { received: start, forwarded: start, told: start, ..Credit::default() };
            let (mut guest_sent, mut guest_heard, mut held) = (start, start, 0);
            for (send, forward) in steps {
                let free = BUF_ALLOC - (guest_sent - guest_heard).0;
                let send = send.min(free);
                prop_assert!(credit.receive(send));
                guest_sent += send;
                held += send;
                let forward = forward.min(held);
                credit.forward(forward);
                held -= forward;
                if credit.is_update_due() {
                    guest_heard = Wrapping(credit.tell());
                }
                let free = BUF_ALLOC - (guest_sent - guest_heard).0;
                prop_assert!(free > 0 || held > 0, "guest waits for an update that does not come");
            }
        }

        #[test]
        fn room_in_guest_is_what_it_has_not_forwarded(start: u32, buf_alloc in 0u32..1 << 20, sent in 0u32..1 << 20, back in 0u32..1 << 20) {
            let back = back.min(sent);
            let mut credit = Credit { sent: Wrapping(start), ..Credit::default() };
            credit.send(sent);
            credit.hear(buf_alloc, start.wrapping_add(back));
            prop_assert_eq!(credit.room_in_guest(), buf_alloc.saturating_sub(sent - back));
        }
    }
}
