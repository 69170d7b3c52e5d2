//! The guest's root file system: the agent as `/init`, and the places where it mounts the rest.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cache::{Cache, Key};
use crate::cpio::Archive;

/// The archive's name in its entry and in an installation.
pub const FILE: &str = "initramfs.cpio";
/// Mount points of the agent.
const DIRECTORIES: [&str; 5] = ["dev", "proc", "run", "sys", "tmp"];

/// The path of the archive that holds the binary `agent`, stored when it is not there yet.
///
/// # Errors
/// When the agent cannot be read or the archive not be stored.
pub fn or_build(cache: &Cache, agent: &Path) -> Result<PathBuf> {
    let archive = archive(agent)?;
    let mut key = Key::new();
    key.bytes("archive", &archive);
    let entry = cache
        .entry("initramfs", &key)
        .describe("the initramfs", Duration::ZERO);
    Ok(entry
        .or_build(|dir| fs::write(dir.join(FILE), archive))?
        .join(FILE))
}

/// The archive that holds the binary `agent`. It is not compressed: the kernel would spend start-up time on it, and the
/// archive's memory is free again after unpacking either way.
///
/// # Errors
/// When the agent cannot be read.
pub fn archive(agent: &Path) -> Result<Vec<u8>> {
    let binary = fs::read(agent).with_context(|| format!("read the agent {}", agent.display()))?;
    let mut archive = Archive::new();
    for directory in DIRECTORIES {
        archive.directory(directory, 0o755);
    }
    // The kernel opens it as PID 1's standard streams before the agent can mount devtmpfs.
    archive.character_device("dev/console", 0o600, 5, 1);
    // Without a UART there is no console: the streams are closed, and Rust's runtime opens this in their place or aborts.
    archive.character_device("dev/null", 0o666, 1, 3);
    archive.file("init", 0o755, binary);
    let mut bytes = Vec::new();
    archive
        .write_to(&mut bytes)
        .context("write the initramfs")?;
    Ok(bytes)
}
