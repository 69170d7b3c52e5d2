//! A pod: one VM, the containers in it, and what both need of the host.

pub mod agent;
pub mod apparmor;
mod clock;
pub mod container;
mod execs;
mod forward;
pub mod host_side;
pub mod limits;
pub mod machine;
mod mounts;
mod network;
mod printable;
pub mod process;
mod room;
pub mod size;
mod supervise;
mod volumes;
pub mod vsock;

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_protocol::SHARE_TAG;
use agent_protocol::api::{CreatePodRequest, UserNamespace};
use thiserror::Error;
use tokio::sync::OnceCell;
use tracing::{info, warn};

use crate::host;
use crate::host::cgroup::CgroupPath;
use crate::host::directory::{MAX_REMOTE_SHARES, PodPaths};
use crate::host::id_maps::IdMaps;
use crate::host::netns::Network;
use crate::host::source::Source;
use crate::host::vm::remote_share_tag;
use crate::spec::{self, HostView, Membership};
use crate::stdio;
use agent::Agent;
use host_side::{HostSide, Maker, StartError};
use machine::{End, Machine};
use network::Network as GuestNetwork;
use room::Room;
use size::Size;
use vsock::Vsock;

/// How long a guest may take to boot. On hardware it is a fraction of a second;
/// the bound is for a host without any, and many pods at once.
const BOOT_TIMEOUT: Duration = Duration::from_mins(3);
/// How long an orderly power-off may take before the VM is stopped.
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a VM that was stopped may take to be gone.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a broken connection waits to be explained by the VM's end.
const EXPLAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a pod, or a container in it, cannot be had.
#[derive(Debug, Error)]
pub enum Error {
    /// The host's part.
    #[error(transparent)]
    Host(#[from] host::pod::Error),
    /// The VM's processes.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The container's configuration.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// A file or directory that it binds.
    #[error(transparent)]
    Volume(#[from] spec::IntoJsonError<host::pod::Error>),
    /// Its standard streams.
    #[error(transparent)]
    Stdio(#[from] stdio::Error),
    /// The guest's socket.
    #[error(transparent)]
    Vsock(#[from] vsock::Error),
    /// Its AppArmor profile.
    #[error(transparent)]
    AppArmor(#[from] host::apparmor::Error),
    /// The agent in the guest.
    #[error(transparent)]
    Agent(#[from] agent::Error),
    /// The VM has ended.
    #[error("the pod's VM has ended: {reason}")]
    Ended {
        /// Why.
        reason: String,
    },
    /// The guest does not come up.
    #[error("the guest did not answer within {BOOT_TIMEOUT:?} of its start")]
    BootTimeout,
    /// The size of the pod's `/dev/shm`.
    #[error("read the size of {path}")]
    Shm {
        /// The tmpfs on the host.
        path: std::path::PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// An interface of its network.
    #[error("connect the pod's network interface {interface} to its VM: {reason}")]
    Network {
        /// Its name.
        interface: String,
        /// Why not.
        reason: String,
    },
    /// Its size.
    #[error(transparent)]
    Size(#[from] size::TooLittle),
    /// Changes of its network.
    #[error("listen for changes of the pod's network")]
    WatchNetwork {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Changes of the host's mounts.
    #[error("listen for changes of the host's mounts")]
    WatchMounts(#[source] io::Error),
    /// Its loopback on the host.
    #[error("listen on the pod's loopback")]
    Forward(#[source] io::Error),
    /// A part of this program panicked.
    #[error("internal error: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

/// What a pod is, apart from its containers.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    id: String,
    hostname: String,
    shm_size_bytes: u64,
    id_maps: Option<IdMaps>,
}

/// A running pod. Clones are the same pod.
#[derive(Clone)]
pub struct Pod {
    identity: Arc<Identity>,
    remote_shares: usize,
    /// `None` once it is destroyed.
    host: Arc<Mutex<Option<Box<dyn HostSide>>>>,
    machine: Machine,
    room: Arc<Room>,
    vsock: Vsock,
    agent: Arc<OnceCell<Agent>>,
    network: Arc<tokio::sync::Mutex<GuestNetwork>>,
    apparmor: Arc<tokio::sync::Mutex<apparmor::Loaded>>,
    /// What is mounted below its volumes is followed.
    mounts: Arc<OnceCell<()>>,
}

impl Pod {
    /// Starts the pod's VM and makes its network, for its first container. The
    /// guest boots on after this returns: [`Pod::agent`] waits for it. After an
    /// error nothing is left.
    pub async fn launch(paths: &PodPaths, make: Maker, first: &HostView) -> Result<Self, Error> {
        let is_sandbox = first.membership == Membership::Sandbox;
        let cgroup = CgroupPath::for_pod(
            first.cgroups_path.as_deref(),
            is_sandbox,
            paths.namespace(),
            paths.id(),
        )
        .map_err(host::pod::Error::from)?;
        let network = match &first.network_path {
            Some(path) => Network::Existing(path.clone()),
            None => Network::New,
        };
        let identity = Identity {
            id: paths.id().to_owned(),
            hostname: first.hostname.clone(),
            shm_size_bytes: shm_size(first)?,
            id_maps: first.id_maps.clone(),
        };
        let vsock_path = paths.vsock_socket();
        let remote_shares = remote_shares(first).await?;
        let (limits, membership) = (first.pod_limits, first.membership.clone());
        let started = blocking(move || {
            let mut host = make(cgroup)?;
            let sized = Size::of(
                limits,
                &membership,
                size::Host::this(),
                host.memory_granted(),
            );
            let started = sized.map_err(Error::from).and_then(|size| {
                let host = host.as_mut();
                let started = start(host, &vsock_path, &network, size, remote_shares);
                started.map(|(machine, vsock)| (machine, vsock, size))
            });
            match started {
                Ok((machine, vsock, size)) => Ok((host, machine, vsock, size)),
                Err(error) => {
                    destroyed(host.destroy());
                    Err(error)
                }
            }
        });
        let (host, machine, vsock, size) = started.await?;
        Ok(Self {
            identity: Arc::new(identity),
            remote_shares,
            host: Arc::new(Mutex::new(Some(host))),
            machine,
            room: Arc::new(Room::new(size)),
            vsock,
            agent: Arc::default(),
            network: Arc::default(),
            apparmor: Arc::default(),
            mounts: Arc::default(),
        })
    }

    /// Of its user namespace.
    pub fn id_maps(&self) -> Option<&IdMaps> {
        self.identity.id_maps.as_ref()
    }

    /// The pod's VM.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The agent, once the guest is up and the pod is prepared in it.
    pub async fn agent(&self) -> Result<&Agent, Error> {
        self.agent.get_or_try_init(|| self.greet()).await
    }

    /// The agent, if there is one to talk to.
    pub fn agent_now(&self) -> Option<&Agent> {
        self.agent.get().filter(|_| self.machine.end().is_none())
    }

    async fn greet(&self) -> Result<Agent, Error> {
        match tokio::time::timeout(BOOT_TIMEOUT, self.machine.ready()).await {
            Ok(Ok(())) => {}
            Ok(Err(End { reason })) => return Err(Error::Ended { reason }),
            Err(_) => return Err(Error::BootTimeout),
        }
        let request = CreatePodRequest {
            pod_id: self.identity.id.clone(),
            hostname: self.identity.hostname.clone(),
            share_tag: SHARE_TAG.to_owned(),
            shm_size_bytes: self.identity.shm_size_bytes,
            remote_share_tags: (0..self.remote_shares).map(remote_share_tag).collect(),
            user_namespace: self.identity.id_maps.as_ref().map(user_namespace).into(),
            ..CreatePodRequest::default()
        };
        let prepared = async {
            let agent = Agent::connect(self.vsock.clone()).await?;
            agent.create_pod(&request).await?;
            Ok(agent)
        };
        let agent = self.explain(prepared.await).await?;
        // Its first container sees the right time already. Not worth a pod: it
        // was set once with the greeting.
        if let Err(error) = clock::correct(&agent).await {
            warn!("the guest's clock cannot be set yet: {error}");
        }
        tokio::spawn(clock::keep(agent.clone()));
        tokio::spawn(room::keep(self.clone(), agent.clone()));
        Ok(agent)
    }

    /// Tells a broken connection's cause: when the VM has ended, that counts,
    /// not that its agent no longer answers.
    pub async fn explain<T>(&self, answer: Result<T, agent::Error>) -> Result<T, Error> {
        let error = match answer {
            Ok(answer) => return Ok(answer),
            Err(error) if error.code().is_some() => return Err(error.into()),
            Err(error) => error,
        };
        match tokio::time::timeout(EXPLAIN_TIMEOUT, self.machine.ended()).await {
            Ok(End { reason }) => Err(Error::Ended { reason }),
            Err(_) => Err(error.into()),
        }
    }

    /// Does something on the host that blocks. `None` once the pod is
    /// destroyed.
    pub async fn on_host<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut dyn HostSide) -> T + Send + 'static,
    ) -> Result<Option<T>, Error> {
        let host = Arc::clone(&self.host);
        blocking(move || {
            let mut host = host.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(host.as_mut().map(|host| work(host.as_mut())))
        })
        .await
    }

    /// Ends the pod: the guest syncs and powers off, then everything of it goes
    /// from the host. Nothing is left but what the log names.
    pub async fn close(&self) {
        self.power_off().await;
        let host = Arc::clone(&self.host);
        let done = blocking(move || {
            let host = host.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(host) = host {
                destroyed(host.destroy());
            }
            Ok(())
        })
        .await;
        if let Err(error) = done {
            warn!("the pod was not taken down: {error}");
        }
        info!(pod = self.identity.id, "the pod has ended");
    }

    /// Lets go of a pod whose VM has ended, and leaves what it has on the host to
    /// `delete`, which finds on record how each container has ended.
    pub async fn leave(&self) {
        let host = Arc::clone(&self.host);
        let left = blocking(move || {
            let host = host.lock().unwrap_or_else(PoisonError::into_inner).take();
            Ok(host.map_or(Ok(()), HostSide::leave)?)
        });
        if let Err(error) = left.await {
            warn!("the pod was not left: {}", chain(&error));
        }
    }

    async fn power_off(&self) {
        if let Some(agent) = self.agent_now() {
            let asked = tokio::time::timeout(POWER_OFF_TIMEOUT, async {
                // The answer may lose the race against the power-off.
                if let Err(error) = agent.shutdown(POWER_OFF_TIMEOUT).await
                    && error.code().is_some()
                {
                    warn!("the guest does not shut down: {error}");
                    return;
                }
                self.machine.ended().await;
            });
            if asked.await.is_err() {
                warn!("the guest did not power off within {POWER_OFF_TIMEOUT:?}; stopping the VM");
            }
        }
        self.machine.stop("the pod ended");
        self.await_end().await;
    }

    /// Ends the VM at once, for a reason that is worth a warning. What the pod
    /// has on the host stays until [`Pod::close`].
    pub async fn stop(&self, reason: &str) {
        warn!(pod = self.identity.id, "stopping the VM: {reason}");
        self.machine.stop(reason);
        self.await_end().await;
    }

    async fn await_end(&self) {
        if tokio::time::timeout(STOP_TIMEOUT, self.machine.ended())
            .await
            .is_err()
        {
            warn!("the VM did not stop within {STOP_TIMEOUT:?}; its cgroup will be killed");
        }
    }
}

fn start(
    host: &mut dyn HostSide,
    vsock_path: &std::path::Path,
    network: &Network,
    size: Size,
    remote_shares: usize,
) -> Result<(Machine, Vsock), Error> {
    let (vsock, listener) = Vsock::listen(vsock_path)?;
    let machine = host.start_vm(listener.into(), size, remote_shares)?;
    // The guest boots meanwhile.
    host.set_network(network)?;
    Ok((machine, vsock))
}

fn destroyed(result: Result<Vec<host::hooks::Error>, host::pod::Error>) {
    match result {
        Ok(failures) => log_hooks(failures),
        Err(error) => warn!(
            "not everything of the pod could be removed: {}",
            chain(&error)
        ),
    }
}

/// Logs how hooks failed that stop nothing.
pub fn log_hooks(failures: Vec<host::hooks::Error>) {
    for failure in failures {
        warn!("{}", chain(&failure));
    }
}

/// An error and its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        // A transparent error repeats its source.
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}

/// How many shares the pod has for network and user-space file systems: as many
/// as a lone container has of them. For those that other containers of a pod may
/// bring, of which nobody knows yet, there is one.
async fn remote_shares(first: &HostView) -> Result<usize, Error> {
    if first.membership == Membership::Sandbox {
        return Ok(1);
    }
    let sources = volumes::open_sources(&first.bind_sources).await?;
    let remote = sources.values().flat_map(Source::remote_file_systems);
    let distinct = remote.collect::<BTreeSet<_>>().len();
    Ok(distinct.min(MAX_REMOTE_SHARES))
}

/// As the guest is told of it.
fn user_namespace(maps: &IdMaps) -> UserNamespace {
    UserNamespace {
        uid_map: maps.uid_map(),
        gid_map: maps.gid_map(),
        ..UserNamespace::default()
    }
}

/// The size of the tmpfs that CRI made for the pod; 0, the guest's default,
/// without one.
fn shm_size(first: &HostView) -> Result<u64, Error> {
    let Some(path) = &first.shm_source else {
        return Ok(0);
    };
    rustix::fs::statvfs(path)
        .map(|size| size.f_blocks.saturating_mul(size.f_frsize))
        .map_err(|errno| Error::Shm {
            path: path.clone(),
            source: errno.into(),
        })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await?
}
