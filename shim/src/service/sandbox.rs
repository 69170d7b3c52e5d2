//! The pod as a sandbox of its own (`sandboxer = "shim"`), in front of the container
//! that stands for it: that is made from the pod's CRI configuration instead of a
//! bundle, and lives as it does for containerd's own sandboxer.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use agent_protocol::api::Metrics;
use tracing::{info, warn};

use super::{Error, Shim};
use crate::events::now_ns;
use crate::pod::chain;
use crate::pod::container::Request;
use crate::pod::process::Process;
use crate::spec::cri::PodSandboxConfig;
use crate::spec::{PodFiles, sandbox_spec};
use crate::stdio::Io;
use crate::task::{Exit, WrongState};

const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// A pod as containerd asks for it.
#[derive(Clone, Debug)]
pub struct SandboxRequest {
    /// Its id.
    pub id: String,
    /// Its bundle, which has no configuration.
    pub bundle: PathBuf,
    /// What CRI was asked for.
    pub config: PodSandboxConfig,
    /// Its network namespace.
    pub network_path: String,
}

/// A pod that was asked for by the sandbox service.
pub(super) struct Sandboxed {
    files: PodFiles,
    created_at_ns: i64,
    /// The pod's container, once there is one.
    process: Option<Arc<Process>>,
}

/// How a pod is.
#[derive(Clone, Debug)]
pub struct SandboxStatus {
    /// A process of it on the host.
    pub pid: u32,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// How it ended, once it has.
    pub exit: Option<Exit>,
}

impl Shim {
    /// Makes the pod: its VM, up to where containers can be created in it.
    pub async fn create_sandbox(self: &Arc<Self>, request: SandboxRequest) -> Result<(), Error> {
        let SandboxRequest {
            id,
            bundle,
            config,
            network_path,
        } = request;
        if id != self.paths.id() {
            return Err(self.no_sandbox(&id));
        }
        let files = PodFiles::in_bundle(&bundle, &id);
        self.reserve_sandbox(&files)?;
        let spec = sandbox_spec(&id, &config, &network_path);
        let written = tokio::task::spawn_blocking({
            let bundle = bundle.clone();
            move || {
                files.write(&config)?;
                fs::create_dir_all(bundle.join("rootfs"))?;
                fs::write(bundle.join("config.json"), spec.to_string())
            }
        });
        let created = async {
            let prepared = written.await?;
            prepared.map_err(|source| Error::Bundle {
                path: bundle.clone(),
                source,
            })?;
            let io = Io::default();
            let container = Request {
                id: id.clone(),
                bundle: bundle.clone(),
                mounts: Vec::new(),
                plan: io.plan()?,
                io,
            };
            self.create(container, |_| ()).await
        };
        match created.await {
            Ok(task) => {
                if let Some(sandbox) = &mut *self.sandbox() {
                    sandbox.process = Some(Arc::clone(task.container.init()));
                }
                Ok(())
            }
            Err(error) => {
                *self.sandbox() = None;
                Err(error)
            }
        }
    }

    fn reserve_sandbox(&self, files: &PodFiles) -> Result<(), Error> {
        let mut sandbox = self.sandbox();
        if sandbox.is_some() {
            return Err(Error::Exists {
                id: self.paths.id().to_owned(),
            });
        }
        *sandbox = Some(Sandboxed {
            files: files.clone(),
            created_at_ns: now_ns(),
            process: None,
        });
        Ok(())
    }

    /// What its containers get of the pod, if it was asked for by the sandbox service.
    pub(super) fn pod_files(&self) -> Option<PodFiles> {
        let sandbox = self.sandbox();
        sandbox.as_ref().map(|sandbox| sandbox.files.clone())
    }

    fn no_sandbox(&self, id: &str) -> Error {
        Error::NoSandbox {
            id: id.to_owned(),
            pod: self.paths.id().to_owned(),
        }
    }

