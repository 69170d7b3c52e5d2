//! The golden snapshot: a booted node, saved once, of which every node is a clone.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rootfs_builder::cache::{Cache, CacheError, Key};
use serde_json::json;

use crate::accel::{self, ProbeError};
use crate::claim;
use crate::command::NodeCommand;
use crate::console;
use crate::image::{Base, Image, ImageError};
use crate::launcher::{self, Lifetime};
use crate::qemu::{Machine, Mode, ROOT_DISK_BYTES, SharedNetwork};
use crate::qmp::{Qmp, QmpError};
use crate::session::{Endpoint, Process, SessionError};

/// What can go wrong in making the snapshot.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    /// The image cannot be built.
    #[error("build the node's image")]
    Image(#[from] ImageError),
    /// Whether the machine's KVM is of use cannot be found out.
    #[error("find out how this machine can run nodes")]
    Probe(#[from] ProbeError),
    /// The store failed, or the build in it.
    #[error("make the node's golden snapshot")]
    Cache(#[from] CacheError),
    /// A file operation or QEMU's start failed.
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
    /// QEMU did not do what was asked.
    #[error("control QEMU")]
    Qmp(#[from] QmpError),
    /// The agent did not do what was asked.
    #[error("prepare the node")]
    Session(#[from] SessionError),
    /// The node did not come up.
    #[error("the node did not boot: {reason}\n{console}")]
    Boot {
        /// Why that is known.
        reason: String,
        /// The last lines of its console, or of QEMU's own output.
        console: String,
    },
    /// A command of the preparation failed.
    #[error("{command}: {outcome}")]
    Prepare {
        /// The command.
        command: String,
        /// Its end and its output.
        outcome: String,
    },
}

fn failed<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> GoldenError + 'a {
    move |source| GoldenError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// How long QEMU may take for one answer; saving the memory is the longest.
pub(crate) const QMP_PATIENCE: Duration = Duration::from_mins(2);
/// How long a boot may take: 15 s on an idle machine.
const BOOT_PATIENCE: Duration = Duration::from_mins(5);

/// What the node does before it is saved, so that no clone has to. Ends with what makes the clones anybody's.
const PREPARATION: [&str; 4] = [
    "for version in 1.6 1.7 2.0 2.2 2.3 2.4; do containerd-use $version || exit; done",
    // Brings the code of containerd, runc and the clients into memory, and all that a first container needs loaded.
    "ctr run --rm docker.io/library/busybox:latest warm true",
    "nerdctl images; crictl info",
    "sync; rm -f /run/node-agent.token",
];

/// A saved node.
#[derive(Clone, Debug)]
pub struct Golden {
    /// What it was booted from.
    pub image: Image,
    /// How it runs.
    pub mode: Mode,
    directory: PathBuf,
}

impl Golden {
    /// The snapshot for this checkout, made when the store does not have it.
    ///
    /// # Errors
    /// Any [`GoldenError`].
    pub fn or_build(cache: &Cache) -> Result<Self, GoldenError> {
        let base = Base::or_build(cache)?;
        let mode = accel::detect(cache, &base)?;
        let image = Image::or_build(cache, base, mode)?;
        let mut key = Key::new();
        key.text("recipe", "1")
            .text("mode", &mode.to_string())
            .texts("preparation", PREPARATION);
        image.add_to(&mut key);
        add_command_line(&mut key, mode);
        let entry = cache
            .entry("node-golden", &key)
            .describe("the node's golden snapshot", Duration::from_mins(1));
        let directory = entry.or_build(|directory| build(&image, mode, directory))?;
        Ok(Self {
            image,
            mode,
            directory,
        })
    }

    /// The memory of the saved node.
    pub(crate) fn ram(&self) -> PathBuf {
        self.directory.join(RAM)
    }

    /// The state of its devices.
    pub(crate) fn devices(&self) -> PathBuf {
        self.directory.join(DEVICES)
    }

    /// Its root disk, over the image's.
    pub(crate) fn disk(&self) -> PathBuf {
        self.directory.join(DISK)
    }

    /// An empty overlay for a clone's root disk, to be copied.
    pub(crate) fn blank(&self) -> PathBuf {
        self.directory.join(BLANK)
    }
}

const RAM: &str = "ram";
const DEVICES: &str = "devices";
const DISK: &str = "disk.qcow2";
const BLANK: &str = "blank.qcow2";

/// A snapshot fits only the device model that it was taken with.
fn add_command_line(key: &mut Key, mode: Mode) {
    let path = Path::new("");
    let machine = Machine {
        name: "",
        mode,
        kernel: path,
        initrd: path,
        disks: &[path, path],
        tools: path,
        product: None,
        ram: path,
        restore: false,
        network: SharedNetwork::None,
        console: path,
        qmp: 0,
    };
    let mut command = Command::new("qemu");
    machine.arguments(&mut command);
    key.texts(
        "argument",
        command
            .get_args()
            .map(|argument| argument.to_string_lossy().into_owned()),
    );
}

fn build(image: &Image, mode: Mode, directory: &Path) -> Result<(), GoldenError> {
    let disk = directory.join(DISK);
    for path in [&disk, &directory.join(BLANK)] {
        let mut create = image.base.qemu().image_tool();
        create
            .args(["create", "-q", "-f", "qcow2"])
            .arg(path)
            .arg(ROOT_DISK_BYTES.to_string());
        let status = create.status().map_err(failed("run qemu-img for", path))?;
        if !status.success() {
            return Err(failed("create", path)(io::Error::other(status.to_string())));
        }
    }
    let ram = directory.join(RAM);
    let console = directory.join("console.log");
    let log = directory.join("qemu.log");
    let (ours, theirs) = UnixStream::pair().map_err(failed("make a socket pair for", &log))?;
    let machine = Machine {
        name: "golden",
        mode,
        kernel: &image.base.kernel,
        initrd: &image.initrd,
        disks: &[&disk, &image.root_disk],
        tools: &image.tools_disk,
        product: None,
        ram: &ram,
        restore: false,
        network: SharedNetwork::None,
        console: &console,
        qmp: theirs.as_raw_fd(),
    };
    let mut command = image.base.qemu().system();
    machine.arguments(&mut command);
    let output = File::create(&log).map_err(failed("create", &log))?;
    let errors = output.try_clone().map_err(failed("open", &log))?;
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    let child = launcher::spawn(command, vec![theirs.into()], Lifetime::Owner)
        .map_err(failed("start QEMU, log in", &log))?;
    let mut booting = Booting {
        child,
        console: &console,
        log: &log,
    };

    let mut qmp = Qmp::open(ours, QMP_PATIENCE).map_err(|error| booting.explain(&error))?;
    let port = qmp.forwarded_port()?;
    let endpoint = booting.claim(port)?;
    for script in PREPARATION {
        prepare(endpoint, script, mode)?;
    }
    if let Some(fault) = console::read(&console)
        .ok()
        .as_deref()
        .and_then(console::first_fault)
    {
        return Err(GoldenError::Boot {
            reason: "its kernel complains".to_owned(),
            console: fault,
        });
    }
    save(&mut qmp, &directory.join(DEVICES))?;
    qmp.quit()?;
    let _ = booting.child.wait();
    for path in [&log, &console] {
        fs::remove_file(path).map_err(failed("remove", path))?;
    }
    // Clones map it; a write would change them all.
    let mut permissions = fs::metadata(&ram)
        .map_err(failed("look at", &ram))?
        .permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&ram, permissions).map_err(failed("protect", &ram))
}

/// QEMU while it boots the golden node; ended when dropped.
struct Booting<'a> {
    child: Child,
    console: &'a Path,
    log: &'a Path,
}

impl Booting<'_> {
    /// Waits for the agent and takes possession of the node.
    fn claim(&mut self, port: u16) -> Result<Endpoint, GoldenError> {
        let deadline = Instant::now() + BOOT_PATIENCE;
        let claim = claim::fresh("node").map_err(failed("read", Path::new("/dev/urandom")))?;
        let endpoint = Endpoint {
            port,
            token: claim.token,
        };
        loop {
            // A boot has no event on this side; QEMU's forwarding refuses or drops connections until the agent listens.
            match endpoint.claim(claim.clone(), Duration::from_secs(20)) {
                Ok(()) => return Ok(endpoint),
                Err(SessionError::Refused(reason)) => {
                    return Err(SessionError::Refused(reason).into());
                }
                Err(_) => thread::sleep(Duration::from_millis(200)),
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.explain(&format!("QEMU ended with {status}")));
            }
            let text = console::read(self.console).unwrap_or_default();
            if text.contains("NODE setup failed") || Instant::now() > deadline {
                return Err(self.explain(&"its setup failed or took too long"));
            }
        }
    }

    fn explain(&self, reason: &dyn std::fmt::Display) -> GoldenError {
        let read = |path: &Path| console::tail(&console::read(path).unwrap_or_default(), 40);
        GoldenError::Boot {
            reason: reason.to_string(),
            console: format!("{}\n{}", read(self.log), read(self.console)),
        }
    }
}

