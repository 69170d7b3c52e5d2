//! Making a clone of the golden node a node of its own.

use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;

use crate::command::NodeCommand;
use crate::golden::{self, Golden, QMP_PATIENCE};
use crate::image::make_ext4;
use crate::launcher::{self, Lifetime};
use crate::node::{CONSOLE, LOG, Node, NodeError, NodeOptions, Owned, endpoint, failed};
use crate::qemu::{Machine, PRODUCT_DISK_BYTES};
use crate::qmp::{Qmp, QmpError};
use crate::rundir::{self, Record, RunDir};
use crate::session::Process;
use crate::{claim, health, network};

/// The directory of a clone that is not started yet; dropped, it is removed.
struct Unfinished(Option<RunDir>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(run_dir) = self.0.take() {
            // The cause of the failure is on its way to the caller already; the next `up` sweeps.
            let _ = run_dir.remove();
        }
    }
}

/// A clone on its way up; dropped before it is a node, it ends.
pub(crate) struct Starting {
    owned: Option<Owned>,
    qmp: Option<UnixStream>,
    network: network::Seat,
}

impl Starting {
    pub(crate) fn start(
        golden: &Golden,
        options: &NodeOptions,
        name: &str,
        run_dir: RunDir,
    ) -> Result<Self, NodeError> {
        let mut unfinished = Unfinished(Some(run_dir));
        let Some(run_dir) = &unfinished.0 else {
            unreachable!("taken at the end of this function");
        };
        let (disk, product, log) = (
            run_dir.file("disk.qcow2"),
            run_dir.file("product.img"),
            run_dir.file(LOG),
        );
        fs::copy(golden.blank(), &disk).map_err(failed("create", &disk))?;
        if let Some(prefix) = &options.prefix {
            make_ext4(&product, PRODUCT_DISK_BYTES, prefix, &log).map_err(|source| {
                NodeError::Product {
                    prefix: prefix.clone(),
                    source,
                }
            })?;
        }
        let network = match &options.network {
            Some(network) => network::Seat::take(network)?,
            None => network::Seat::alone(),
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed("make a socket pair for", &log))?;
        let lock = run_dir
            .lock_handle()
            .map_err(failed("share the lock of", run_dir.path()))?;
        let console = run_dir.file(CONSOLE);
        let machine = Machine {
            name,
            mode: golden.mode,
            kernel: &golden.image.base.kernel,
            initrd: &golden.image.initrd,
            disks: &[&disk, &golden.disk(), &golden.image.root_disk],
            tools: &golden.image.tools_disk,
            product: options.prefix.as_ref().map(|_| product.as_path()),
            ram: &golden.ram(),
            restore: true,
            network: network.socket(),
            console: &console,
            qmp: theirs.as_raw_fd(),
        };
        let mut command = golden.image.base.qemu().system();
        machine.arguments(&mut command);
        let output = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(failed("open", &log))?;
        let errors = output.try_clone().map_err(failed("open", &log))?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let mut inherited = vec![theirs.into(), lock.into()];
        inherited.extend(
            network
                .lock_handle()
                .map_err(failed("share the lock of", run_dir.path()))?,
        );
        let child = launcher::spawn(command, inherited, options.lifetime)
            .map_err(failed("start QEMU, log in", &log))?;
        let owned = unfinished.0.take().map(|run_dir| Owned { child, run_dir });
        Ok(Self {
            owned,
            qmp: Some(ours),
            network,
        })
    }

