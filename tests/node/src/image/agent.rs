//! The static agent binary.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rootfs_builder::cache::{Cache, Key};
use rootfs_builder::command::run_logged;

use super::{ImageError, failed, package_dir};

/// Static, so that it runs in the node whatever the libraries of the host that built it.
const RUSTFLAGS: &str = "-C target-feature=+crt-static";
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The binary's name.
pub(super) const NAME: &str = "node-agent";

/// The directory of the agent, compiled by the host's cargo when the store does not have it.
pub(super) fn or_build(cache: &Cache) -> Result<PathBuf, ImageError> {
    let package = package_dir().join("agent");
    let mut key = Key::new();
    key.text("rustflags", RUSTFLAGS).tree("package", &package)?;
    let entry = cache
        .entry("node-agent", &key)
        .describe("the node's agent", Duration::from_secs(30));
    let log = entry.log();
    Ok(entry.or_build(|dir| {
        let target = dir.join("target");
        let mut cargo = Command::new("cargo");
        cargo
            .args([
                "build",
                "--release",
                "--locked",
                "--bin",
                NAME,
                "--target",
                TARGET,
                "--manifest-path",
            ])
            .arg(package.join("Cargo.toml"))
            .env("CARGO_TARGET_DIR", &target)
            .env("RUSTFLAGS", RUSTFLAGS)
            // Its speed is not worth the time that this takes.
            .env("CARGO_PROFILE_RELEASE_LTO", "off");
        // Set by an outer cargo for what it runs; this build is its own.
        cargo.env_remove("CARGO_ENCODED_RUSTFLAGS");
        run_logged(&mut cargo, &log)?;
        let built = target.join(TARGET).join("release").join(NAME);
        fs::copy(&built, dir.join(NAME)).map_err(failed("take", &built))?;
        fs::remove_dir_all(&target).map_err(failed("remove", &target))
    })?)
}
