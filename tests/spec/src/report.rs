//! What a checker says about its container, and what became of one run.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Precedes the report, as JSON in one line, on the checker's standard output.
pub const REPORT_MARK: &str = "SPEC-REPORT ";

/// What was found about one field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "lowercase")]
pub enum Verdict {
    /// It has its effect.
    Ok,
    /// It has another.
    Wrong {
        /// By the specification.
        expected: String,
        /// In the container.
        seen: String,
    },
    /// Nothing in the container tells.
    Unchecked {
        /// Why not.
        why: String,
    },
}

/// A verdict about a field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Path of the field, as in `config.json`, with what of it was looked at.
    pub field: String,
    /// What was found.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// Everything that one checker found, in the order in which it looked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// One for each field, or part of one.
    pub findings: Vec<Finding>,
}

impl Report {
    fn push(&mut self, field: impl Into<String>, verdict: Verdict) {
        self.findings.push(Finding {
            field: field.into(),
            verdict,
        });
    }

    /// Takes `seen` for right if it is what was `expected`.
    pub fn compare(
        &mut self,
        field: impl Into<String>,
        expected: impl fmt::Display,
        seen: impl fmt::Display,
    ) {
        let (expected, seen) = (expected.to_string(), seen.to_string());
        let verdict = if expected == seen {
            Verdict::Ok
        } else {
            Verdict::Wrong { expected, seen }
        };
        self.push(field, verdict);
    }

    /// Takes what could be read for right if it is what was `expected`; that it
    /// could not be read is wrong too.
    pub fn compare_read<E: fmt::Display>(
        &mut self,
        field: impl Into<String>,
        expected: impl fmt::Display,
        seen: Result<impl fmt::Display, E>,
    ) {
        match seen {
            Ok(seen) => self.compare(field, expected, seen),
            Err(error) => self.compare(field, expected, format!("cannot read: {error}")),
        }
    }

    /// Notes that nothing in the container tells.
    pub fn unchecked(&mut self, field: impl Into<String>, why: impl Into<String>) {
        self.push(field, Verdict::Unchecked { why: why.into() });
    }

    /// What is wrong: field, expected, seen.
    pub fn wrong(&self) -> impl Iterator<Item = (&str, &str, &str)> {
        self.findings
            .iter()
            .filter_map(|finding| match &finding.verdict {
                Verdict::Wrong { expected, seen } => {
                    Some((finding.field.as_str(), expected.as_str(), seen.as_str()))
                }
                _ => None,
            })
    }
}

/// The runtimes that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// The measure.
    Runc,
    /// Ours.
    Bulkhead,
}

impl Runtime {
    /// Both, in the order in which they are run.
    pub const ALL: [Self; 2] = [Self::Runc, Self::Bulkhead];

    /// As containerd knows it.
    pub fn containerd_name(self) -> &'static str {
        match self {
            Self::Runc => "io.containerd.runc.v2",
            Self::Bulkhead => "io.containerd.bulkhead.v2",
        }
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            Self::Runc => "runc",
            Self::Bulkhead => "bulkhead",
        })
    }
}

/// What became of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Its checker ran to its end.
    Report(Report),
    /// There is no report: the container was refused, or ended before it.
    Failed(String),
}

/// One case run by one runtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The case's name.
    pub case: String,
    /// Its variations.
    pub variations: Vec<String>,
    /// Who ran it.
    pub runtime: Runtime,
    /// How it went.
    pub outcome: Outcome,
}
