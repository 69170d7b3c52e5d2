//! The shim by itself, without containerd, held to what runc's does.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_node::NodeCommand;
use rootfs_builder::build_root::{BuildRoot, RustToolchain};
use rootfs_builder::cache::Cache;
use rootfs_builder::product;
use rootfs_builder::source::Workspace;
use rootfs_builder::static_build::StaticBuild;
use shim_harness::compare::{differences, verdict};
use shim_harness::declared::{DECLARED, EXCUSED};
use shim_harness::report::{self, Report};

use super::Check;
use crate::lab::{IMAGE, Lab};

/// See the names.
pub const CHECKS: &[Check] = &[("shim_by_itself_does_as_runcs", beside_runcs)];

const HARNESS: &str = "bulkhead-shim-harness";
/// On hardware; the node multiplies it.
const TIMEOUT: Duration = Duration::from_mins(5);
const SOAK_TIMEOUT: Duration = Duration::from_mins(30);

fn beside_runcs(lab: &Lab) -> Result<()> {
    lab.node()
        .push(&harness()?, Path::new("/tmp/shim-harness"))?;
    // The parents of all cgroups, which stay as containerd's own do.
    lab.succeed(&format!(
        "mkdir -p /sys/fs/cgroup/harness /var/lib/shim-harness /run/shim-harness
         ctr images mount {IMAGE} /run/shim-harness"
    ))?;
    let outcome = compare(lab);
    lab.succeed(
        "ctr images unmount --rm /run/shim-harness; rm -rf /var/lib/shim-harness
         find /sys/fs/cgroup/harness -depth -type d -exec rmdir {} +",
    )?;
    outcome
}

/// What runc's shim leaves of the scenarios in which it dies.
const TAKE_AWAY: &str = r#"
set -e
left=$(find /sys/fs/cgroup/harness -mindepth 1 -name cgroup.procs -exec cat {} +)
find /sys/fs/cgroup/harness -mindepth 1 -maxdepth 1 -type d -exec sh -c 'echo 1 >"$1/cgroup.kill"' - {} \;
for pid in $left; do timeout 60 tail --pid="$pid" -f /dev/null || exit 1; done
find /sys/fs/cgroup/harness -mindepth 1 -depth -type d -exec rmdir {} +
cut -d' ' -f5 /proc/self/mountinfo | { grep ^/var/lib/shim-harness/ || true; } | tac | xargs --no-run-if-empty umount
"#;

fn compare(lab: &Lab) -> Result<()> {
    let theirs = run(lab, "containerd-shim-runc-v2")?;
    lab.succeed(TAKE_AWAY)?;
    let before = lab.resources()?;
    let ours = run(lab, "containerd-shim-bulkhead-v2")?;
    for difference in differences(&theirs, &ours, DECLARED) {
        println!("  {difference}");
    }
    let wrong = verdict(&theirs, &ours, DECLARED, EXCUSED);
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    lab.expect_nothing_left(&before)
}

fn run(lab: &Lab, shim: &str) -> Result<Vec<Report>> {
    let path = lab.succeed(&format!("command -v {shim}"))?;
    let factor = lab.node().time_factor().to_string();
    let command = NodeCommand::new("/tmp/shim-harness")
        .args(["--shim", &path, "--rootfs", "/run/shim-harness"])
        .args(["--scratch", &format!("/var/lib/shim-harness/{shim}")])
        .args(["--time-factor", &factor])
        .args(lab.soak().then_some("--soak"))
        .timeout(if lab.soak() { SOAK_TIMEOUT } else { TIMEOUT });
    let output = lab.node().run(command)?;
    let told = output.stderr_text();
    ensure!(
        output.status.success(),
        "the harness for {shim} ended with {}:\n{told}",
        output.status
    );
    let reports = report::parse(&output.stdout_text()).with_context(|| told.clone())?;
    for report in &reports {
        let failure = report.failure.as_deref().unwrap_or("ok");
        println!(
            "  {shim}: {} in {} ms: {failure}",
            report.scenario, report.elapsed_ms
        );
    }
    Ok(reports)
}

/// The static binary, built like the product when the cache does not have it.
fn harness() -> Result<PathBuf> {
    let cache = Cache::open()?;
    let workspace = Workspace::open(Path::new(env!("CARGO_MANIFEST_DIR")))?;
    let root = BuildRoot::open(&cache)?;
    let rust = RustToolchain::open(workspace.root())?;
    let build = StaticBuild::open(root, rust)?;
    product::binary(&cache, &workspace, &build, "release", HARNESS)
}
