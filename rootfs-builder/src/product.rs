//! The product's own binaries, static.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::build_root::SRC;
use crate::cache::{Cache, Entry, Key};
use crate::command::run_logged;
use crate::source::{StagedWorkspace, Workspace};
use crate::static_build::{StaticBuild, TRIPLE, vendored};

/// The agent's binary, the guest's `/init`.
pub const AGENT: &str = "bulkhead-agent";
/// The shim's binary; containerd derives this name from the runtime's.
pub const SHIM: &str = "containerd-shim-bulkhead-v2";
/// The virtual machine monitor's binary.
pub const VMM: &str = "bulkhead-vmm";
/// The operator's command.
pub const CLI: &str = "bulkhead";
/// All of them; each is the name of its package too.
pub const BINARIES: [&str; 4] = [SHIM, VMM, AGENT, CLI];

/// The directory that holds all of [`BINARIES`], built when the store does not have them. `profile` is one of the
/// workspace's cargo profiles.
///
/// # Errors
/// When the sources cannot be read or do not compile.
pub fn or_build(
    cache: &Cache,
    workspace: &Workspace,
    build: &StaticBuild,
    profile: &str,
) -> Result<PathBuf> {
    let mut key = Key::new();
    let mut files = Vec::new();
    for name in BINARIES {
        let file = binary(cache, workspace, build, profile, name)?;
        key.file(name, &file)?;
        files.push(file);
    }
    let entry = cache
        .entry("product", &key)
        .describe(format!("the product ({profile})"), Duration::ZERO);
    let path = entry.or_build(|dir| {
        for (name, file) in BINARIES.iter().zip(&files) {
            fs::hard_link(file, dir.join(name))
                .with_context(|| format!("link {}", file.display()))?;
        }
        anyhow::Ok(())
    })?;
    Ok(path)
}

/// The path of one binary, built when the store does not have it.
///
/// Each is built by itself, so that one does not change, nor fail, with what only another one needs.
///
/// # Errors
/// When the sources cannot be read or do not compile.
pub fn binary(
    cache: &Cache,
    workspace: &Workspace,
    build: &StaticBuild,
    profile: &str,
    name: &str,
) -> Result<PathBuf> {
    // What is there need not wait for whoever compiles something else.
    let mut key = inputs(build, profile, name);
    workspace.add_to(&mut key, name)?;
    if let Some(path) = entry(cache, &key, profile, name).existing() {
        return Ok(path.join(name));
    }
    staged_binary(cache, &workspace.stage(cache)?, build, profile, name)
}

/// Like [`binary`], from sources that are staged already.
///
/// # Errors
/// When the sources cannot be read or do not compile.
pub fn staged_binary(
    cache: &Cache,
    staged: &StagedWorkspace<'_>,
    build: &StaticBuild,
    profile: &str,
    name: &str,
) -> Result<PathBuf> {
    let mut key = inputs(build, profile, name);
    staged.add_to(&mut key, name)?;
    let entry = entry(cache, &key, profile, name);
    let log = entry.log();
    let path = entry.or_build(|dir| {
        // One target directory for all checkouts: the lock on the copy of the sources covers it.
        let target = cache.root().join("target").join(build.id());
        fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
        compile(cache, build, profile, name, staged.dir(), &target, &log)?;
        let built = output_dir(&target, profile).join(name);
        fs::copy(&built, dir.join(name)).with_context(|| format!("take {}", built.display()))?;
        anyhow::Ok(())
    })?;
    Ok(path.join(name))
}

fn inputs(build: &StaticBuild, profile: &str, name: &str) -> Key {
    let mut key = Key::new();
    key.text("profile", profile).text("binary", name);
    build.add_to(&mut key);
    key
}

fn entry(cache: &Cache, key: &Key, profile: &str, name: &str) -> Entry {
    cache
        .entry("binary", key)
        .describe(format!("{name} ({profile})"), Duration::from_mins(2))
}

/// Compiles `name` from `source` into `target`, whatever the store has.
///
/// # Errors
/// When crates cannot be fetched or something does not compile.
pub fn compile(
    cache: &Cache,
    build: &StaticBuild,
    profile: &str,
    name: &str,
    source: &Path,
    target: &Path,
    log: &Path,
) -> Result<()> {
    let vendor = vendored(cache, "the workspace's crates", &source.join("Cargo.toml"))?;
    let cargo = build
        .cargo(&vendor, target)
        .read_only(source, SRC)
        .current_dir(SRC)
        .args(["--profile", profile, "--package", name, "--bins"]);
    Ok(run_logged(&mut cargo.into_command(), log)?)
}

/// Where cargo leaves the binaries of a profile.
pub fn output_dir(target: &Path, profile: &str) -> PathBuf {
    let name = if profile == "dev" { "debug" } else { profile };
    target.join(TRIPLE).join(name)
}
