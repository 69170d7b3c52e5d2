//! Every example, as it stands in examples/.

use std::path::Path;

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::Lab;

/// See the names.
pub const CHECKS: &[Check] = &[
    ("example_ctr_shows_two_kernels", ctr),
    ("example_nerdctl_shows_the_exit_code", nerdctl),
    ("example_crictl_runs_a_pod", crictl),
    (
        "example_configurations_are_taken_by_containerd",
        configurations,
    ),
    ("bulkhead_check_finds_the_node_fit", check),
    ("bulkhead_list_shows_a_running_pod", list),
];

fn with_examples(lab: &Lab) -> Result<()> {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    lab.node().push(&examples, Path::new("/tmp/examples"))?;
    Ok(())
}

fn ctr(lab: &Lab) -> Result<()> {
    with_examples(lab)?;
    let shown = lab.succeed("/tmp/examples/ctr.sh")?;
    let kernels: Vec<&str> = shown
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .collect();
    ensure!(kernels.len() == 2 && kernels[0] != kernels[1], "{shown}");
    Ok(())
}

fn nerdctl(lab: &Lab) -> Result<()> {
    with_examples(lab)?;
    let shown = lab.succeed("/tmp/examples/nerdctl.sh")?;
    ensure!(
        shown.contains("hello from Linux 6.12") && shown.ends_with("exit code: 42"),
        "{shown}"
    );
    Ok(())
}

fn crictl(lab: &Lab) -> Result<()> {
    with_examples(lab)?;
    let shown = lab.succeed("/tmp/examples/crictl/run.sh")?;
    ensure!(shown.contains("on example"), "{shown}");
    Ok(())
}

fn configurations(lab: &Lab) -> Result<()> {
    with_examples(lab)?;
    let shown = lab.succeed(
        "containerd --config /tmp/examples/containerd/config-v3.toml config dump | grep -A3 'runtimes.bulkhead\\]'
         /usr/bin/containerd --config /tmp/examples/containerd/config-v2.toml config dump | grep -A3 'runtimes.bulkhead\\]'",
    )?;
    ensure!(shown.matches("runtimes.bulkhead").count() == 2, "{shown}");
    Ok(())
}

fn check(lab: &Lab) -> Result<()> {
    let shown = lab.succeed("bulkhead check")?;
    ensure!(!shown.contains("FAILED"), "{shown}");
    Ok(())
}

fn list(lab: &Lab) -> Result<()> {
    let shown = lab.succeed(&format!(
        "ctr run --detach --runtime io.containerd.bulkhead.v2 docker.io/library/busybox:latest listed sleep 1000
         bulkhead list; {}",
        Lab::remove("listed")
    ))?;
    ensure!(
        shown
            .lines()
            .any(|line| line.contains("default") && line.contains("listed")),
        "{shown}"
    );
    Ok(())
}
