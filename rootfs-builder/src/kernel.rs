//! The guest kernel, built in the build root by the script in `guest-kernel-config`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::build_root::{BuildRoot, OUT, SRC};
use crate::cache::{Cache, Key};
use crate::command::{read_output, run_attached};

/// The directory that holds `vmlinux`, its `config` and its `version`, built when the store does not have them.
///
/// # Errors
/// When the kernel does not compile, or does not have the options that were asked for.
pub fn or_build(cache: &Cache, workspace: &Path, root: &BuildRoot) -> Result<PathBuf> {
    // A copy, so that an edit during the long build cannot put one recipe's kernel under another one's key.
    let scratch = tempfile::tempdir().context("make a directory for the kernel's recipe")?;
    let recipe = scratch.path().join("recipe");
    let mut copy = Command::new("cp");
    read_output(
        copy.arg("-R")
            .arg(workspace.join("guest-kernel-config"))
            .arg(&recipe),
    )?;
    let script = |arguments: &[&str]| {
        root.command(format!("{SRC}/build"))
            .read_only(&recipe, SRC)
            .args(arguments)
    };

    let mut key = Key::new();
    key.text(
        "recipe",
        &read_output(&mut script(&["--key"]).into_command())?,
    );
    let entry = cache
        .entry("kernel", &key)
        .describe("the guest kernel", Duration::from_mins(12));
    let path = entry.or_build(|dir| {
        let jobs = std::thread::available_parallelism()
            .context("count the processors")?
            .to_string();
        // Sources and objects, 2 GB in 90,000 files, stay in the sandbox's /tmp, which is memory: a disk would take longer to
        // forget them than the kernel takes to compile.
        let build = script(&[OUT, &jobs]).writable(dir, OUT);
        run_attached(&mut build.into_command())?;
        anyhow::Ok(())
    })?;
    Ok(path)
}
