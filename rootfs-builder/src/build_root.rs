//! The Debian 13 root with compilers in which everything of the product is built, and running commands in it.
//!
//! What is built there sees the same paths, the same libraries and no network on every machine, so that its bytes do
//! not tell where it was built. The host lends its Rust and Go toolchains, which are the same everywhere by version.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::Cache;
use crate::command::{CommandError, read_output};
use crate::debian_root::{DebianRoot, DebianRootError};

/// Where a source tree appears, read-only.
pub const SRC: &str = "/src";
/// Where a build's output goes.
pub const OUT: &str = "/out";
/// Where a compiler's incremental output lives.
pub const TARGET: &str = "/target";
/// Where the sources of crates appear, read-only.
pub const VENDOR: &str = "/vendor";
const RUST: &str = "/rust";
const GO: &str = "/go";

const PACKAGES: [&str; 18] = [
    // Compilers and linkers, for Rust's linker driver, the kernel and small C programs.
    "gcc",
    "libc6-dev",
    "make",
    "pkg-config",
    // The guest kernel.
    "linux-source-6.12",
    "bc",
    "bison",
    "cpio",
    "flex",
    "kmod",
    "libelf-dev",
    "libssl-dev",
    "perl",
    "xz-utils",
    // Static libraries of the agent and virtiofsd: libseccomp 2.6, where Debian 12 has 2.5.
    "libcap-ng-dev",
    "libseccomp-dev",
    // What the test images are made of.
    "attr",
    "busybox",
];

/// The build root, ready for use.
#[derive(Clone, Debug)]
pub struct BuildRoot {
    path: PathBuf,
}

impl BuildRoot {
    /// Opens the build root, making it when the store does not have it.
    ///
    /// # Errors
    /// Any [`DebianRootError`].
    pub fn open(cache: &Cache) -> Result<Self, DebianRootError> {
        // The root is read-only later, so the mount points must be there from the start.
        let mount_points = [SRC, OUT, TARGET, VENDOR, RUST, GO]
            .map(|point| format!("\"$1\"{point}"))
            .join(" ");
        let path = DebianRoot::new("the Debian 13 build root")
            .packages(PACKAGES)
            .customize(format!("mkdir {mount_points}"))
            .or_build(cache)?;
        Ok(Self { path })
    }

    /// A root of other `packages`, to take programs from and to run them: it has no compilers and no mount points.
    ///
    /// # Errors
    /// Any [`DebianRootError`].
    pub fn of<'a>(
        cache: &Cache,
        name: &str,
        packages: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, DebianRootError> {
        let path = DebianRoot::new(name).packages(packages).or_build(cache)?;
        Ok(Self { path })
    }

    /// The root's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Prepares to run `program` inside: without network, with an environment of nothing but PATH, HOME and a C locale, with
    /// a fresh /proc, /dev and /tmp, and everything else read-only.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Sandboxed {
        Sandboxed {
            root: self.path.clone(),
            options: Vec::new(),
            path: "/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
            dir: "/".to_owned(),
            command: vec![program.as_ref().to_owned()],
        }
    }

    /// The exact versions of installed `packages`, one `name version` per line: an input of what is built with them.
    ///
    /// # Errors
    /// [`CommandError::Failed`] when one of them is not installed.
    pub fn versions(&self, packages: &[&str]) -> Result<String, CommandError> {
        let query = self
            .command("dpkg-query")
            .args(["--show", "--showformat=${Package} ${Version}\\n"])
            .args(packages);
        read_output(&mut query.into_command())
    }
}

/// A command to be run in the build root by bubblewrap. It ends when the process that started it ends.
#[derive(Clone, Debug)]
pub struct Sandboxed {
    root: PathBuf,
    options: Vec<OsString>,
    path: String,
    dir: String,
    command: Vec<OsString>,
}

