//! When a piece of work must be done.

use std::time::{Duration, Instant};

/// One moment for all parts of a run, however many bounds of their own they
/// have.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// Never: each part has its own bound, or none.
    pub const NONE: Self = Self(None);

    /// `time` from now.
    pub fn after(time: Duration) -> Self {
        Self(Some(Instant::now() + time))
    }

    /// The time left; `None` without a deadline.
    pub fn left(self) -> Option<Duration> {
        self.0
            .map(|end| end.saturating_duration_since(Instant::now()))
    }

    /// `bound`, or what is left if that is less.
    pub fn within(self, bound: Duration) -> Duration {
        self.left().map_or(bound, |left| left.min(bound))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn within_gives_the_lesser_of_bound_and_time_left() {
        let hour = Duration::from_hours(1);
        assert_eq!(Deadline::NONE.within(hour), hour);
        assert!(Deadline::after(Duration::from_secs(1)).within(hour) <= Duration::from_secs(1));
        assert_eq!(Deadline::after(2 * hour).within(hour), hour);
        assert_eq!(Deadline::after(Duration::ZERO).left(), Some(Duration::ZERO));
    }
}
