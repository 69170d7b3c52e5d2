//! The check that the same inputs give the same bytes: everything that enters a guest is made a second time.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::build_root::BuildRoot;
use crate::cache::{Cache, hex};
use crate::command::read_output;
use crate::image::Image;
use crate::source::Workspace;
use crate::static_build::StaticBuild;
use crate::{initramfs, product};

/// Makes agent, initramfs and images again, the agent in a fresh target directory, and compares them with what the store
/// has. Returns a line for each with its digest.
///
/// # Errors
/// The first that differs, by name; and whatever keeps one from being built.
pub fn check(
    cache: &Cache,
    workspace: &Workspace,
    root: &BuildRoot,
    build: &StaticBuild,
    profile: &str,
) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut compare = |name: &str, first: &[u8], second: &[u8]| {
        let digests = [first, second].map(|bytes| hex(&Sha256::digest(bytes)));
        ensure!(
            digests[0] == digests[1],
            "{name} differs when it is built again: {} and {}",
            digests[0],
            digests[1]
        );
        lines.push(format!("{name} sha256:{}", digests[0]));
        Ok(())
    };

    // A fixed place, so that what a killed run left there goes with the next.
    let _lock = cache.lock("reproducible")?;
    let scratch = cache.root().join("reproducible");
    empty(&scratch)?;
    let (source, target) = (scratch.join("source"), scratch.join("target"));
    empty(&target)?;
    let agent = {
        let staged = workspace.stage(cache)?;
        // Both are made from what is there now; others may stage and compile while the second is made.
        read_output(Command::new("cp").arg("-R").arg(staged.dir()).arg(&source))?;
        product::staged_binary(cache, &staged, build, profile, product::AGENT)?
    };
    eprintln!(
        "building {} again, with all that it depends on ...",
        product::AGENT
    );
    product::compile(
        cache,
        build,
        profile,
        product::AGENT,
        &source,
        &target,
        &scratch.join("log"),
    )?;
    let again = product::output_dir(&target, profile).join(product::AGENT);
    let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
    compare(product::AGENT, &read(&agent)?, &read(&again)?)?;
    compare(
        initramfs::FILE,
        &read(&initramfs::or_build(cache, &agent)?)?,
        &initramfs::archive(&again)?,
    )?;
    for image in Image::ALL {
        compare(
            image.name(),
            &read(&image.or_build(cache, root)?)?,
            &image.archive(root)?,
        )?;
    }
    fs::remove_dir_all(&scratch).with_context(|| format!("remove {}", scratch.display()))?;
    Ok(lines)
}

fn empty(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    fs::create_dir(dir).with_context(|| format!("create {}", dir.display()))
}
