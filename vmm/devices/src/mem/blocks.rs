//! Which blocks of the region are plugged, and what the guest may change of it.

use serde::{Deserialize, Serialize};

/// A stretch of blocks, checked to lie in the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    first: usize,
    count: usize,
}

/// Why a request is not done (virtio 1.2 section 5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It makes no sense: outside the region, or plugged already.
    Error,
    /// More than is asked of the guest.
    Nack,
}

/// What is so of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

/// The region's blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Blocks {
    start: u64,
    block_bytes: u64,
    /// What the guest is to have of them, in bytes.
    requested: u64,
    /// Of each block.
    plugged: Vec<bool>,
    plugged_count: usize,
}

impl Blocks {
    /// Of a region at `start`, of whole blocks, none of which is plugged.
    pub(super) fn new(start: u64, bytes: u64, block_bytes: u64) -> Self {
        let count = usize::try_from(bytes / block_bytes).unwrap_or(usize::MAX);
        Self {
            start,
            block_bytes,
            requested: 0,
            plugged: vec![false; count],
            plugged_count: 0,
        }
    }

    /// Whether this is the same region, whatever is plugged in it, and sound.
    pub(super) fn fits(&self, other: &Self) -> bool {
        let counted = other.plugged.iter().filter(|plugged| **plugged).count();
        (self.start, self.block_bytes, self.plugged.len())
            == (other.start, other.block_bytes, other.plugged.len())
            && counted == other.plugged_count
            && other.requested.is_multiple_of(self.block_bytes)
            && other.requested <= self.region_bytes()
    }

    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    pub(super) fn region_bytes(&self) -> u64 {
        self.plugged.len() as u64 * self.block_bytes
    }

    pub(super) fn requested_bytes(&self) -> u64 {
        self.requested
    }

    pub(super) fn plugged_bytes(&self) -> u64 {
        self.plugged_count as u64 * self.block_bytes
    }

    /// Asks for this many bytes of the region, rounded up to whole blocks, which
    /// are returned; `None` if the region has fewer.
    pub(super) fn request(&mut self, bytes: u64) -> Option<u64> {
        let rounded = bytes.checked_next_multiple_of(self.block_bytes)?;
        if rounded > self.region_bytes() {
            return None;
        }
        self.requested = rounded;
        Some(rounded)
    }

    /// The blocks that the guest means.
    pub(super) fn range(&self, address: u64, count: u16) -> Result<Range, Refusal> {
        let offset = address.checked_sub(self.start).ok_or(Refusal::Error)?;
        if count == 0 || !offset.is_multiple_of(self.block_bytes) {
            return Err(Refusal::Error);
        }
        let first = usize::try_from(offset / self.block_bytes).map_err(|_| Refusal::Error)?;
        let count = usize::from(count);
        let end = first.checked_add(count).ok_or(Refusal::Error)?;
        if end > self.plugged.len() {
            return Err(Refusal::Error);
        }
        Ok(Range { first, count })
    }

    /// Where a range lies: its first address and its bytes.
    pub(super) fn extent(&self, range: Range) -> (u64, usize) {
        let start = self.start + range.first as u64 * self.block_bytes;
        let bytes = range.count as u64 * self.block_bytes;
        // At most what is mapped in this process.
        (start, usize::try_from(bytes).unwrap_or(usize::MAX))
    }

    pub(super) fn state(&self, range: Range) -> State {
        let mut blocks = self.plugged[range.first..range.first + range.count].iter();
        let plugged = blocks.clone().filter(|plugged| **plugged).count();
        if plugged == range.count {
            State::Plugged
        } else if blocks.all(|plugged| !plugged) {
            State::Unplugged
        } else {
            State::Mixed
        }
    }

    /// Plugs a range of which nothing is, as far as the guest is to have it.
    pub(super) fn plug(&mut self, range: Range) -> Result<(), Refusal> {
        if self.state(range) != State::Unplugged {
            return Err(Refusal::Error);
        }
        let after = (self.plugged_count + range.count) as u64 * self.block_bytes;
        if after > self.requested {
            return Err(Refusal::Nack);
        }
        self.set(range, true);
        Ok(())
    }

    /// Whether a range may be unplugged: all of it is plugged. The guest may give
    /// more than it is asked for.
    pub(super) fn check_unplug(&self, range: Range) -> Result<(), Refusal> {
        match self.state(range) {
            State::Plugged => Ok(()),
            State::Unplugged | State::Mixed => Err(Refusal::Error),
        }
    }

    /// Unplugs a range that [may be](Self::check_unplug).
    pub(super) fn unplug(&mut self, range: Range) {
        self.set(range, false);
    }

    /// All of it, if there is any.
    pub(super) fn all(&self) -> Range {
        Range {
            first: 0,
            count: self.plugged.len(),
        }
    }

    pub(super) fn unplug_all(&mut self) {
        self.plugged.fill(false);
        self.plugged_count = 0;
    }

    fn set(&mut self, range: Range, plugged: bool) {
        self.plugged[range.first..range.first + range.count].fill(plugged);
        if plugged {
            self.plugged_count += range.count;
        } else {
            self.plugged_count -= range.count;
        }
    }
}
