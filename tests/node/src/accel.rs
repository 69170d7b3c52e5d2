//! Whether this machine can run nodes on its own KVM: found out by running a guest in a guest, because `/dev/kvm` may be there
//! and still be unable to run an ordinary guest, or run guests that cannot have guests.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rootfs_builder::cache::Cache;

use crate::image::{Base, ImageError};
use crate::launcher::{self, Lifetime};
use crate::qemu::Mode;
use crate::rundir::{self, RunDirError};

/// What can go wrong in finding out; that KVM does not work is no error.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The probe cannot be built.
    #[error("build the probe")]
    Image(#[from] ImageError),
    /// There is no place to remember the result.
    #[error("remember the result")]
    RunDir(#[from] RunDirError),
    /// A file cannot be read or written, or QEMU not be started.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What `node-agent probe` prints when all is well.
const RUNS: &str = "PROBE a guest runs";
/// A guest with nested virtualisation in hardware says so within two seconds.
const PATIENCE: Duration = Duration::from_mins(1);

/// The mode for this machine; found out once per boot of the machine.
///
/// # Errors
/// Any [`ProbeError`].
pub(crate) fn detect(cache: &Cache, base: &Base) -> Result<Mode, ProbeError> {
    if OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Ok(Mode::Emulated);
    }
    let boot_id = PathBuf::from("/proc/sys/kernel/random/boot_id");
    let boot = fs::read_to_string(&boot_id).map_err(|source| ProbeError::File {
        operation: "read",
        path: boot_id,
        source,
    })?;
    let initrd = base.probe_initrd(cache)?;
    // Another kernel or a reboot may change the answer; a file of this user alone holds it.
    let question = format!("{}{}\n{}\n", boot, base.kernel.display(), initrd.display());
    let memory = rundir::base()?.join("mode.json");
    let known = fs::read(&memory)
        .ok()
        .and_then(|text| serde_json::from_slice::<(String, Mode)>(&text).ok());
    if let Some((asked, mode)) = known
        && asked == question
    {
        return Ok(mode);
    }
    let mode = if guest_in_guest_runs(base, &initrd)? {
        Mode::Nested
    } else {
        Mode::Emulated
    };
    // Runs at the same time write the same.
    let text = serde_json::to_vec(&(question, mode)).map_err(io::Error::other);
    text.and_then(|text| fs::write(&memory, text))
        .map_err(|source| ProbeError::File {
            operation: "write",
            path: memory,
            source,
        })?;
    Ok(mode)
}

fn guest_in_guest_runs(base: &Base, initrd: &std::path::Path) -> Result<bool, ProbeError> {
    let mut command = base.qemu().system();
    command.args([
        "-name",
        "probe",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.args([
        "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "512", "-serial", "stdio",
    ]);
    command.args(["-append", "console=ttyS0 panic=-1 quiet"]);
    command
        .arg("-kernel")
        .arg(&base.kernel)
        .arg("-initrd")
        .arg(initrd);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = launcher::spawn(command, Vec::new(), Lifetime::Owner).map_err(|source| {
        ProbeError::File {
            operation: "start QEMU of",
            path: base.root.clone(),
            source,
        }
    })?;
    let (sender, receiver) = mpsc::channel();
    if let Some(mut stdout) = child.stdout.take() {
        thread::spawn(move || {
            let mut text = Vec::new();
            // What came before an error counts.
            let _ = stdout.read_to_end(&mut text);
            let _ = sender.send(text);
        });
    }
    let text = receiver.recv_timeout(PATIENCE).unwrap_or_default();
    // It has ended, or hangs as a KVM of this kind does.
    let _ = child.kill();
    let _ = child.wait();
    Ok(String::from_utf8_lossy(&text).contains(RUNS))
}
