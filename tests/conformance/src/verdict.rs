//! What the runs say about Bulkhead.

use std::fmt::Write;

use crate::Runtime;
use crate::report::{Spec, State};
use crate::skips::Skips;

/// The runs so far.
#[derive(Debug, Default)]
pub struct Verdict(Vec<Run>);

#[derive(Debug)]
struct Run {
    runtime: Runtime,
    specs: Vec<Spec>,
    /// Names of those that were not run.
    left_out: Vec<String>,
}

impl Run {
    fn count(&self, state: State) -> usize {
        self.having(state).count()
    }

    fn having(&self, state: State) -> impl Iterator<Item = &Spec> {
        self.specs.iter().filter(move |spec| spec.state == state)
    }
}

impl Verdict {
    /// Adds the specs of a run, and the names of those that were left out of it.
    pub fn add(&mut self, runtime: Runtime, specs: Vec<Spec>, left_out: &[String]) {
        self.0.push(Run {
            runtime,
            specs,
            left_out: left_out.to_vec(),
        });
    }

    /// Whether every spec that Bulkhead failed is one that runc failed too: what runc fails, the node is to blame for.
    pub fn passed(&self) -> bool {
        self.of_bulkhead()
            .flat_map(|run| run.having(State::Failed))
            .all(|spec| self.runc_failed(&spec.name))
    }

    /// Whether every spec was there to be passed: one that skips itself found that the node or the runtime lacks something.
    pub fn complete(&self) -> bool {
        self.of_bulkhead().all(|run| run.count(State::Skipped) == 0)
    }

    fn of_bulkhead(&self) -> impl Iterator<Item = &Run> {
        self.0.iter().filter(|run| run.runtime == Runtime::Bulkhead)
    }

    fn runc_failed(&self, name: &str) -> bool {
        self.0
            .iter()
            .filter(|run| run.runtime == Runtime::Runc)
            .flat_map(|run| run.having(State::Failed))
            .any(|spec| spec.name == name)
    }

    /// Counts for each runtime, and every spec that did not pass with the reason.
    pub fn table(&self, skips: &Skips) -> String {
        let mut out = String::new();
        for run in &self.0 {
            let name = run.runtime.handler();
            for spec in run.having(State::Failed) {
                let shared = if run.runtime == Runtime::Bulkhead && self.runc_failed(&spec.name) {
                    " (and with runc)"
                } else {
                    ""
                };
                let _ = writeln!(
                    out,
                    "{name} FAILED{shared}: {}\n    {}",
                    spec.name,
                    brief(&spec.message)
                );
            }
            for spec in run.having(State::Skipped) {
                let _ = writeln!(
                    out,
                    "{name} skipped itself: {}\n    {}",
                    spec.name,
                    brief(&spec.message)
                );
            }
            for spec in &run.left_out {
                let reason = skips.reason(spec).unwrap_or_default();
                let _ = writeln!(out, "{name} left out: {spec}\n    {reason}");
            }
        }
        let _ = writeln!(
            out,
            "{:10} {:>7} {:>7} {:>15} {:>9}",
            "", "passed", "failed", "skipped itself", "left out"
        );
        for run in &self.0 {
            let _ = writeln!(
                out,
                "{:10} {:>7} {:>7} {:>15} {:>9}",
                run.runtime.handler(),
                run.count(State::Passed),
                run.count(State::Failed),
                run.count(State::Skipped),
                run.left_out.len()
            );
        }
        out
    }
}

/// The beginning of a message, in one line.
fn brief(message: &str) -> String {
    let words: Vec<_> = message.split_whitespace().collect();
    let mut text = words.join(" ");
    if let Some((end, _)) = text.char_indices().nth(300) {
        text.truncate(end);
        text.push_str(" ...");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, state: State) -> Spec {
        Spec {
            name: name.to_owned(),
            state,
            milliseconds: 0,
            message: format!("why {name}"),
        }
    }

    #[test]
    fn passed_failure_that_runc_shares_is_the_nodes() {
        let mut verdict = Verdict::default();
        verdict.add(Runtime::Runc, vec![spec("a", State::Failed)], &[]);
        verdict.add(
            Runtime::Bulkhead,
            vec![spec("a", State::Failed), spec("b", State::Passed)],
            &[],
        );
        assert!(verdict.passed());
        verdict.add(Runtime::Bulkhead, vec![spec("b", State::Failed)], &[]);
        assert!(!verdict.passed());
    }

    #[test]
    fn complete_a_spec_that_skips_itself_is_missing() {
        let mut verdict = Verdict::default();
        verdict.add(Runtime::Runc, vec![spec("a", State::Skipped)], &[]);
        assert!(verdict.complete());
        verdict.add(Runtime::Bulkhead, vec![spec("a", State::Skipped)], &[]);
        assert!(verdict.passed() && !verdict.complete());
    }

    #[test]
    fn passed_without_a_run_of_runc_no_failure_is_excused() {
        let mut verdict = Verdict::default();
        verdict.add(Runtime::Bulkhead, vec![spec("a", State::Failed)], &[]);
        assert!(!verdict.passed());
    }

    #[test]
    fn brief_long_message_is_one_short_line() {
        assert_eq!(brief("a\n  b"), "a b");
        assert!(brief(&"é".repeat(400)).ends_with("é ..."));
    }
}
