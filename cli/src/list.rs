//! `bulkhead list`: the pods that run, from their records below
//! `/run/bulkhead`.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::Deserialize;

const RUN_DIR: &str = "/run/bulkhead";
const RECORD: &str = "pod.json";

/// What a pod's record tells, as far as it is shown.
#[derive(Deserialize)]
struct Record {
    monitor: Option<Process>,
    #[serde(default)]
    containers: serde_json::Map<String, serde_json::Value>,
}

#[derive(Deserialize)]
struct Process {
    pid: u32,
}

/// Prints a line for each pod.
pub fn run() -> Result<()> {
    println!("{}", header());
    for line in pods(Path::new(RUN_DIR))? {
        println!("{line}");
    }
    Ok(())
}

fn header() -> String {
    row("NAMESPACE", "POD", "MONITOR", "CONTAINERS")
}

fn row(namespace: &str, pod: &str, monitor: &str, containers: &str) -> String {
    format!("{namespace:<12} {pod:<64} {monitor:<8} {containers}")
}

fn pods(run_dir: &Path) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for namespace in directories(run_dir)? {
        for pod in directories(&namespace)? {
            // A pod that is going has no record any more.
            let Some(record) = read_record(&pod.join(RECORD))? else {
                continue;
            };
            let monitor = record.monitor.map(|process| process.pid.to_string());
            lines.push(row(
                &name(&namespace),
                &name(&pod),
                monitor.as_deref().unwrap_or("-"),
                &record.containers.len().to_string(),
            ));
        }
    }
    lines.sort();
    Ok(lines)
}

fn directories(parent: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(parent.display().to_string()),
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    let paths = paths.filter(|path| path.as_ref().map_or(true, |path| path.is_dir()));
    paths
        .collect::<Result<_, _>>()
        .with_context(|| parent.display().to_string())
}

fn read_record(path: &Path) -> Result<Option<Record>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context(path.display().to_string()),
    };
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is no pod's record", path.display()))
        .map(Some)
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_record_of_a_pod_is_a_line() {
        let run = tempfile::tempdir().expect("temporary directory");
        let pod = run.path().join("k8s.io/web");
        fs::create_dir_all(&pod).expect("directory");
        let record =
            r#"{"version":1,"monitor":{"pid":42,"start_ticks":1},"containers":{"a":{},"b":{}}}"#;
        fs::write(pod.join(RECORD), record).expect("record");
        let lines = pods(run.path()).expect("listed");
        let words: Vec<&str> = lines[0].split_whitespace().collect();
        assert_eq!(words, ["k8s.io", "web", "42", "2"]);
    }

    #[test]
    fn pods_without_any_is_empty() {
        let run = tempfile::tempdir().expect("temporary directory");
        assert!(
            pods(&run.path().join("bulkhead"))
                .expect("listed")
                .is_empty()
        );
    }

    #[test]
    fn pods_record_that_is_no_record_is_an_error_that_names_it() {
        let run = tempfile::tempdir().expect("temporary directory");
        let pod = run.path().join("default/a");
        fs::create_dir_all(&pod).expect("directory");
        fs::write(pod.join(RECORD), "{").expect("record");
        let error = pods(run.path()).expect_err("malformed");
        assert!(error.to_string().contains("default/a/pod.json"));
    }
}
