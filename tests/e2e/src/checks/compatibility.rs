//! The same on the other containerds.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab, RUN};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("exit_code_on_containerd_1_6", on_1_6),
    ("exit_code_on_containerd_1_7", on_1_7),
    ("exit_code_on_containerd_2_0", on_2_0),
    ("exit_code_on_containerd_2_2", on_2_2),
    ("exit_code_on_containerd_2_3", on_2_3),
];

fn on_1_6(lab: &Lab) -> Result<()> {
    // nerdctl 2 is not made for it.
    with_version(lab, "1.6", || with_ctr(lab))
}

fn on_1_7(lab: &Lab) -> Result<()> {
    with_version(lab, "1.7", || with_nerdctl(lab))
}

fn on_2_0(lab: &Lab) -> Result<()> {
    between(lab, "2.0")
}

fn on_2_2(lab: &Lab) -> Result<()> {
    between(lab, "2.2")
}

fn on_2_3(lab: &Lab) -> Result<()> {
    between(lab, "2.3")
}

/// On a version between the oldest and the newest that nerdctl is made for. What
/// nerdctl asks of containerd is not another there than on both.
fn between(lab: &Lab, version: &str) -> Result<()> {
    with_version(lab, version, || {
        if lab.soak() {
            with_nerdctl(lab)
        } else {
            with_ctr(lab)
        }
    })
}

/// Runs `check` on that containerd, and goes back to the newest.
fn with_version(lab: &Lab, version: &str, check: impl Fn() -> Result<()>) -> Result<()> {
    lab.succeed(&format!("containerd-use {version}"))?;
    let outcome = is_running(lab, version).and_then(|()| check());
    let restored = lab.succeed("containerd-use 2.4");
    outcome?;
    restored.map(drop)
}

fn is_running(lab: &Lab, version: &str) -> Result<()> {
    let server = lab.succeed("ctr version | sed -n '/Server/,$ s/ *Version: *//p'")?;
    ensure!(
        server.trim_start_matches('v').starts_with(version),
        "containerd {server} runs"
    );
    Ok(())
}

fn with_ctr(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    lab.expect_code(42, &format!("{RUN} old sh -c 'exit 42'"))?;
    lab.expect_nothing_left(&before)
}

fn with_nerdctl(lab: &Lab) -> Result<()> {
    with_ctr(lab)?;
    lab.make_bridge()?;
    let before = lab.resources()?;
    let nerdctl = format!("nerdctl run --rm --pull never --runtime {BULKHEAD} {IMAGE}");
    lab.expect_code(42, &format!("{nerdctl} sh -c 'exit 42'"))?;
    lab.expect_nothing_left(&before)
}