impl Drop for Booting<'_> {
    fn drop(&mut self) {
        // Ended already when all went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn prepare(endpoint: Endpoint, script: &str, mode: Mode) -> Result<(), GoldenError> {
    let command = NodeCommand::script(format!("exec 2>&1; {script}"));
    let stream = endpoint.open(Duration::from_mins(1))?;
    let mut process = Process::start(stream, command.exec(mode.time_factor()))?;
    drop(process.stdin.take());
    let mut output = Vec::new();
    if let Some(mut stdout) = process.stdout.take() {
        stdout
            .read_to_end(&mut output)
            .map_err(failed("read the output of", Path::new(script)))?;
    }
    let status = process.wait()?;
    if status.success() {
        return Ok(());
    }
    Err(GoldenError::Prepare {
        command: script.to_owned(),
        outcome: format!("{status}\n{}", String::from_utf8_lossy(&output)),
    })
}

/// RAM stays in its file; only the devices' state is written.
fn save(qmp: &mut Qmp, state: &Path) -> Result<(), GoldenError> {
    qmp.execute("stop", &json!({}))?;
    set_capabilities(qmp)?;
    let uri = format!("file:{}", state.display());
    qmp.execute("migrate", &json!({"uri": uri}))?;
    Ok(qmp.wait_for_migration()?)
}

/// The same on both sides of a snapshot. `x-ignore-shared` leaves out memory that is a shared file on the saving side;
/// `events` tells the end.
pub(crate) fn set_capabilities(qmp: &mut Qmp) -> Result<(), QmpError> {
    let capabilities =
        ["x-ignore-shared", "events"].map(|name| json!({"capability": name, "state": true}));
    qmp.execute(
        "migrate-set-capabilities",
        &json!({"capabilities": capabilities}),
    )
    .map(|_| ())
}