    /// Restores the snapshot, gives the clone an identity and mounts what is its own.
    pub(crate) fn adopt(
        &mut self,
        golden: &Golden,
        options: &NodeOptions,
        name: String,
    ) -> Result<Record, NodeError> {
        let (Some(owned), Some(ours)) = (&self.owned, self.qmp.take()) else {
            unreachable!(
                "`owned` is taken by `into_node` alone, which consumes the clone; `qmp` here, once"
            );
        };
        let claim = claim::fresh(&name).map_err(failed("read", Path::new("/dev/urandom")))?;
        let pid = owned.child.id() as i32;
        let mut record = Record {
            pid,
            start_time: rundir::start_time(pid)
                .map_err(failed("look at QEMU in", owned.run_dir.path()))?,
            port: 0,
            token: claim.token,
            mode: golden.mode,
            network: self.network.described(),
            name,
        };
        // Already now, so that `down` finds a detached node whose `up` was killed.
        owned.run_dir.publish(&record)?;
        record.port = restore(ours, &golden.devices()).map_err(|source| NodeError::Qmp {
            name: record.name.clone(),
            log: fs::read_to_string(owned.run_dir.file(LOG))
                .map_or_else(|_| String::new(), |log| format!(": {log}")),
            source,
        })?;
        let patience = health::patience(golden.mode) * 2;
        let session_error = |source| NodeError::Session {
            name: record.name.clone(),
            source,
        };
        endpoint(&record)
            .claim(claim, patience)
            .map_err(session_error)?;
        if let Some(script) = arrival(options, &self.network) {
            arrive(&record, &script, patience)?;
        }
        owned.run_dir.publish(&record)?;
        Ok(record)
    }

    pub(crate) fn into_node(mut self, record: Record, lifetime: Lifetime) -> Node {
        let Some(owned) = self.owned.take() else {
            unreachable!("taken only here");
        };
        let directory = owned.run_dir.path().to_owned();
        let owned = match lifetime {
            Lifetime::Owner => Some(owned),
            Lifetime::Detached => None,
        };
        Node::watched(record, directory, owned)
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(mut owned) = self.owned.take() {
            let _ = owned.child.kill();
            let _ = owned.child.wait();
            // The cause of the failure is on its way to the caller already.
            let _ = owned.run_dir.remove();
        }
    }
}

/// Returns the port that is forwarded to the agent.
fn restore(stream: UnixStream, devices: &Path) -> Result<u16, QmpError> {
    let mut qmp = Qmp::open(stream, QMP_PATIENCE)?;
    golden::set_capabilities(&mut qmp)?;
    qmp.execute(
        "migrate-incoming",
        &json!({"uri": format!("file:{}", devices.display())}),
    )?;
    qmp.wait_for_migration()?;
    qmp.execute("cont", &json!({}))?;
    qmp.forwarded_port()
}

/// What the clone does first, if anything.
fn arrival(options: &NodeOptions, seat: &network::Seat) -> Option<String> {
    let mut steps = Vec::new();
    if options.prefix.is_some() {
        // The driver knows the empty disk of the snapshot.
        steps.push("blockdev --flushbufs /dev/vdc".to_owned());
        steps.push("mount -t ext4 /dev/vdc /opt/bulkhead".to_owned());
    }
    if let Some((address, mac)) = seat.address() {
        steps.push(format!("ip link set eth1 address {mac}"));
        steps.push(format!("ip address add {address}/24 dev eth1"));
        steps.push("ip link set eth1 up".to_owned());
    }
    (!steps.is_empty()).then(|| steps.join("\n"))
}

fn arrive(record: &Record, script: &str, patience: Duration) -> Result<(), NodeError> {
    let command = NodeCommand::script(script);
    let session_error = |source| NodeError::Session {
        name: record.name.clone(),
        source,
    };
    let stream = endpoint(record).open(patience).map_err(session_error)?;
    let mut process =
        Process::start(stream, command.exec(record.mode.time_factor())).map_err(session_error)?;
    drop(process.stdin.take());
    let mut errors = String::new();
    if let Some(mut stderr) = process.stderr.take() {
        stderr
            .read_to_string(&mut errors)
            .map_err(failed("read the output of", Path::new(script)))?;
    }
    let status = process.wait().map_err(session_error)?;
    if status.success() {
        return Ok(());
    }
    Err(NodeError::Failed {
        name: record.name.clone(),
        reason: format!("its first command: {status}"),
        console: errors,
    })
}
