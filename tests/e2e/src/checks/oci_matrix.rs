//! Containers that check themselves from inside, over a matrix of OCI
//! configurations, under runc and Bulkhead in one node.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use bulkhead_node::NodeCommand;

use super::Check;
use crate::lab::Lab;

/// See the names.
pub const CHECKS: &[Check] = &[(
    "containers_find_every_oci_field_as_under_runc_or_as_is_known",
    matrix,
)];

/// How many random combinations the whole matrix has.
const RANDOM: &str = "40";
/// On hardware; the whole matrix has some 350 containers.
const TIMEOUT: Duration = Duration::from_mins(20);

fn matrix(lab: &Lab) -> Result<()> {
    let binaries = build()?;
    for name in ["spec-checker", "spec-matrix"] {
        lab.node()
            .push(&binaries.join(name), &Path::new("/tmp").join(name))?;
    }
    let seed = seed()?;
    println!("oci matrix: BULKHEAD_SEED={seed}");
    let mut command = NodeCommand::new("/tmp/spec-matrix").args(["--seed", &seed.to_string()]);
    if lab.soak() {
        command = command.args(["--whole", RANDOM]);
    }
    let before = lab.resources()?;
    let output = lab.node().run(command.timeout(TIMEOUT))?;
    let shown = output.stdout_text();
    println!("{shown}");
    ensure!(
        output.status.success(),
        "BULKHEAD_SEED={seed}: {}\n{shown}\n{}",
        output.status,
        output.stderr_text()
    );
    lab.succeed("umount /var/lib/spec-matrix/volume/below && rm -r /var/lib/spec-matrix")?;
    lab.expect_nothing_left(&before)
}

/// The one of `BULKHEAD_SEED`, to see a run again, or another each time.
fn seed() -> Result<u64> {
    if let Some(seed) = env::var_os("BULKHEAD_SEED") {
        let seed = seed.to_string_lossy();
        return seed
            .parse()
            .with_context(|| format!("BULKHEAD_SEED={seed} is no number"));
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(now.as_secs())
}

/// The directory of the checker's binaries: static, because they run in the node
/// and in containers without libraries.
fn build() -> Result<PathBuf> {
    const TRIPLE: &str = "x86_64-unknown-linux-gnu";
    // This program is TARGET/PROFILE/deps/NAME.
    let program = env::current_exe().context("find the path of this program")?;
    let target = program.ancestors().nth(3).context("no target directory")?;
    let target = target.join("static");
    let output = Command::new(env!("CARGO"))
        .args(["build", "--release", "--locked", "--target", TRIPLE])
        .args(["--package", "bulkhead-spec-checker", "--bins"])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        // Its speed is not worth the time that this takes.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .output()
        .context("run cargo")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "build the checker: {error}");
    Ok(target.join(TRIPLE).join("release"))
}
