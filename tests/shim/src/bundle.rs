//! A bundle as containerd makes it: a directory with the container's
//! configuration and a place for its root file system.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use containerd_shim_protos::types::mount::Mount;
use serde_json::{Value, json};

use crate::streams;

/// What containerd gives a container that asks for nothing.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A container's program: `process` of the OCI runtime configuration.
#[derive(Clone, Debug)]
pub struct Program {
    arguments: Vec<String>,
    /// Width and height in characters.
    terminal: Option<(u32, u32)>,
}

impl Program {
    /// A program with its arguments.
    pub fn new(arguments: &[&str]) -> Self {
        Self {
            arguments: arguments
                .iter()
                .map(|&argument| argument.to_owned())
                .collect(),
            terminal: None,
        }
    }

    /// A shell script.
    pub fn shell(script: &str) -> Self {
        Self::new(&["sh", "-c", script])
    }

    /// Gives it a terminal of this width and height in characters.
    #[must_use]
    pub fn terminal(mut self, width: u32, height: u32) -> Self {
        self.terminal = Some((width, height));
        self
    }

    /// As it stands in a configuration and in a request for an exec.
    pub fn to_json(&self) -> Value {
        let mut process = json!({
            "user": { "uid": 0, "gid": 0 },
            "args": self.arguments,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
            // A death by a signal must not fill the root file system.
            "rlimits": [{ "type": "RLIMIT_CORE", "hard": 0, "soft": 0 }],
        });
        if let Some((width, height)) = self.terminal {
            process["terminal"] = json!(true);
            process["consoleSize"] = json!({ "width": width, "height": height });
        }
        process
    }
}

/// `parent` is of one shim: what another's left there, device rules for one,
/// would hold for the container.
fn configuration(id: &str, parent: &str, program: &Program) -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let strict = ["nosuid", "noexec", "nodev"];
    json!({
        "ociVersion": "1.2.0",
        "process": program.to_json(),
        "root": { "path": "rootfs" },
        "hostname": id,
        "mounts": [
            mount("/proc", "proc", &strict),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &strict),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": {
            "cgroupsPath": format!("/harness/{parent}/{id}"),
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "mount" }, { "type": "network" },
            ],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
        },
    })
}

/// A container's bundle.
#[derive(Debug)]
pub struct Bundle {
    id: String,
    place: PathBuf,
    lower: PathBuf,
}

impl Bundle {
    /// Makes the bundle of container `id` below the directory `scratch`. Its
    /// root file system is what `lower` holds, with a writable layer over it.
    ///
    /// # Errors
    /// When it is there already or cannot be made.
    pub fn create(scratch: &Path, id: &str, lower: &Path, program: &Program) -> Result<Self> {
        let place = scratch.join(id);
        let bundle = Self {
            id: id.to_owned(),
            place,
            lower: lower.to_owned(),
        };
        let failed = || format!("make the bundle {}", bundle.place.display());
        fs::create_dir(&bundle.place).with_context(failed)?;
        for directory in [bundle.path().join("rootfs"), bundle.upper(), bundle.work()] {
            fs::create_dir_all(directory).with_context(failed)?;
        }
        // As containerd does: the shim writes its log into it.
        streams::make_fifo(&bundle.log()).with_context(failed)?;
        bundle.configure(program)?;
        Ok(bundle)
    }

    /// Writes the configuration anew, for another program.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configure(&self, program: &Program) -> Result<()> {
        let scratch = self.place.parent().and_then(Path::file_name);
        let parent = scratch.unwrap_or_default().to_string_lossy();
        let text = configuration(&self.id, &parent, program).to_string();
        fs::write(self.path().join("config.json"), text).context("write config.json")
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bundle itself.
    pub fn path(&self) -> PathBuf {
        self.place.join("bundle")
    }

    /// A place of the test's own, for FIFOs and the like.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// The FIFO of the shim's log.
    pub fn log(&self) -> PathBuf {
        self.path().join("log")
    }

    fn upper(&self) -> PathBuf {
        self.place.join("upper")
    }

    fn work(&self) -> PathBuf {
        self.place.join("work")
    }

    /// Puts a file into the root of the container's file system.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add_file(&self, name: &str, content: &[u8]) -> io::Result<()> {
        fs::write(self.upper().join(name), content)
    }

    /// The mount of the root file system, which is the shim's to make.
    pub fn rootfs(&self) -> Mount {
        Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec![
                format!("lowerdir={}", self.lower.display()),
                format!("upperdir={}", self.upper().display()),
                format!("workdir={}", self.work().display()),
            ],
            ..Mount::default()
        }
    }

    /// Removes it.
    ///
    /// # Errors
    /// When something in it is in use, such as a root file system that is still
    /// mounted.
    pub fn remove(self) -> Result<()> {
        let rootfs = self.path().join("rootfs");
        // Without following into what may be mounted: an empty directory.
        fs::remove_dir(&rootfs).with_context(|| format!("remove {}", rootfs.display()))?;
        fs::remove_dir_all(&self.place).with_context(|| format!("remove {}", self.place.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn create_twice_is_refused_and_remove_takes_all() {
        let scratch = tempfile::tempdir().expect("makes a directory");
        let create = || {
            let program = Program::new(&["true"]);
            Bundle::create(scratch.path(), "c", Path::new("/lower"), &program)
        };
        let bundle = create().expect("creates");
        create().expect_err("is there");
        let text = fs::read_to_string(bundle.path().join("config.json")).expect("reads");
        let config: Value = serde_json::from_str(&text).expect("parses");
        assert_eq!(config["process"]["args"][0], "true");
        bundle.remove().expect("removes");
        assert_eq!(fs::read_dir(scratch.path()).expect("lists").count(), 0);
    }

    #[test]
    fn remove_of_a_bundle_in_use_leaves_the_rootfs_alone() {
        let scratch = tempfile::tempdir().expect("makes a directory");
        let program = Program::new(&["true"]);
        let bundle = Bundle::create(scratch.path(), "c", Path::new("/lower"), &program);
        let bundle = bundle.expect("creates");
        let file = bundle.path().join("rootfs/file");
        fs::write(&file, "as if mounted").expect("writes");
        bundle.remove().expect_err("is in use");
        assert!(file.exists());
    }
}
