//! runc at its pinned version, compiled in the Debian 13 build root: it is linked with that release's libseccomp.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rootfs_builder::build_root::{BuildRoot, OUT, SRC, TARGET, VENDOR};
use rootfs_builder::cache::{Cache, Key};
use rootfs_builder::command::{read_output, run_logged};

use super::{ImageError, failed, package_dir, tools};

const PACKAGE: &str = "github.com/opencontainers/runc";
const TAGS: &str = "seccomp";

/// The directory that holds `runc`, built when the store does not have it.
pub(super) fn or_build(cache: &Cache, root: &BuildRoot) -> Result<PathBuf, ImageError> {
    let module = package_dir().join("tools/runc");
    let mut key = Key::new();
    key.text("go", &tools::go_version()?)
        .texts("flag", tools::FLAGS)
        .text("tags", TAGS)
        .text("root", &root.path().to_string_lossy())
        .tree("module", &module)?;
    let entry = cache
        .entry("node-tool", &key)
        .describe("runc", Duration::from_mins(1));
    let log = entry.log();
    Ok(entry.or_build(|dir| {
        let go = |arguments: &[&str]| {
            let mut go = Command::new("go");
            go.args(arguments)
                .current_dir(&module)
                .envs(tools::ENVIRONMENT);
            go
        };
        // The build root has no network: what it needs is fetched here, and checked against go.sum here and there.
        run_logged(&mut go(&["mod", "download"]), &log)?;
        let sources = PathBuf::from(read_output(&mut go(&["env", "GOMODCACHE"]))?);
        let goroot = PathBuf::from(read_output(&mut go(&["env", "GOROOT"]))?);
        let scratch = dir.join("go-build");
        std::fs::create_dir(&scratch).map_err(failed("create", &scratch))?;
        let build = root
            .command("go")
            .go(&goroot)
            .read_only(&module, SRC)
            .read_only(&sources, VENDOR)
            .writable(dir, OUT)
            .writable(&scratch, TARGET)
            .current_dir(SRC)
            .env("GOMODCACHE", VENDOR)
            .env("GOCACHE", TARGET)
            .env("GOPROXY", "off")
            .env("GOTOOLCHAIN", "local")
            .env("CGO_ENABLED", "1")
            .arg("build")
            .args(tools::FLAGS)
            .args(["-tags", TAGS, "-o", &format!("{OUT}/runc"), PACKAGE]);
        run_logged(&mut build.into_command(), &log)?;
        std::fs::remove_dir_all(&scratch).map_err(failed("remove", &scratch))
    })?)
}
