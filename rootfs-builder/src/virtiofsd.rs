//! Upstream's virtiofsd, static: fetched through `rootfs-builder/virtiofsd/Cargo.lock`, built with its own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::build_root::VENDOR;
use crate::cache::{Cache, Key};
use crate::command::run_logged;
use crate::static_build::{StaticBuild, TRIPLE, vendored};

/// The pinned version; `virtiofsd/Cargo.toml` names the same one.
pub const VERSION: &str = "1.14.0";

/// The path of the binary, built when the store does not have it.
///
/// # Errors
/// When its sources cannot be fetched or do not compile.
pub fn or_build(cache: &Cache, workspace: &Path, build: &StaticBuild) -> Result<PathBuf> {
    let manifest = workspace.join("rootfs-builder/virtiofsd/Cargo.toml");
    let mut key = Key::new();
    key.file("Cargo.lock", &manifest.with_file_name("Cargo.lock"))?;
    build.add_to(&mut key);

    let entry = cache
        .entry("virtiofsd", &key)
        .describe(format!("virtiofsd {VERSION}"), Duration::from_mins(3));
    let log = entry.log();
    let path = entry.or_build(|dir| -> Result<()> {
        let vendor = vendored(cache, "virtiofsd", &manifest)?;
        let target = tempfile::tempdir_in(dir).context("make the target directory")?;
        let cargo = build
            .cargo(&vendor, target.path())
            .args([
                "--release",
                "--manifest-path",
                &format!("{VENDOR}/virtiofsd-{VERSION}/Cargo.toml"),
            ])
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
        run_logged(&mut cargo.into_command(), &log)?;
        let binary = target.path().join(TRIPLE).join("release/virtiofsd");
        std::fs::rename(&binary, dir.join("virtiofsd"))
            .with_context(|| format!("take {}", binary.display()))
    })?;
    Ok(path.join("virtiofsd"))
}
