//! What the runs of a matrix mean: anything that is not a known difference fails,
//! and so does a known difference that is not seen any more.

use std::fmt::Write as _;

use crate::known::{Effect, Known};
use crate::report::{Outcome, Run, Verdict};

/// The outcome of a matrix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// A line for each run.
    pub table: String,
    /// What is wrong; nothing if all is well.
    pub problems: Vec<String>,
}

/// Judges `runs` by what is known.
pub fn judge(runs: &[Run], known: &[Known]) -> Judgement {
    let mut judgement = Judgement::default();
    let mut seen = vec![false; known.len()];
    for run in runs {
        let summary = match &run.outcome {
            Outcome::Failed(error) => {
                let excuse = excuses(
                    run,
                    known,
                    |effect| matches!(effect, Effect::Refused(words) if error.contains(words)),
                );
                judge_one(run, "refused", error, excuse, &mut seen, &mut judgement);
                format!("refused: {}", last_words(error))
            }
            Outcome::Report(report) => {
                let mut wrong = 0;
                for (field, expected, found) in report.wrong() {
                    wrong += 1;
                    let what = format!("expected {expected:?}, seen {found:?}");
                    let excuse = excuses(
                        run,
                        known,
                        |effect| matches!(effect, Effect::Wrong(prefix) if field.starts_with(prefix)),
                    );
                    judge_one(run, field, &what, excuse, &mut seen, &mut judgement);
                }
                if report.findings.is_empty() {
                    judgement
                        .problems
                        .push(format!("{}: an empty report", name(run)));
                }
                format!("{} findings, {wrong} wrong", report.findings.len())
            }
        };
        let _ = writeln!(
            judgement.table,
            "{:<10} {:<8}  {summary}  [{}]",
            run.case,
            run.runtime,
            run.variations.join(", ")
        );
    }
    for (known, seen) in known.iter().zip(seen) {
        if !seen && runs.iter().any(|run| would_show(run, known)) {
            judgement.problems.push(format!(
                "{:?} {}: {:?} is listed as known and was not seen by all of them: take it off the list",
                known.runtimes, known.variation, known.effect
            ));
        }
    }
    judgement
}

fn name(run: &Run) -> String {
    format!(
        "{} {} [{}]",
        run.runtime,
        run.case,
        run.variations.join(", ")
    )
}

/// The entries that let something pass, by their place in the list.
fn excuses(run: &Run, known: &[Known], matches: impl Fn(Effect) -> bool) -> Vec<usize> {
    let about = |known: &Known| known.is_about(run.runtime, &run.variations);
    let found = known.iter().enumerate();
    found
        .filter(|(_, known)| about(known) && matches(known.effect))
        .map(|(at, _)| at)
        .collect()
}

fn judge_one(
    run: &Run,
    field: &str,
    what: &str,
    excuses: Vec<usize>,
    seen: &mut [bool],
    judgement: &mut Judgement,
) {
    if excuses.is_empty() {
        judgement
            .problems
            .push(format!("{}: {field}: {what}", name(run)));
    }
    for excuse in excuses {
        seen[excuse] = true;
    }
}

/// Whether a run shows that a known difference is gone: where the field could
/// not be looked at, it tells nothing.
fn would_show(run: &Run, known: &Known) -> bool {
    known.is_about(run.runtime, &run.variations)
        && match (known.effect, &run.outcome) {
            (Effect::Refused(_), _) => true,
            (Effect::Wrong(_), Outcome::Failed(_)) => false,
            (Effect::Wrong(prefix), Outcome::Report(report)) => report
                .findings
                .iter()
                .any(|found| found.field.starts_with(prefix) && found.verdict == Verdict::Ok),
        }
}

/// The end of an error, where its cause is.
fn last_words(error: &str) -> String {
    const MOST: usize = 160;
    let line = error.trim().lines().last().unwrap_or_default();
    let skipped = line.chars().count().saturating_sub(MOST);
    line.chars().skip(skipped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Report, Runtime};

    const KNOWN: &[Known] = &[
        Known {
            runtimes: &[Runtime::Bulkhead],
            variation: "refused-one",
            effect: Effect::Refused("not supported"),
            reason: "a test",
        },
        Known {
            runtimes: &[Runtime::Runc],
            variation: "wrong-one",
            effect: Effect::Wrong("some.field"),
            reason: "a test",
        },
    ];

    fn run(runtime: Runtime, variation: &str, outcome: Outcome) -> Run {
        Run {
            case: "case".to_owned(),
            variations: vec![variation.to_owned()],
            runtime,
            outcome,
        }
    }

    fn report(field: &str, seen: &str) -> Outcome {
        let mut report = Report::default();
        report.compare(field, "right", seen);
        Outcome::Report(report)
    }

    fn problems(run: Run) -> usize {
        judge(&[run], KNOWN).problems.len()
    }

    #[test]
    fn judge_what_is_right_is_no_problem() {
        assert_eq!(
            problems(run(Runtime::Runc, "x", report("field", "right"))),
            0
        );
    }

    #[test]
    fn judge_what_is_known_is_no_problem() {
        let failed = Outcome::Failed("it is not supported yet".to_owned());
        assert_eq!(problems(run(Runtime::Bulkhead, "refused-one", failed)), 0);
        let wrong = report("some.field: part", "wrong");
        assert_eq!(problems(run(Runtime::Runc, "wrong-one", wrong)), 0);
    }

    #[test]
    fn judge_what_is_not_known_is_a_problem() {
        let wrong = || report("some.field", "wrong");
        assert_eq!(problems(run(Runtime::Runc, "x", wrong())), 1);
        assert_eq!(problems(run(Runtime::Bulkhead, "wrong-one", wrong())), 1);
        let failed = || Outcome::Failed("not supported".to_owned());
        assert_eq!(problems(run(Runtime::Runc, "refused-one", failed())), 1);
        let empty = Outcome::Report(Report::default());
        assert_eq!(problems(run(Runtime::Runc, "x", empty)), 1);
    }

    #[test]
    fn judge_another_error_than_the_known_is_two_problems() {
        let failed = Outcome::Failed("out of memory".to_owned());
        assert_eq!(problems(run(Runtime::Bulkhead, "refused-one", failed)), 2);
    }

    #[test]
    fn judge_a_known_difference_that_could_not_be_looked_at_is_no_problem() {
        let mut report = Report::default();
        report.unchecked("some.field", "a test");
        let outcome = Outcome::Report(report);
        assert_eq!(problems(run(Runtime::Runc, "wrong-one", outcome)), 0);
    }

    #[test]
    fn judge_a_known_difference_that_is_gone_is_a_problem() {
        let right = report("some.field", "right");
        assert_eq!(problems(run(Runtime::Runc, "wrong-one", right.clone())), 1);
        assert_eq!(problems(run(Runtime::Bulkhead, "refused-one", right)), 1);
    }
}
