//! critest's report of a run: the part of Ginkgo's JSON (onsi/ginkgo, types.Report) that is looked at.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// How one spec ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Spec {
    /// Its full name: the containers' texts and its own.
    pub name: String,
    /// How it ended.
    pub state: State,
    /// How long it took; in an emulated node this says nothing alone.
    pub milliseconds: u64,
    /// Why it failed or skipped itself.
    pub message: String,
}

/// How a spec ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It passed.
    Passed,
    /// It skipped itself, because of what it found, or was not asked for.
    Skipped,
    /// Anything else: failed, panicked, timed out, interrupted.
    Failed,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Vec<Report>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Report {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    /// Nanoseconds.
    run_time: u64,
    #[serde(default)]
    failure: Failure,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Failure {
    message: String,
}

/// The specs of a report. What is no spec, as a suite's preparation, is left out unless it failed.
///
/// # Errors
/// When the text is no such report.
pub fn parse(text: &str) -> Result<Vec<Spec>> {
    let suites: Vec<Suite> = serde_json::from_str(text).context("read critest's report")?;
    let specs = suites.into_iter().flat_map(|suite| suite.spec_reports);
    Ok(specs
        .map(|report| (report.leaf_node_type == "It", spec(report)))
        .filter(|(is_spec, spec)| *is_spec || spec.state == State::Failed)
        .map(|(_, spec)| spec)
        .collect())
}

fn spec(report: Report) -> Spec {
    let mut words = report.container_hierarchy_texts.unwrap_or_default();
    words.push(if report.leaf_node_text.is_empty() {
        report.leaf_node_type
    } else {
        report.leaf_node_text
    });
    Spec {
        name: words.join(" "),
        state: match report.state.as_str() {
            "passed" => State::Passed,
            "skipped" | "pending" => State::Skipped,
            _ => State::Failed,
        },
        milliseconds: report.run_time / 1_000_000,
        message: report.failure.message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_names_states_and_messages() {
        let text = r#"[{"SpecReports":[
            {"ContainerHierarchyTexts":null,"LeafNodeType":"BeforeSuite","LeafNodeText":"","State":"passed","RunTime":1},
            {"ContainerHierarchyTexts":["[k8s.io] Pod","when"],"LeafNodeType":"It","LeafNodeText":"runs","State":"passed","RunTime":2500000},
            {"ContainerHierarchyTexts":["[k8s.io] Pod"],"LeafNodeType":"It","LeafNodeText":"fails","State":"timedout","RunTime":0,
             "Failure":{"Message":"too late","Location":{}}},
            {"ContainerHierarchyTexts":["[k8s.io] Pod"],"LeafNodeType":"It","LeafNodeText":"not here","State":"skipped","RunTime":0}
        ]}]"#;
        let specs = parse(text).unwrap();
        let seen: Vec<_> = specs
            .iter()
            .map(|spec| (spec.name.as_str(), spec.state, spec.message.as_str()))
            .collect();
        assert_eq!(
            seen,
            [
                ("[k8s.io] Pod when runs", State::Passed, ""),
                ("[k8s.io] Pod fails", State::Failed, "too late"),
                ("[k8s.io] Pod not here", State::Skipped, ""),
            ]
        );
        assert_eq!(specs[0].milliseconds, 2);
    }

    #[test]
    fn parse_failed_preparation_is_kept() {
        let text = r#"[{"SpecReports":[
            {"ContainerHierarchyTexts":null,"LeafNodeType":"BeforeSuite","LeafNodeText":"","State":"failed","RunTime":1,
             "Failure":{"Message":"no socket"}}]}]"#;
        assert_eq!(parse(text).unwrap()[0].message, "no socket");
    }
}
