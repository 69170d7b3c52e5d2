//! The guest's wall clock, kept by the host.

use std::{io, time::Duration};

use nix::{
    sys::time::{TimeSpec, TimeValLike},
    time::{ClockId, clock_gettime, clock_settime},
};

use crate::kernel_calls;

/// From here on a difference is stepped; below, slewing it away takes the
/// kernel 2000 times as long as the difference itself.
const STEP_FROM: Duration = Duration::from_millis(5);
/// No request takes longer to arrive: a clock further ahead is wrong.
const LONGEST_TRANSIT: Duration = Duration::from_secs(1);

/// `CLOCK_REALTIME` in nanoseconds.
///
/// # Errors
/// Never on Linux.
pub fn realtime_ns() -> io::Result<i64> {
    Ok(clock_gettime(ClockId::CLOCK_REALTIME)?.num_nanoseconds())
}

/// Moves the clock by `adjust_ns`: steps when far, slews when near.
///
/// # Errors
/// When the kernel refuses, or the result is before 1970.
pub fn adjust(adjust_ns: i64) -> io::Result<()> {
    if adjust_ns == 0 {
        return Ok(());
    }
    if Duration::from_nanos(adjust_ns.unsigned_abs()) < STEP_FROM {
        return kernel_calls::slew_clock(adjust_ns / 1000);
    }
    let to = realtime_ns()?
        .checked_add(adjust_ns)
        .filter(|to| *to >= 0)
        .ok_or(io::ErrorKind::InvalidInput)?;
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::nanoseconds(to))?;
    Ok(())
}

/// The step, in nanoseconds, that a clock showing `guest_ns` needs when the
/// host showed `host_ns` a moment before.
pub fn step_for_lower_bound(guest_ns: i64, host_ns: i64) -> i64 {
    let ahead = guest_ns.saturating_sub(host_ns);
    if ahead < 0 || ahead > LONGEST_TRANSIT.as_nanos() as i64 {
        -ahead
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_for_lower_bound_clock_behind_the_host_is_moved_to_it() {
        assert_eq!(step_for_lower_bound(1_000, 5_000), 4_000);
    }

    #[test]
    fn step_for_lower_bound_clock_ahead_by_a_transit_time_is_left_alone() {
        assert_eq!(step_for_lower_bound(20_000_000, 5_000), 0);
    }

    #[test]
    fn step_for_lower_bound_clock_far_ahead_is_moved_back() {
        assert_eq!(step_for_lower_bound(3_000_000_000, 0), -3_000_000_000);
    }
}
