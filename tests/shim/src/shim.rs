//! A running shim, with one container.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::CreateTaskRequest;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::bundle::{Bundle, Program};
use crate::client::{Answer, Client, Target};
use crate::events::Sink;
use crate::start::{Address, Containerd, Invocation};
use crate::streams::Streams;

/// How long a call may take on hardware.
const PATIENCE: Duration = Duration::from_secs(30);

/// `SIGKILL`, as a request carries it.
pub const SIGKILL: u32 = 9;

/// What all scenarios of a run share.
pub struct Settings {
    /// The shim's binary.
    pub shim: PathBuf,
    /// The root file system of every container, with busybox in it.
    pub rootfs: PathBuf,
    /// A directory of our own, on a file system that overlayfs can write to.
    pub scratch: PathBuf,
    /// Whether the full counts are to be run.
    pub soak: bool,
    /// How much slower than hardware this machine is.
    pub time_factor: u32,
    /// containerd's ear.
    pub sink: Sink,
}

impl Settings {
    /// How long one step may take here.
    pub fn patience(&self) -> Duration {
        PATIENCE * self.time_factor
    }

    /// containerd's socket, if there were one.
    pub fn address(&self) -> PathBuf {
        self.scratch.join("containerd.sock")
    }
}

/// A shim that serves a container.
pub struct Shim<'a> {
    settings: &'a Settings,
    bundle: Bundle,
    containerd: Containerd,
    address: Address,
    client: Client,
    process: Arc<OwnedFd>,
}

impl<'a> Shim<'a> {
    /// Starts a shim as `containerd` does, for a container that runs `program`,
    /// and connects to it.
    ///
    /// # Errors
    /// When it does not start, or does not answer.
    pub async fn start(
        settings: &'a Settings,
        id: &str,
        containerd: Containerd,
        program: &Program,
    ) -> Result<Self> {
        let bundle = Bundle::create(&settings.scratch, id, &settings.rootfs, program)?;
        keep_log(&bundle)?;
        let invocation = Self::invocation(settings, &bundle, containerd, &settings.address())
            .start()
            .await;
        let address = invocation.context("start the shim")?;
        let client = Client::connect(&address.address, address.version, settings.patience()).await;
        let client = client.with_context(|| format!("connect to {}", address.address))?;
        let pid = client.connect_task(id).await?.shim_pid;
        let process = Pid::from_raw(pid.cast_signed()).context("the shim has pid 0")?;
        let process = pidfd_open(process, PidfdFlags::empty())
            .with_context(|| format!("watch the shim, pid {pid}"))?;
        Ok(Self {
            settings,
            bundle,
            containerd,
            address,
            client,
            process: Arc::new(process),
        })
    }

