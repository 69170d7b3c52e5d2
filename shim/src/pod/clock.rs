//! The guest's wall clock, kept to the host's.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::unix::AsyncFd;
use tracing::{debug, warn};

use super::agent::{Agent, Error};
use crate::events::now_ns;
use crate::readiness::readable;

/// Between two looks. The paravirtual clock drifts by seconds a day, 60 millionths
/// or so: 3.6 ms in this time, of the 10 that are allowed.
const INTERVAL: Duration = Duration::from_mins(1);
/// Readings of which the quickest counts: the others waited for something.
const READINGS: usize = 3;
/// Less is not worth a step.
const TOLERANCE_NS: u64 = 200_000;
/// One reading; a guest this busy is left alone until the next look.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Keeps the guest's clock until the agent is gone: now, at intervals, and
/// whenever the host's own clock is set.
pub async fn keep(agent: Agent) {
    let mut timer = match Timer::new() {
        Ok(timer) => timer,
        Err(error) => {
            warn!("the guest's clock is set once and not kept: {error}");
            return;
        }
    };
    loop {
        if let Err(error) = correct(&agent).await {
            debug!("the guest's clock cannot be set: {error}");
        }
        if let Err(error) = timer.wait().await {
            warn!("the guest's clock is no longer kept: {error}");
            return;
        }
    }
}

/// Sets the guest's clock to the host's.
pub async fn correct(agent: &Agent) -> Result<(), Error> {
    let mut best: Option<Reading> = None;
    for _ in 0..READINGS {
        let before = now_ns();
        let guest = agent.adjust_time(0, READ_TIMEOUT).await?;
        let reading = Reading::new(before, guest, now_ns());
        if best.is_none_or(|best| reading.round_trip_ns < best.round_trip_ns) {
            best = Some(reading);
        }
    }
    match best {
        Some(reading) if reading.shows_a_difference() => {
            let Reading {
                behind_ns,
                round_trip_ns,
            } = reading;
            debug!(behind_ns, round_trip_ns, "correcting the guest's clock");
            agent.adjust_time(behind_ns, READ_TIMEOUT).await.map(drop)
        }
        _ => Ok(()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    /// Host less guest.
    behind_ns: i64,
    round_trip_ns: i64,
}

impl Reading {
    /// The guest looked at its clock somewhere between `before` and `after`:
    /// the middle is wrong by half the round trip at most.
    fn new(before_ns: i64, guest_ns: i64, after_ns: i64) -> Self {
        let round_trip_ns = after_ns.saturating_sub(before_ns);
        Self {
            behind_ns: before_ns
                .saturating_add(round_trip_ns / 2)
                .saturating_sub(guest_ns),
            round_trip_ns,
        }
    }
}

impl Reading {
    /// Whether it is more than the reading's own uncertainty: a clock that KVM
    /// keeps must not be set by a guest's slow answer.
    fn shows_a_difference(&self) -> bool {
        let uncertainty_ns = self.round_trip_ns.unsigned_abs() / 2;
        self.behind_ns.unsigned_abs() > uncertainty_ns.max(TOLERANCE_NS)
    }
}

/// Expires at intervals and when the host's clock is set.
struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
        readable(timer).map(Self)
    }

    async fn wait(&mut self) -> io::Result<()> {
        let at = Duration::from_nanos(now_ns().unsigned_abs()) + INTERVAL;
        let expiry = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(at.subsec_nanos()),
            },
        };
        // An absolute time on CLOCK_REALTIME may be cancelled by setting the
        // clock (timerfd_create(2)): that is what is waited for.
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        match timerfd_settime(self.0.get_ref(), flags, &expiry) {
            Ok(_) => {}
            // It was set since the last time.
            Err(rustix::io::Errno::CANCELED) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        loop {
            let mut ready = self.0.readable().await?;
            let mut expirations = [0; 8];
            match rustix::io::read(self.0.get_ref(), &mut expirations) {
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                // ECANCELED: the clock was set.
                Ok(_) | Err(rustix::io::Errno::CANCELED) => {
                    ready.clear_ready();
                    return Ok(());
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reading_takes_the_middle_of_the_round_trip() {
        let reading = Reading::new(1000, 900, 1200);
        assert_eq!((reading.behind_ns, reading.round_trip_ns), (200, 200));
    }

    #[test]
    fn reading_difference_within_half_the_round_trip_shows_nothing() {
        let slow = Reading::new(0, 0, 20_000_000);
        assert!(!slow.shows_a_difference());
        let quick = Reading::new(0, -5_000_000, 1_000_000);
        assert!(quick.shows_a_difference());
    }

    proptest! {
        #[test]
        fn reading_of_any_lying_guest_never_overflows(before: i64, guest: i64, after: i64) {
            let _ = Reading::new(before, guest, after).shows_a_difference();
        }
    }
}
