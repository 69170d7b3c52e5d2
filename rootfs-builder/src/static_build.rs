//! Compiling Rust in the build root to static binaries, from vendored sources, offline.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::build_root::{BuildRoot, RustToolchain, Sandboxed, TARGET, VENDOR};
use crate::cache::{Cache, CacheError, Key, KeyError};
use crate::command::{CommandError, run_logged};

/// The target of all binaries: static-pie by `crt-static`, because the host's toolchain need not have musl's std.
pub const TRIPLE: &str = "x86_64-unknown-linux-gnu";

const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
/// Given to every compilation for the target, none for build scripts. Paths need no remapping: they are the same on
/// every machine inside the build root.
const RUSTFLAGS: &str = "-C target-feature=+crt-static";

/// Debian packages whose code is linked in, or does the linking: part of the key of every binary.
const LINKED: [&str; 6] = [
    "binutils",
    "gcc",
    "libc6-dev",
    "libcap-ng-dev",
    "libgcc-14-dev",
    "libseccomp-dev",
];

/// What can go wrong before the compiler runs.
#[derive(Debug, thiserror::Error)]
pub enum StaticBuildError {
    /// Cargo.lock cannot be read.
    #[error("vendor the crates of {manifest}")]
    Key {
        /// The manifest.
        manifest: PathBuf,
        /// The cause.
        #[source]
        source: KeyError,
    },
    /// The crates cannot be stored.
    #[error("vendor the crates of {manifest}")]
    Vendor {
        /// The manifest.
        manifest: PathBuf,
        /// The cause.
        #[source]
        source: CacheError,
    },
}

/// The compilers and libraries that binaries are made with.
#[derive(Clone, Debug)]
pub struct StaticBuild {
    root: BuildRoot,
    rust: RustToolchain,
    linked: String,
}

impl StaticBuild {
    /// Combines the build root with the host's Rust.
    ///
    /// # Errors
    /// [`CommandError`] when the root's packages cannot be listed.
    pub fn open(root: BuildRoot, rust: RustToolchain) -> Result<Self, CommandError> {
        let linked = root.versions(&LINKED)?;
        Ok(Self { root, rust, linked })
    }

    /// Adds to `key` everything but the sources that decides about a binary's bytes.
    pub fn add_to(&self, key: &mut Key) {
        key.text("rustc", self.rust.version())
            .text("linked", &self.linked)
            .text("rustflags", RUSTFLAGS);
    }

    /// A short name for this combination of compilers and libraries.
    pub fn id(&self) -> String {
        let mut key = Key::new();
        self.add_to(&mut key);
        key.hex()[..16].to_owned()
    }

    /// `cargo build` for [`TRIPLE`], with the crates in `vendor` and incremental output in `target`. The caller adds the
    /// manifest, packages and profile.
    pub fn cargo(&self, vendor: &Path, target: &Path) -> Sandboxed {
        self.root
            .command("cargo")
            .rust(&self.rust)
            .read_only(vendor, VENDOR)
            .writable(target, TARGET)
            .env("CARGO_HOME", "/tmp/cargo")
            .env("CARGO_TARGET_DIR", TARGET)
            .env("CARGO_INCREMENTAL", "0")
            .env("RUSTFLAGS", RUSTFLAGS)
            .env("LIBSECCOMP_LINK_TYPE", "static")
            .env("LIBSECCOMP_LIB_PATH", LIBRARIES)
            .env("LIBCAPNG_LINK_TYPE", "static")
            .env("LIBCAPNG_LIB_PATH", LIBRARIES)
            .args(["build", "--locked", "--offline", "--target", TRIPLE])
            .args(["--config", "source.crates-io.replace-with='vendor'"])
            .args(["--config", &format!("source.vendor.directory='{VENDOR}'")])
    }
}

/// The sources of all crates that `manifest`'s Cargo.lock names, fetched by the host's cargo with its own network settings
/// and checked against the lock's checksums.
///
/// # Errors
/// Any [`StaticBuildError`].
pub fn vendored(cache: &Cache, what: &str, manifest: &Path) -> Result<PathBuf, StaticBuildError> {
    let mut key = Key::new();
    key.file("Cargo.lock", &manifest.with_file_name("Cargo.lock"))
        .map_err(|source| StaticBuildError::Key {
            manifest: manifest.to_owned(),
            source,
        })?;
    let entry = cache
        .entry("vendor", &key)
        .describe(format!("the sources of {what}"), Duration::from_secs(30));
    let log = entry.log();
    entry
        .or_build(|dir| {
            let mut cargo = Command::new("cargo");
            cargo.args([
                "vendor",
                "--locked",
                "--versioned-dirs",
                "--respect-source-config",
                "--manifest-path",
            ]);
            run_logged(cargo.arg(manifest).arg(dir), &log)
        })
        .map_err(|source| StaticBuildError::Vendor {
            manifest: manifest.to_owned(),
            source,
        })
}