    /// The process that stands for the pod, and when it was made.
    fn sandbox_process(&self, id: &str) -> Result<(Arc<Process>, i64), Error> {
        let sandbox = self.sandbox();
        let known = sandbox.as_ref().filter(|_| id == self.paths.id());
        let process = known.and_then(|sandbox| {
            let process = sandbox.process.clone()?;
            Some((process, sandbox.created_at_ns))
        });
        process.ok_or_else(|| self.no_sandbox(id))
    }

    /// Starts the pod.
    pub async fn start_sandbox(&self, id: &str) -> Result<SandboxStatus, Error> {
        let (_, created_at_ns) = self.sandbox_process(id)?;
        let pid = self.start(id, "").await?;
        Ok(SandboxStatus {
            pid,
            created_at_ns,
            exit: None,
        })
    }

    /// Ends the pod, with what still runs in it. Idempotent.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), Error> {
        let (process, _) = self.sandbox_process(id)?;
        for task in self.live_tasks() {
            let task_id = task.container.id();
            match self.kill(task_id, "", SIGKILL, true).await {
                Ok(()) | Err(Error::State(WrongState::Finished) | Error::NoTask { .. }) => {}
                Err(error) => info!(task_id, "not killed with its pod: {}", chain(&error)),
            }
        }
        process.wait().await;
        // With it goes the VM, unless there are containers that nobody has deleted yet.
        match self.delete(id, |_, _| ()).await {
            Ok(()) | Err(Error::NoTask { .. } | Error::State(WrongState::Deleting)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Waits for the pod's end.
    pub async fn wait_sandbox(&self, id: &str) -> Result<Exit, Error> {
        let (process, _) = self.sandbox_process(id)?;
        Ok(process.wait().await)
    }

    /// How the pod is.
    pub fn sandbox_status(&self, id: &str) -> Result<SandboxStatus, Error> {
        let (process, created_at_ns) = self.sandbox_process(id)?;
        let exit = process.life().exit().cloned();
        Ok(SandboxStatus {
            pid: process.pid(),
            created_at_ns,
            exit,
        })
    }

    /// What the pod's containers use together.
    pub async fn sandbox_metrics(&self, id: &str) -> Result<Metrics, Error> {
        self.sandbox_process(id)?;
        let mut sum = Metrics::default();
        for task in self.live_tasks() {
            match self.stats(task.container.id()).await {
                Ok(metrics) => add(&mut sum, &metrics),
                // It has gone meanwhile.
                Err(Error::NoTask { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sum)
    }

    /// Ends whatever is left of the pod, and the shim.
    pub async fn shutdown_sandbox(&self, id: &str) -> Result<(), Error> {
        if id != self.paths.id() {
            return Err(self.no_sandbox(id));
        }
        if self.sandbox_process(id).is_ok()
            && let Err(error) = self.stop_sandbox(id).await
        {
            // It ends in any case.
            warn!(
                "the pod is not stopped in an orderly way: {}",
                chain(&error)
            );
        }
        if !self.shutdown().await {
            // Containers that nobody has deleted: what is left of them is on record.
            self.terminate().await;
        }
        Ok(())
    }
}

/// Adds up what containers use; what limits each of them limits nothing together.
fn add(sum: &mut Metrics, more: &Metrics) {
    let pids = sum.pids.mut_or_insert_default();
    pids.current += more.pids.current;
    let cpu = sum.cpu.mut_or_insert_default();
    cpu.usage_usec += more.cpu.usage_usec;
    cpu.user_usec += more.cpu.user_usec;
    cpu.system_usec += more.cpu.system_usec;
    cpu.nr_periods += more.cpu.nr_periods;
    cpu.nr_throttled += more.cpu.nr_throttled;
    cpu.throttled_usec += more.cpu.throttled_usec;
    let memory = sum.memory.mut_or_insert_default();
    memory.anon += more.memory.anon;
    memory.file += more.memory.file;
    memory.inactive_file += more.memory.inactive_file;
    memory.active_file += more.memory.active_file;
    memory.shmem += more.memory.shmem;
    memory.pgfault += more.memory.pgfault;
    memory.pgmajfault += more.memory.pgmajfault;
    memory.usage += more.memory.usage;
    memory.usage_limit = memory.usage_limit.saturating_add(more.memory.usage_limit);
}
