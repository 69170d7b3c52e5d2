//! Benchmarks: each compares two ways in one run on one machine, in turns, and
//! reports their ratio. A time by itself means nothing in an emulated node.

pub mod bare_kvm;
pub mod monitor;
pub mod running;
pub mod timed;

use std::{fmt, time::Duration};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Two ways of doing one thing, measured in turns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// What is measured.
    pub name: String,
    /// What it is compared with.
    pub baseline: Samples,
    /// Ours.
    pub candidate: Samples,
}

/// Times of one way, in microseconds, in the order they were taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Samples {
    /// Which way.
    pub label: String,
    /// One for each run that ended.
    pub times_us: Vec<u64>,
    /// Runs that did not end and were killed; they have no time.
    pub hung: usize,
}

impl Samples {
    /// No times yet.
    pub fn new(label: &str) -> Self {
        Self {
            label: label.to_owned(),
            times_us: Vec::new(),
            hung: 0,
        }
    }

    /// Adds a run; `None` is one that did not end.
    pub fn push(&mut self, time: Option<Duration>) {
        match time {
            Some(time) => self.times_us.push(time.as_micros() as u64),
            None => self.hung += 1,
        }
    }

    /// The smallest time that `percent` of the runs do not exceed (nearest
    /// rank); 0 without runs.
    pub fn percentile_us(&self, percent: usize) -> u64 {
        let mut sorted = self.times_us.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or(0)
    }
}

impl Comparison {
    /// Nothing measured yet.
    pub fn new(name: &str, baseline: &str, candidate: &str) -> Self {
        Self {
            name: name.to_owned(),
            baseline: Samples::new(baseline),
            candidate: Samples::new(candidate),
        }
    }

    /// Runs both ways in turns, so that what else the machine does meets both.
    /// What we are compared with may hang now and then (`None`), which is
    /// counted and shown; ours may not.
    ///
    /// # Errors
    /// The first run of either way that fails, or when more than a quarter of
    /// the baseline's runs hung.
    pub fn measure(
        mut self,
        runs: usize,
        mut baseline: impl FnMut(usize) -> Result<Option<Duration>>,
        mut candidate: impl FnMut(usize) -> Result<Duration>,
    ) -> Result<Self> {
        for run in 0..runs {
            self.baseline.push(baseline(run)?);
            self.candidate.push(Some(candidate(run)?));
            ensure!(
                self.baseline.hung * 4 <= runs,
                "{}: {} hung {} times in {} runs; there is nothing to compare with",
                self.name,
                self.baseline.label,
                self.baseline.hung,
                run + 1
            );
        }
        Ok(self)
    }

    /// Our median over the baseline's.
    #[expect(
        clippy::cast_precision_loss,
        reason = "times far below 2^52 microseconds"
    )]
    pub fn ratio(&self) -> f64 {
        self.candidate.percentile_us(50) as f64 / self.baseline.percentile_us(50) as f64
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "{}", self.name)?;
        for samples in [&self.baseline, &self.candidate] {
            write!(
                out,
                "  {:<28} median {:>10} us   p99 {:>10} us   n {}",
                samples.label,
                samples.percentile_us(50),
                samples.percentile_us(99),
                samples.times_us.len(),
            )?;
            match samples.hung {
                0 => writeln!(out)?,
                hung => writeln!(out, "   did not end and were killed {hung}")?,
            }
        }
        writeln!(out, "  ratio of medians {:.2}", self.ratio())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(times_us: impl IntoIterator<Item = u64>) -> Samples {
        Samples {
            label: String::new(),
            times_us: times_us.into_iter().collect(),
            hung: 0,
        }
    }

    #[test]
    fn percentile_us_of_one_to_hundred_is_its_rank() {
        let samples = samples((1..=100).rev());
        assert_eq!(samples.percentile_us(50), 50);
        assert_eq!(samples.percentile_us(99), 99);
    }

    #[test]
    fn percentile_us_of_few_runs_is_the_largest() {
        assert_eq!(samples([3, 1, 2]).percentile_us(99), 3);
    }

    #[test]
    fn measure_both_ways_take_turns() {
        let order = std::cell::RefCell::new(Vec::new());
        let run = |who: char| {
            order.borrow_mut().push(who);
            Duration::from_micros(1)
        };
        let measured =
            Comparison::new("", "", "").measure(2, |_| Ok(Some(run('b'))), |_| Ok(run('c')));
        assert!(measured.is_ok());
        assert_eq!(*order.borrow(), ['b', 'c', 'b', 'c']);
    }

    #[test]
    fn measure_baseline_that_hangs_once_is_counted_and_shown() -> Result<()> {
        let time = Duration::from_micros(7);
        let measured = Comparison::new("", "", "").measure(
            4,
            |run| Ok((run != 1).then_some(time)),
            |_| Ok(time),
        )?;
        assert_eq!(measured.baseline.hung, 1);
        assert_eq!(measured.baseline.times_us, [7, 7, 7]);
        assert_eq!(measured.candidate.times_us, [7, 7, 7, 7]);
        assert!(measured.to_string().contains("were killed 1"));
        Ok(())
    }

    #[test]
    fn measure_baseline_that_hangs_often_is_refused() {
        let result =
            Comparison::new("", "", "").measure(4, |_| Ok(None), |_| Ok(Duration::from_micros(1)));
        assert!(result.is_err());
    }
}
