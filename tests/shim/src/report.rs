//! What came of a scenario: one JSON line each.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What was seen, by what it is about: compared between two shims.
pub type Facts = BTreeMap<String, String>;

/// One scenario's outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Its name.
    pub scenario: String,
    /// What did not hold; `None` when all did.
    pub failure: Option<String>,
    /// What was seen until then.
    pub facts: Facts,
    /// How long it took.
    pub elapsed_ms: u64,
}

/// Reads the lines of a run.
///
/// # Errors
/// On the first line that is no report.
pub fn parse(lines: &str) -> serde_json::Result<Vec<Report>> {
    lines.lines().map(serde_json::from_str).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_lines_as_written_is_the_same() {
        let report = Report {
            scenario: "life".to_owned(),
            failure: Some("a\nb".to_owned()),
            facts: [("start".to_owned(), "OK".to_owned())].into(),
            elapsed_ms: 3,
        };
        let line = serde_json::to_string(&report).expect("encodes");
        let lines = format!("{line}\n{line}\n");
        assert_eq!(parse(&lines).expect("parses"), [report.clone(), report]);
    }
}
