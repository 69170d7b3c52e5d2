//! The Go tools at their pinned versions, each from a module of its own: their dependencies clash in one.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rootfs_builder::cache::{Cache, Key};
use rootfs_builder::command::{read_output, run_logged};

use super::{ImageError, package_dir};

/// One module below `tools/`, and where its binaries appear in the node below `/opt/node`.
#[derive(Debug)]
pub(super) struct Tool {
    module: &'static str,
    /// Below `/opt/node`.
    pub(super) destination: &'static str,
    packages: &'static [&'static str],
    /// A package that is nothing but a test binary.
    test: Option<&'static str>,
}

/// All of them. The versions are those of each go.mod.
pub(super) const TOOLS: [Tool; 9] = [
    Tool {
        module: "containerd-2.4",
        destination: "containerd-2.4/bin",
        packages: &CONTAINERD,
        test: None,
    },
    Tool {
        module: "containerd-2.3",
        destination: "containerd-2.3/bin",
        packages: &CONTAINERD,
        test: None,
    },
    Tool {
        module: "containerd-2.2",
        destination: "containerd-2.2/bin",
        packages: &CONTAINERD,
        test: None,
    },
    Tool {
        module: "containerd-2.0",
        destination: "containerd-2.0/bin",
        packages: &CONTAINERD,
        test: None,
    },
    Tool {
        module: "containerd-1.6",
        destination: "containerd-1.6/bin",
        packages: &CONTAINERD_1,
        test: None,
    },
    Tool {
        module: "cni-plugins",
        destination: "cni/bin",
        packages: &[
            "github.com/containernetworking/plugins/plugins/ipam/host-local",
            "github.com/containernetworking/plugins/plugins/main/bridge",
            "github.com/containernetworking/plugins/plugins/main/loopback",
            "github.com/containernetworking/plugins/plugins/meta/firewall",
            "github.com/containernetworking/plugins/plugins/meta/portmap",
            "github.com/containernetworking/plugins/plugins/meta/tuning",
        ],
        test: None,
    },
    Tool {
        module: "nerdctl",
        destination: "bin",
        packages: &["github.com/containerd/nerdctl/v2/cmd/nerdctl"],
        test: None,
    },
    Tool {
        module: "cri-tools",
        destination: "bin",
        packages: &["sigs.k8s.io/cri-tools/cmd/crictl"],
        test: Some("sigs.k8s.io/cri-tools/cmd/critest"),
    },
    Tool {
        module: "registry",
        destination: "bin",
        packages: &["github.com/distribution/distribution/v3/cmd/registry"],
        test: None,
    },
];

const CONTAINERD: [&str; 3] = [
    "github.com/containerd/containerd/v2/cmd/containerd",
    "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
    "github.com/containerd/containerd/v2/cmd/ctr",
];

/// The same before there was a version 2.
const CONTAINERD_1: [&str; 3] = [
    "github.com/containerd/containerd/cmd/containerd",
    "github.com/containerd/containerd/cmd/containerd-shim-runc-v2",
    "github.com/containerd/containerd/cmd/ctr",
];

/// `-p=2`: the linker of a large tool takes a gigabyte.
pub(super) const FLAGS: [&str; 5] = [
    "-p=2",
    "-mod=readonly",
    "-buildvcs=false",
    "-trimpath",
    "-ldflags=-s -w",
];

/// Whatever the user has set up for projects of their own.
pub(super) const ENVIRONMENT: [(&str, &str); 3] =
    [("GOTOOLCHAIN", "local"), ("GOFLAGS", ""), ("GOWORK", "off")];

/// The directory of the tool's binaries, built when the store does not have it.
pub(super) fn or_build(cache: &Cache, tool: &Tool) -> Result<PathBuf, ImageError> {
    let module = package_dir().join("tools").join(tool.module);
    let mut key = Key::new();
    key.text("go", &go_version()?)
        .texts("flag", FLAGS)
        .texts("package", tool.packages.iter().chain(&tool.test))
        .tree("module", &module)?;
    let entry = cache
        .entry("node-tool", &key)
        .describe(tool.module, Duration::from_mins(2));
    let log = entry.log();
    Ok(entry.or_build(|dir| {
        let go = |verb: &[&str], package: &str, output: PathBuf| {
            let mut go = Command::new("go");
            go.args(verb)
                .args(FLAGS)
                .arg("-o")
                .arg(output)
                .arg(package)
                .current_dir(&module)
                .env("CGO_ENABLED", "0")
                .envs(ENVIRONMENT);
            run_logged(&mut go, &log)
        };
        for package in tool.packages {
            go(&["build"], package, dir.join(base_name(package)))?;
        }
        if let Some(package) = tool.test {
            go(&["test", "-c"], package, dir.join(base_name(package)))?;
        }
        Ok::<_, ImageError>(())
    })?)
}

fn base_name(package: &str) -> &str {
    package.rsplit('/').next().unwrap_or(package)
}

/// Asked once: it costs a process.
pub(super) fn go_version() -> Result<String, ImageError> {
    use std::sync::OnceLock;
    static VERSION: OnceLock<String> = OnceLock::new();
    if let Some(version) = VERSION.get() {
        return Ok(version.clone());
    }
    let version = read_output(
        Command::new("go")
            .args(["env", "GOVERSION"])
            .env("GOTOOLCHAIN", "local"),
    )?;
    Ok(VERSION.get_or_init(|| version).clone())
}
