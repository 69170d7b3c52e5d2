//! Holds one shim's reports against another's of the same run.

use std::fmt;

use crate::report::Report;

/// Codes that mean the caller's mistake, and are to be the same from every shim.
const CALLERS: [&str; 4] = [
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "INVALID_ARGUMENT",
];
/// The other outcomes of a call: a refusal all the same, but without a reason
/// that a caller could act on.
const VAGUE: [&str; 12] = [
    "CANCELLED",
    "UNKNOWN",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// A difference that is meant.
#[derive(Clone, Copy, Debug)]
pub struct Declared {
    /// In which scenario.
    pub scenario: &'static str,
    /// The facts, by a part of what they are about.
    pub about: &'static str,
    /// What ours says instead.
    pub ours: &'static str,
    /// Why that is right.
    pub reason: &'static str,
}

/// One fact in which ours is not as wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// In which scenario.
    pub scenario: String,
    /// What it is about.
    pub about: String,
    /// What the other shim said; empty when nothing.
    pub theirs: String,
    /// What ours said; empty when nothing.
    pub ours: String,
    /// Why it is meant, if it is.
    pub reason: Option<&'static str>,
}

impl fmt::Display for Difference {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            scenario,
            about,
            theirs,
            ours,
            ..
        } = self;
        let or_nothing = |text: &str| if text.is_empty() { "-" } else { text }.to_owned();
        write!(
            out,
            "{scenario}: {about}: theirs {}, ours {}: {}",
            or_nothing(theirs),
            or_nothing(ours),
            self.reason.unwrap_or("NOT DECLARED")
        )
    }
}

/// What ours is to say where theirs says this.
fn wanted(theirs: &str) -> &str {
    if VAGUE.contains(&theirs) {
        CALLERS[2]
    } else {
        theirs
    }
}

/// Where `ours` is not as wanted after what `theirs` says, each with its reason
/// if it is in `declared`. Of a scenario in which theirs failed, what it saw until
/// then counts.
pub fn differences(theirs: &[Report], ours: &[Report], declared: &[Declared]) -> Vec<Difference> {
    let mut found = Vec::new();
    for report in ours {
        let counterpart = theirs
            .iter()
            .find(|their| their.scenario == report.scenario);
        let theirs_failed = counterpart.is_some_and(|their| their.failure.is_some());
        let their_facts = counterpart
            .map(|their| their.facts.clone())
            .unwrap_or_default();
        let subjects = report.facts.keys().chain(their_facts.keys());
        let subjects: std::collections::BTreeSet<_> = subjects.collect();
        for about in subjects {
            let fact = |facts: &crate::report::Facts| facts.get(about).cloned().unwrap_or_default();
            let (theirs, ours) = (fact(&their_facts), fact(&report.facts));
            // What theirs would have seen, had it not failed before, is not known.
            let unknown = theirs_failed && !their_facts.contains_key(about);
            if unknown || wanted(&theirs) == ours {
                continue;
            }
            let meant = declared.iter().find(|declared| {
                declared.scenario == report.scenario
                    && about.contains(declared.about)
                    && declared.ours == ours
            });
            found.push(Difference {
                scenario: report.scenario.clone(),
                about: about.clone(),
                theirs,
                ours,
                reason: meant.map(|declared| declared.reason),
            });
        }
    }
    found
}

/// What is wrong with a pair of runs, a line each: failures of ours, scenarios
/// that only one has run, and differences that are not meant. `excused` are the
/// scenarios in which theirs may fail, each with its reason.
pub fn verdict(
    theirs: &[Report],
    ours: &[Report],
    declared: &[Declared],
    excused: &[(&str, &str)],
) -> Vec<String> {
    let mut wrong = Vec::new();
    for report in ours {
        if let Some(failure) = &report.failure {
            wrong.push(format!("{}: ours: {failure}", report.scenario));
        }
    }
    for report in theirs {
        let is_excused = excused
            .iter()
            .any(|(scenario, _)| *scenario == report.scenario);
        if let (Some(failure), false) = (&report.failure, is_excused) {
            wrong.push(format!("{}: theirs: {failure}", report.scenario));
        }
    }
    let names = |reports: &[Report]| -> Vec<String> {
        reports
            .iter()
            .map(|report| report.scenario.clone())
            .collect()
    };
    if names(theirs) != names(ours) {
        wrong.push(format!(
            "theirs ran {:?}, ours {:?}",
            names(theirs),
            names(ours)
        ));
    }
    let undeclared = differences(theirs, ours, declared).into_iter();
    let undeclared = undeclared.filter(|difference| difference.reason.is_none());
    wrong.extend(undeclared.map(|difference| difference.to_string()));
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(facts: &[(&str, &str)]) -> Vec<Report> {
        let fact = |&(about, seen): &(&str, &str)| (about.to_owned(), seen.to_owned());
        vec![Report {
            scenario: "s".to_owned(),
            failure: None,
            facts: facts.iter().map(fact).collect(),
            elapsed_ms: 0,
        }]
    }

    const DECLARED: &[Declared] = &[Declared {
        scenario: "s",
        about: "Exec",
        ours: "INVALID_ARGUMENT",
        reason: "it says which",
    }];

    #[test]
    fn verdict_on_the_same_codes_and_on_a_reason_for_none_is_well() {
        let theirs = report(&[("Start", "NOT_FOUND"), ("Stop", "UNKNOWN"), ("x", "7")]);
        let ours = report(&[
            ("Start", "NOT_FOUND"),
            ("Stop", "FAILED_PRECONDITION"),
            ("x", "7"),
        ]);
        assert_eq!(verdict(&theirs, &ours, &[], &[]), [""; 0]);
    }

    #[test]
    fn verdict_on_another_code_a_missing_fact_and_more_names_each() {
        let theirs = report(&[("Exec", "UNKNOWN"), ("Start", "NOT_FOUND"), ("Stop", "OK")]);
        let ours = report(&[
            ("Exec", "INVALID_ARGUMENT"),
            ("Start", "OK"),
            ("More", "OK"),
        ]);
        let wrong = verdict(&theirs, &ours, DECLARED, &[]);
        assert_eq!(
            wrong,
            [
                "s: More: theirs -, ours OK: NOT DECLARED",
                "s: Start: theirs NOT_FOUND, ours OK: NOT DECLARED",
                "s: Stop: theirs OK, ours -: NOT DECLARED"
            ]
        );
        let all = differences(&theirs, &ours, DECLARED);
        assert_eq!(all[0].reason, Some("it says which"));
    }

    #[test]
    fn verdict_on_a_declared_difference_that_is_another_names_it() {
        let theirs = report(&[("Exec", "UNKNOWN")]);
        let ours = report(&[("Exec", "OK")]);
        assert_eq!(verdict(&theirs, &ours, DECLARED, &[]).len(), 1);
    }

    #[test]
    fn verdict_on_failures_and_a_scenario_that_did_not_run_names_them() {
        let mut theirs = report(&[]);
        let mut ours = report(&[("Start", "OK")]);
        theirs[0].failure = Some("hangs".to_owned());
        assert_eq!(verdict(&theirs, &ours, &[], &[("s", "known")]), [""; 0]);
        assert_eq!(verdict(&theirs, &ours, &[], &[]), ["s: theirs: hangs"]);
        ours[0].failure = Some("leaks".to_owned());
        assert_eq!(
            verdict(&theirs, &[], &[], &[("s", "known")]),
            [r#"theirs ran ["s"], ours []"#]
        );
        assert_eq!(
            verdict(&theirs, &ours, &[], &[("s", "known")]),
            ["s: ours: leaks"]
        );
    }
}
