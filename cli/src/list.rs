//! `bulkhead list`: the pods that run, from their records below
//! `/run/bulkhead`.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

const RUN_DIR: &str = "/run/bulkhead";
const RECORD: &str = "pod.json";
/// The version of the record's form that this command reads.
const VERSION: u32 = 1;
/// How a pod is marked whose shim has died.
const ORPHANED: &str = "orphaned";

/// What every version of a pod's record tells.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// What a pod's record tells, as far as it is shown.
#[derive(Deserialize)]
struct Record {
    shim: Option<Process>,
    monitor: Option<Process>,
    #[serde(default)]
    containers: serde_json::Map<String, serde_json::Value>,
}

#[derive(Deserialize)]
struct Process {
    pid: u32,
    /// Clock ticks after boot, which tell it from a later one of this pid.
    start_ticks: u64,
}

impl Record {
    fn state(&self) -> &'static str {
        match &self.shim {
            Some(shim) if start_ticks(shim.pid) == Some(shim.start_ticks) => "running",
            _ => ORPHANED,
        }
    }
}

/// Prints a line for each pod, and what to do about those without a shim.
pub fn run() -> Result<()> {
    println!(
        "{}",
        row("NAMESPACE", "POD", "MONITOR", "CONTAINERS", "STATE")
    );
    let lines = pods(Path::new(RUN_DIR))?;
    for line in &lines {
        println!("{line}");
    }
    if lines.iter().any(|line| line.ends_with(ORPHANED)) {
        eprintln!(
            "{ORPHANED}: the pod's shim has died. The next pod of the namespace that starts removes what is left, or: \
             containerd-shim-bulkhead-v2 -namespace NAMESPACE -id POD delete >/dev/null"
        );
    }
    Ok(())
}

fn row(namespace: &str, pod: &str, monitor: &str, containers: &str, state: &str) -> String {
    format!("{namespace:<12} {pod:<64} {monitor:<8} {containers:<10} {state}")
}

fn pods(run_dir: &Path) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for namespace in directories(run_dir)? {
        for pod in directories(&namespace)? {
            // A pod that is going has no record any more.
            let Some(record) = read_record(&pod.join(RECORD))? else {
                continue;
            };
            let state = record.state();
            let monitor = record.monitor.map(|process| process.pid.to_string());
            lines.push(row(
                &name(&namespace),
                &name(&pod),
                monitor.as_deref().unwrap_or("-"),
                &record.containers.len().to_string(),
                state,
            ));
        }
    }
    lines.sort();
    Ok(lines)
}

/// Field 22 of `/proc/PID/stat` (`proc_pid_stat(5)`), counted from behind the
/// command's name, which may hold anything, also `) `.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.iter().rposition(|byte| *byte == b')')? + 2;
    let rest = std::str::from_utf8(stat.get(after_name..)?).ok()?;
    rest.split(' ').nth(22 - 3)?.parse().ok()
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
    let malformed = || format!("{} is no pod's record", path.display());
    let Versioned { version } = serde_json::from_slice(&text).with_context(malformed)?;
    ensure!(
        version == VERSION,
        "{} has version {version}, this command knows {VERSION}: use that of the release that made the pod",
        path.display()
    );
    serde_json::from_slice(&text)
        .with_context(malformed)
        .map(Some)
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_record(run: &Path, pod: &str, record: &serde_json::Value) {
        let pod = run.join(pod);
        fs::create_dir_all(&pod).expect("directory");
        fs::write(pod.join(RECORD), record.to_string()).expect("record");
    }

    #[test]
    fn pods_record_of_a_pod_is_a_line_that_tells_whether_its_shim_lives() {
        let run = tempfile::tempdir().expect("temporary directory");
        let own = start_ticks(std::process::id()).expect("runs");
        for (pod, ticks) in [("k8s.io/web", own), ("k8s.io/old", own - 1)] {
            let record = serde_json::json!({
                "version": 1,
                "shim": {"pid": std::process::id(), "start_ticks": ticks},
                "monitor": {"pid": 42, "start_ticks": 1},
                "containers": {"a": {}, "b": {}},
            });
            write_record(run.path(), pod, &record);
        }
        let lines = pods(run.path()).expect("listed");
        let words = |line: &str| {
            let words = line.split_whitespace().map(str::to_owned);
            words.collect::<Vec<_>>()
        };
        assert_eq!(words(&lines[0]), ["k8s.io", "old", "42", "2", "orphaned"]);
        assert_eq!(words(&lines[1]), ["k8s.io", "web", "42", "2", "running"]);
    }

    #[test]
    fn pods_record_of_another_version_is_refused_by_name() {
        let run = tempfile::tempdir().expect("temporary directory");
        let record = serde_json::json!({"version": 2, "shim": "of another form"});
        write_record(run.path(), "default/a", &record);
        let error = pods(run.path()).expect_err("another version").to_string();
        assert!(
            error.contains("default/a/pod.json has version 2"),
            "{error}"
        );
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
