//! Debian 13 root directories, made by mmdebstrap from the mirror that the host itself uses.

mod mirror;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cache::{Cache, CacheError, Key};
use crate::command::{CommandError, read_output, run_logged};

/// The suite of every root: Debian 13.
pub const SUITE: &str = "trixie";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What can go wrong in making a root.
#[derive(Debug, thiserror::Error)]
pub enum DebianRootError {
    /// Its files belong to several users, which only root can arrange.
    #[error("making a Debian root needs root: run this with sudo")]
    NotRoot,
    /// The host has no keys to verify the packages with.
    #[error("{KEYRING} is missing: install debian-archive-keyring")]
    NoKeyring {
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// mmdebstrap failed.
    #[error("make a Debian root")]
    Command(#[from] CommandError),
    /// The store failed.
    #[error("store the Debian root")]
    Cache(#[from] CacheError),
}

/// A description of a root directory. Equal descriptions share one cache entry.
///
/// The versions of the packages are those of the day on which it is built first; the entry is then kept.
#[derive(Clone, Debug)]
pub struct DebianRoot {
    name: String,
    packages: Vec<String>,
    hooks: Vec<String>,
}

impl DebianRoot {
    /// A root of the essential packages and apt. `name` is for the progress lines and is no part of the key.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            packages: Vec::new(),
            hooks: Vec::new(),
        }
    }

    /// Adds packages, with what they depend on but without what they recommend.
    #[must_use]
    pub fn packages<S: Into<String>>(mut self, packages: impl IntoIterator<Item = S>) -> Self {
        self.packages.extend(packages.into_iter().map(Into::into));
        self
    }

    /// Adds packages in the version of the suite's backports. What they depend on comes from the suite itself: name those
    /// of their own source along with them.
    #[must_use]
    pub fn backports<'a>(self, packages: impl IntoIterator<Item = &'a str>) -> Self {
        let packages = packages
            .into_iter()
            .map(|package| format!("{package}/{SUITE}-backports"));
        self.packages(packages.collect::<Vec<_>>())
    }

    /// Adds a shell command that mmdebstrap runs at the end on the host, with the root's path as `$1`.
    #[must_use]
    pub fn customize(mut self, hook: impl Into<String>) -> Self {
        self.hooks.push(hook.into());
        self
    }

    /// The root's directory, made when the store does not have it. Nobody may write to it.
    ///
    /// # Errors
    /// Any [`DebianRootError`].
    pub fn or_build(&self, cache: &Cache) -> Result<PathBuf, DebianRootError> {
        let recipe = self.recipe();
        let mut key = Key::new();
        key.texts("recipe", &recipe);
        let entry = cache
            .entry("debian-root", &key)
            .describe(&self.name, Duration::from_mins(3));
        if let Some(path) = entry.existing() {
            return Ok(root_of(path));
        }
        require_root_and_keyring()?;
        read_output(Command::new("mmdebstrap").arg("--version"))?;
        let log = entry.log();
        let path = entry.or_build(|dir| {
            // In a PID and a mount namespace, it ends with this process, its children and mounts with it. Left alone, it
            // would go on in a directory that the next run sweeps.
            let mut mmdebstrap = Command::new("bwrap");
            mmdebstrap.args(["--die-with-parent", "--new-session", "--unshare-pid"]);
            mmdebstrap.args([
                "--dev-bind",
                "/",
                "/",
                "--proc",
                "/proc",
                "--",
                "mmdebstrap",
            ]);
            mmdebstrap
                .args(&recipe)
                .arg(format!("--keyring={KEYRING}"))
                .arg(SUITE)
                .arg(root_of(dir));
            mmdebstrap.args(mirror::sources(SUITE));
            run_logged(&mut mmdebstrap, &log)
        })?;
        Ok(root_of(&path))
    }

    /// All arguments that shape the result, which are also its key.
    fn recipe(&self) -> Vec<String> {
        // mode=unshare as root keeps real owners, and its mounts vanish with it however it ends.
        let fixed = [
            "--mode=unshare",
            "--variant=minbase",
            "--architectures=amd64",
        ];
        let mut recipe: Vec<_> = fixed.map(str::to_owned).into();
        recipe.push("--aptopt=APT::Install-Recommends \"false\"".to_owned());
        for excluded in ["doc/*", "man/*", "info/*", "locale/*"] {
            recipe.push(format!("--dpkgopt=path-exclude=/usr/share/{excluded}"));
        }
        // Whoever passes the packages' files on needs their licences.
        recipe.push("--dpkgopt=path-include=/usr/share/doc/*/copyright".to_owned());
        if !self.packages.is_empty() {
            recipe.push(format!("--include={}", self.packages.join(",")));
        }
        recipe.extend(
            self.hooks
                .iter()
                .map(|hook| format!("--customize-hook={hook}")),
        );
        recipe
    }
}

/// The entry's own directory belongs to the store; mmdebstrap sets owner and mode of the root's.
fn root_of(entry: &Path) -> PathBuf {
    entry.join("root")
}

fn require_root_and_keyring() -> Result<(), DebianRootError> {
    if fs::metadata("/proc/self").is_ok_and(|own| own.uid() != 0) {
        return Err(DebianRootError::NotRoot);
    }
    fs::metadata(KEYRING)
        .map(|_| ())
        .map_err(|source| DebianRootError::NoKeyring { source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipe_differs_by_package_and_hook_but_not_by_name() {
        let plain = DebianRoot::new("a");
        assert_eq!(plain.recipe(), DebianRoot::new("b").recipe());
        assert_ne!(plain.recipe(), plain.clone().packages(["busybox"]).recipe());
        assert_ne!(
            plain.clone().packages(["busybox"]).recipe(),
            plain.clone().backports(["busybox"]).recipe()
        );
        assert_ne!(
            plain.recipe(),
            plain.clone().customize("mkdir \"$1/src\"").recipe()
        );
    }
}