    fn invocation<'b>(
        settings: &'b Settings,
        bundle: &'b Bundle,
        containerd: Containerd,
        address: &'b std::path::Path,
    ) -> Invocation<'b> {
        Invocation {
            shim: &settings.shim,
            id: bundle.id(),
            bundle: bundle.path(),
            address,
            containerd,
            patience: settings.patience(),
        }
    }

    /// What all scenarios share.
    pub fn settings(&self) -> &Settings {
        self.settings
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        self.bundle.id()
    }

    /// The container's init.
    pub fn init(&self) -> Target<'_> {
        Target::init(self.id())
    }

    /// One of the container's execs.
    pub fn exec<'b>(&'b self, exec: &'b str) -> Target<'b> {
        Target {
            id: self.id(),
            exec,
        }
    }

    /// The container's bundle.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// The connection.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Where it is reached.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What a Create of this container says.
    pub fn create_request(&self, streams: &Streams) -> CreateTaskRequest {
        CreateTaskRequest {
            id: self.id().to_owned(),
            bundle: self.bundle.path().display().to_string(),
            rootfs: vec![self.bundle.rootfs()],
            terminal: streams.terminal,
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            ..CreateTaskRequest::default()
        }
    }

    /// Creates the container and returns its pid.
    ///
    /// # Errors
    /// The shim's.
    pub async fn create(&self, streams: &Streams) -> Answer<u32> {
        let created = self.client.create(&self.create_request(streams)).await?;
        Ok(created.pid)
    }

    /// Kills the container, waits, and deletes it.
    ///
    /// # Errors
    /// The first call that fails.
    pub async fn kill_and_delete(&self) -> Result<u32> {
        self.client.kill(self.init(), SIGKILL, false).await?;
        self.client.wait(self.init()).await?;
        Ok(self.client.delete(self.init()).await?.exit_status)
    }

    /// Runs `start` once more, as containerd may.
    ///
    /// # Errors
    /// When it fails.
    pub async fn start_again(&self) -> Result<Address> {
        let address = self.settings.address();
        Self::invocation(self.settings, &self.bundle, self.containerd, &address)
            .start()
            .await
    }

    /// Ends the shim as containerd does once its container is deleted: nothing
    /// may be left.
    ///
    /// # Errors
    /// What is left.
    pub async fn finish(self) -> Result<()> {
        match self.client.shutdown(self.id()).await {
            // Some are gone before they have answered.
            Err(refusal) if refusal.code != "TRANSPORT" => return Err(refusal.into()),
            _ => {}
        }
        let (process, patience) = (Arc::clone(&self.process), self.settings.patience());
        let ended = tokio::task::spawn_blocking(move || ends_within(&process, patience)).await??;
        ensure!(ended, "the shim does not go after Shutdown");
        let address = self.settings.address();
        Self::invocation(self.settings, &self.bundle, self.containerd, &address)
            .delete()
            .await?;
        let socket = self.address.address.trim_start_matches("unix://");
        ensure!(
            !std::fs::exists(socket)?,
            "the shim's socket {socket} is left"
        );
        self.bundle.remove()
    }

    /// Ends a shim that something was wrong with, and what it runs, as
    /// containerd does when it has lost one. Best effort: the scenario has its
    /// failure to tell.
    pub async fn abandon(self) {
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        let address = self.settings.address();
        let cleanup = Self::invocation(self.settings, &self.bundle, self.containerd, &address)
            .delete()
            .await;
        if let Err(error) = cleanup {
            eprintln!("{}: {error:#}", self.id());
        }
    }
}

fn ends_within(process: &OwnedFd, patience: Duration) -> Result<bool> {
    let timeout = Timespec::try_from(patience)?;
    let ended = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout))?;
    Ok(ended > 0)
}

/// Reads the shim's log, which it may wait for, into a file beside the bundle.
fn keep_log(bundle: &Bundle) -> Result<()> {
    let mut log = pipe::OpenOptions::new()
        .read_write(true)
        .open_receiver(bundle.log())
        .context("open the shim's log")?;
    let file = bundle.place().with_extension("log");
    tokio::spawn(async move {
        let mut bytes = Vec::new();
        while log
            .read_buf(&mut bytes)
            .await
            .is_ok_and(|length| length > 0)
        {
            let _ = tokio::fs::write(&file, &bytes).await;
        }
    });
    Ok(())
}

/// Runs `work` with a shim for a container that runs `program`. The shim is
/// ended afterwards, and must leave nothing if all went well.
///
/// # Errors
/// The work's own, or what the shim left.
pub async fn with_shim<T>(
    settings: &Settings,
    id: &str,
    program: &Program,
    work: impl AsyncFnOnce(&Shim<'_>) -> Result<T>,
) -> Result<T> {
    with_shim_of(settings, id, Containerd::V2_3, program, work).await
}

/// [`with_shim`], started as another containerd does.
///
/// # Errors
/// The work's own, or what the shim left.
pub async fn with_shim_of<T>(
    settings: &Settings,
    id: &str,
    containerd: Containerd,
    program: &Program,
    work: impl AsyncFnOnce(&Shim<'_>) -> Result<T>,
) -> Result<T> {
    let shim = Shim::start(settings, id, containerd, program).await?;
    match work(&shim).await {
        Ok(done) => {
            shim.finish().await?;
            Ok(done)
        }
        Err(error) => {
            shim.abandon().await;
            Err(error)
        }
    }
}