impl Sandboxed {
    /// Adds an argument of the program.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments of the program.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.option("--setenv", [OsStr::new(name), value.as_ref()])
    }

    /// Shows the host's `from` at `to`, one of this module's mount points, read-only.
    #[must_use]
    pub fn read_only(self, from: &Path, to: &str) -> Self {
        self.option("--ro-bind", [from.as_os_str(), OsStr::new(to)])
    }

    /// Shows the host's `from` at `to`, one of this module's mount points, writable.
    #[must_use]
    pub fn writable(self, from: &Path, to: &str) -> Self {
        self.option("--bind", [from.as_os_str(), OsStr::new(to)])
    }

    /// Sets the working directory.
    #[must_use]
    pub fn current_dir(mut self, dir: &str) -> Self {
        dir.clone_into(&mut self.dir);
        self
    }

    /// Lends the host's Rust toolchain, first in PATH.
    #[must_use]
    pub fn rust(self, toolchain: &RustToolchain) -> Self {
        self.toolchain(&toolchain.sysroot, RUST)
    }

    /// Lends the host's Go toolchain (the directory that `go env GOROOT` prints), first in PATH.
    #[must_use]
    pub fn go(self, goroot: &Path) -> Self {
        self.toolchain(goroot, GO).env("GOROOT", GO)
    }

    /// The command that does it, for [`crate::command`] or for a caller that wants its descriptors.
    pub fn into_command(self) -> Command {
        let mut bwrap = Command::new("bwrap");
        bwrap.args(["--die-with-parent", "--new-session"]);
        bwrap.args([
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-uts",
            "--unshare-net",
            "--hostname",
            "build",
        ]);
        bwrap.arg("--ro-bind").arg(&self.root).arg("/");
        bwrap.args(["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]);
        bwrap.args([
            "--clearenv",
            "--setenv",
            "LC_ALL",
            "C.UTF-8",
            "--setenv",
            "HOME",
            "/tmp",
        ]);
        bwrap.args(["--setenv", "PATH", &self.path, "--chdir", &self.dir]);
        bwrap.args(&self.options).arg("--").args(&self.command);
        bwrap
    }

    fn toolchain(mut self, from: &Path, to: &str) -> Self {
        self.path = format!("{to}/bin:{}", self.path);
        self.read_only(from, to)
    }

    fn option<S: AsRef<OsStr>>(mut self, name: &str, values: impl IntoIterator<Item = S>) -> Self {
        self.options.push(name.into());
        self.options
            .extend(values.into_iter().map(|value| value.as_ref().to_owned()));
        self
    }
}

/// The Rust toolchain of the host that the workspace selects.
#[derive(Clone, Debug)]
pub struct RustToolchain {
    sysroot: PathBuf,
    version: String,
}

impl RustToolchain {
    /// Asks the host's `rustc`, as seen from the directory `workspace`.
    ///
    /// # Errors
    /// [`CommandError`] when there is no usable `rustc` in PATH.
    pub fn open(workspace: &Path) -> Result<Self, CommandError> {
        let rustc =
            |args: &[&str]| read_output(Command::new("rustc").args(args).current_dir(workspace));
        Ok(Self {
            sysroot: rustc(&["--print", "sysroot"])?.into(),
            version: rustc(&["-vV"])?,
        })
    }

    /// What `rustc -vV` prints: an input of everything that it compiles.
    pub fn version(&self) -> &str {
        &self.version
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sandbox over the machine's own root: what it keeps out does not depend on what is in the root.
    fn inside(script: &str) -> String {
        let root = BuildRoot { path: "/".into() };
        read_output(&mut root.command("sh").args(["-c", script]).into_command()).unwrap()
    }

    #[test]
    fn command_environment_is_fixed_and_tmp_is_fresh() {
        let expected = "HOME=/tmp\nLC_ALL=C.UTF-8\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\nPWD=/";
        assert_eq!(inside("env | grep -v ^_= | sort; ls -A /tmp"), expected);
    }

    #[test]
    fn command_network_is_its_own_loopback() {
        assert_eq!(
            inside("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '"),
            "lo"
        );
    }

    #[test]
    fn command_processes_of_the_machine_are_out_of_sight() {
        assert_eq!(
            inside("cat /proc/[0-9]*/comm | grep -c -v -e bwrap -e sh -e cat -e grep || true"),
            "0"
        );
    }

    #[test]
    fn command_root_cannot_be_written() {
        assert_eq!(
            inside("touch /etc/bulkhead-test 2>/dev/null || echo refused"),
            "refused"
        );
    }
}
