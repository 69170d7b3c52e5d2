//! One container of a pod, which is one task of containerd's.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_protocol::api::stream_header::Kind as StreamKind;
use containerd_shim_protos::events::task::{TaskExit, TaskStart};
use protobuf::MessageField;
use tokio::sync::{OnceCell, watch};
use tracing::{info, warn};

use super::host_side::HostSide;
use super::{EXPLAIN_TIMEOUT, Error, Pod, blocking, chain, log_hooks};
use crate::events::{Event, Events, now_ns, timestamp};
use crate::host;
use crate::host::deadline::Deadline;
use crate::host::mounts::{Access, Mount, RootFs};
use crate::host::pod::{ContainerRequest, ExitRecord};
use crate::spec::{GuestSpec, HostView, Membership, Volumes};
use crate::stdio::{Opened, Plan, Streams};
use crate::task::{Announcement, Exit, Lifecycle, WrongState};

/// How long the last output may wait for a slow reader at Delete.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a container that the agent has deleted may take to be reported
/// ended.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);
/// Exit status for what ended with its pod, as containerd's own for a lost shim.
const LOST_STATUS: u32 = 255;

const SIGINT: u32 = libc::SIGINT.unsigned_abs();
const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();
const SIGTERM: u32 = libc::SIGTERM.unsigned_abs();

/// A container as containerd asks for it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The mounts of its root file system; empty when it is mounted already.
    pub mounts: Vec<Mount>,
    /// Where its streams go.
    pub plan: Plan,
}

impl Request {
    fn rootfs(&self, root: &std::path::Path) -> RootFs {
        if self.mounts.is_empty() {
            // An absolute root.path replaces the bundle's.
            RootFs::Premounted(self.bundle.join(root))
        } else {
            RootFs::Mounts(self.mounts.clone())
        }
    }
}

/// What stands behind a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    /// A container in the guest.
    Guest {
        /// With its init every process of it ends.
        own_pid_namespace: bool,
    },
    /// Nothing but its stand-in: CRI's pause container, whose only purpose is
    /// to hold namespaces that the VM holds.
    Pause,
}

/// One container.
#[derive(Debug)]
pub struct Container {
    id: String,
    pid: u32,
    behind: Behind,
    /// Whether the pod is there for it alone.
    is_alone: bool,
    life: Mutex<Lifecycle>,
    exit: watch::Sender<Option<Exit>>,
    streams: OnceCell<Streams>,
    /// Held while `poststart` or `poststop` run, in this order.
    hooks: tokio::sync::Mutex<()>,
    /// Held while its end is written down: the first that is told counts.
    ending: tokio::sync::Mutex<()>,
    /// How often the guest has failed to delete it.
    failed_deletions: AtomicU32,
}

impl Container {
    /// Creates a container in `pod`, up to the point where its program waits to
    /// be started. After an error nothing of it is left.
    pub async fn create(
        pod: &Pod,
        request: Request,
        host_view: HostView,
        guest_spec: GuestSpec,
        namespace: &str,
    ) -> Result<Self, Error> {
        let behind = match host_view.membership {
            Membership::Sandbox => Behind::Pause,
            Membership::Alone | Membership::Member { .. } => Behind::Guest {
                own_pid_namespace: host_view.own_pid_namespace,
            },
        };
        let is_alone = host_view.membership == Membership::Alone;
        let id = request.id.clone();
        let plan = request.plan.clone();
        let created = async {
            let (pid, spec_json) =
                Self::create_on_host(pod, request, host_view, guest_spec).await?;
            let container = Self {
                id: id.clone(),
                pid,
                behind,
                is_alone,
                life: Mutex::new(Lifecycle::new()),
                exit: watch::Sender::new(None),
                streams: OnceCell::new(),
                hooks: tokio::sync::Mutex::default(),
                ending: tokio::sync::Mutex::default(),
                failed_deletions: AtomicU32::new(0),
            };
            let agent = pod.agent().await?;
            if behind != Behind::Pause {
                let opened = Opened::open(&plan, &id, namespace).await?;
                let wanted = opened.wanted();
                pod.explain(agent.create_container(&id, spec_json, wanted).await)
                    .await?;
                let connect = |kind: StreamKind| agent.open_stream(&container.id, kind);
                let connected = opened.connect(connect, &container.exit.subscribe()).await;
                // Set once, here, before anybody else has the container.
                let _ = container.streams.set(pod.explain(connected).await?);
            }
            Ok(container)
        }
        .await;
        if created.is_err() {
            Self::undo(pod, &id).await;
        }
        created
    }

    /// The host's part: root file system, volumes, stand-in, hooks.
    async fn create_on_host(
        pod: &Pod,
        request: Request,
        host_view: HostView,
        guest_spec: GuestSpec,
    ) -> Result<(u32, Vec<u8>), Error> {
        let work = move |host: &mut dyn HostSide| {
            let id = request.id.clone();
            let rootfs = request.rootfs(&host_view.root);
            host.add_container(ContainerRequest {
                id: request.id,
                bundle: request.bundle,
                rootfs,
                hooks: host_view.hooks,
            })?;
            // The pause container runs nowhere: it needs no volumes.
            let spec_json = match host_view.membership {
                Membership::Sandbox => Vec::new(),
                Membership::Alone | Membership::Member { .. } => {
                    guest_spec.into_json(&mut PodVolumes(host))?
                }
            };
            let pid = host.start_stand_in(&id)?;
            let hooks = host.create_runtime_hooks(&id)?;
            Ok((pid, spec_json, hooks))
        };
        let (pid, spec_json, hooks) = pod.on_host(work).await?.unwrap_or_else(|| {
            Err(Error::Ended {
                reason: "it was taken down".to_owned(),
            })
        })?;
        blocking(move || Ok(hooks.run_until_failure()))
            .await?
            .map_err(host::pod::Error::from)?;
        Ok((pid, spec_json))
    }

    /// Takes back all of it, unstarted and unseen: nobody wants it any more.
    pub async fn discard(&self, pod: &Pod) {
        Self::undo(pod, &self.id).await;
    }

    /// Takes back what [`Container::create`] has done before it failed.
    async fn undo(pod: &Pod, id: &str) {
        if let Some(agent) = pod.agent_now()
            && let Err(error) = agent.delete(id).await
        {
            warn!(id, "a container that failed stays in the guest: {error}");
        }
        if let Err(error) = Self::remove_from_host(pod, id).await {
            warn!(
                id,
                "a container that failed stays on the host: {}",
                chain(&error)
            );
        }
    }

    /// The host's part, when the guest has let go of it. Its hooks hold up
    /// nobody else in the pod.
    async fn remove_from_host(pod: &Pod, id: &str) -> Result<(), Error> {
        let own_id = id.to_owned();
        let dismantled = pod.on_host(move |host| host.dismantle_container(&own_id));
        let Some(poststop) = dismantled.await?.transpose()?.flatten() else {
            return Ok(());
        };
        let run = blocking(move || Ok(poststop.run_all(Deadline::NONE))).await?;
        log_hooks(run.map_err(host::pod::Error::from)?);
        let own_id = id.to_owned();
        let forgotten = pod.on_host(move |host| host.forget_container(&own_id));
        Ok(forgotten.await?.transpose().map(drop)?)
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its stand-in's pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it stands for the pod itself.
    pub fn is_sandbox(&self) -> bool {
        self.behind == Behind::Pause
    }

    /// Where it stands.
    pub fn life(&self) -> MutexGuard<'_, Lifecycle> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it has ended.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        // The sender lives in `self`: this cannot fail.
        let exit = exit
            .wait_for(Option::is_some)
            .await
            .map(|exit| exit.clone());
        exit.ok().flatten().unwrap_or_else(|| lost_exit(None))
    }

    /// Makes a transition and publishes what it announces, as one step.
    fn announce(
        &self,
        events: &Events,
        transition: impl FnOnce(&mut Lifecycle) -> Vec<Announcement>,
    ) {
        let mut life = self.life();
        for announcement in transition(&mut life) {
            match announcement {
                Announcement::Started => events.publish(&Event::Start(TaskStart {
                    container_id: self.id.clone(),
                    pid: self.pid,
                    ..TaskStart::default()
                })),
                Announcement::Exited(exit) => {
                    info!(
                        id = self.id,
                        status = exit.status,
                        "the container has ended"
                    );
                    events.publish(&Event::Exit(TaskExit {
                        container_id: self.id.clone(),
                        id: self.id.clone(),
                        pid: self.pid,
                        exit_status: exit.status,
                        exited_at: MessageField::some(timestamp(exit.at_ns)),
                        ..TaskExit::default()
                    }));
                    self.exit.send_replace(Some(exit));
                }
            }
        }
    }

    /// Waits in the guest for the program's end. A connection that breaks is
    /// the pod's end, which is told to every container by its watcher.
    pub async fn watch(&self, pod: &Pod, events: &Events) {
        let Behind::Guest { own_pid_namespace } = self.behind else {
            return;
        };
        let Some(agent) = pod.agent_now() else {
            return;
        };
        match agent.wait(&self.id).await {
            Ok(exit) => {
                if !own_pid_namespace {
                    // What init leaves behind would hold the streams open.
                    let _ = agent.signal(&self.id, SIGKILL, true).await;
                }
                self.end(pod, events, exit).await;
            }
            Err(error) if error.code().is_some() => {
                warn!(id = self.id, "{error}");
                self.end(pod, events, lost_exit(Some(chain(&error)))).await;
            }
            Err(error) => {
                // A VM that ends takes its connections with it, and tells why
                // only then.
                let ended = tokio::time::timeout(EXPLAIN_TIMEOUT, pod.machine().ended());
                if ended.await.is_err() {
                    pod.machine()
                        .stop(format!("the guest's agent is gone: {}", chain(&error)));
                }
            }
        }
    }

    /// Its program has ended, or its pod with it. Only the first call counts.
    pub async fn end(&self, pod: &Pod, events: &Events, exit: Exit) {
        let _one_at_a_time = self.ending.lock().await;
        // Or the end of the pod would overwrite on record how it ended.
        if self.life().has_ended() {
            return;
        }
        let record = ExitRecord {
            status: exit.status,
            exited_at_ns: exit.at_ns,
        };
        let id = self.id.clone();
        let on_host = pod.on_host(move |host| {
            host.end_stand_in(&id)?;
            host.record_exit(&id, record)
        });
        match on_host.await {
            Ok(None | Some(Ok(()))) => {}
            Ok(Some(Err(error))) => warn!(id = self.id, "{}", chain(&error)),
            Err(error) => warn!(id = self.id, "{}", chain(&error)),
        }
        self.announce(events, |life| life.exited(exit));
    }

    /// Its pod's VM has ended under it.
    pub async fn lose(&self, pod: &Pod, events: &Events, reason: &str) {
        self.end(pod, events, lost_exit(Some(reason.to_owned())))
            .await;
    }

    /// Lets the program run.
    pub async fn start(&self, pod: &Pod, events: &Events) -> Result<(), CallError> {
        self.life().begin_start()?;
        let _hooks = self.hooks.lock().await;
        let started = match self.behind {
            Behind::Pause => Ok(()),
            Behind::Guest { .. } => match pod.agent().await {
                Ok(agent) => pod.explain(agent.start(&self.id).await).await,
                Err(error) => Err(error),
            },
        };
        if let Err(error) = started {
            self.announce(events, Lifecycle::start_failed);
            return Err(error.into());
        }
        self.announce(events, Lifecycle::started);
        if let Some(Err(error)) = self.streams.get().map(Streams::start_input) {
            warn!(id = self.id, "{}", chain(&error));
        }
        self.run_poststart(pod).await.map_err(CallError::from)
    }

    async fn run_poststart(&self, pod: &Pod) -> Result<(), Error> {
        let id = self.id.clone();
        let hooks = pod.on_host(move |host| host.poststart_hooks(&id)).await?;
        if let Some(hooks) = hooks.transpose()? {
            let run = blocking(move || Ok(hooks.run_all(Deadline::NONE))).await?;
            log_hooks(run.map_err(host::pod::Error::from)?);
        }
        Ok(())
    }

    /// Sends a signal.
    pub async fn signal(
        &self,
        pod: &Pod,
        events: &Events,
        signal: u32,
        all: bool,
    ) -> Result<(), CallError> {
        self.life().check_signal()?;
        match self.behind {
            Behind::Guest { .. } => {
                let agent = pod.agent().await?;
                pod.explain(agent.signal(&self.id, signal, all).await)
                    .await?;
            }
            Behind::Pause => {
                // As pause does it: it leaves on SIGTERM and SIGINT, and as an
                // init it is deaf to what it has no handler for.
                let status = match signal {
                    SIGKILL => 128 + SIGKILL,
                    SIGTERM | SIGINT => 0,
                    _ => return Ok(()),
                };
                let exit = Exit {
                    status,
                    at_ns: now_ns(),
                    last_words: None,
                };
                self.end(pod, events, exit).await;
            }
        }
        Ok(())
    }

    /// Ends standard input.
    pub fn close_stdin(&self) {
        if let Some(streams) = self.streams.get() {
            streams.close_stdin();
        }
    }

    /// Takes it down, in the guest and then on the host, and returns how it
    /// ended. The caller has begun the deletion; an error leaves it to be tried
    /// again.
    pub async fn remove(&self, pod: &Pod, events: &Events) -> Result<Exit, Error> {
        if self.behind != Behind::Pause
            && let Some(agent) = pod.agent_now()
        {
            match pod.explain(agent.delete(&self.id).await).await {
                // Without a VM there is nothing left to delete in it.
                Ok(()) | Err(Error::Ended { .. }) => {}
                Err(error) => self.overrule(pod, error).await?,
            }
        }
        let told = tokio::time::timeout(self.exit_timeout(), self.wait()).await;
        let exit = if let Ok(exit) = told {
            exit
        } else {
            // Created and never started: it ends by being deleted.
            let exit = Exit {
                status: 128 + SIGKILL,
                at_ns: now_ns(),
                last_words: None,
            };
            self.end(pod, events, exit.clone()).await;
            exit
        };
        if let Some(streams) = self.streams.get() {
            streams.drain(DRAIN_TIMEOUT).await;
        }
        // Not before `poststart` has run.
        let _hooks = self.hooks.lock().await;
        Self::remove_from_host(pod, &self.id).await?;
        Ok(exit)
    }

    /// Goes on without a guest that cannot delete this container, once it has
    /// failed twice: the host must not keep it for ever.
    ///
    /// # Errors
    /// `error`, the guest's, when that is not to be done.
    async fn overrule(&self, pod: &Pod, error: Error) -> Result<(), Error> {
        if self.failed_deletions.fetch_add(1, Ordering::Relaxed) == 0 {
            return Err(error);
        }
        let reason = format!("it cannot delete container {}: {}", self.id, chain(&error));
        if self.is_alone {
            pod.stop(&reason).await;
            return Ok(());
        }
        // Its siblings need the VM. Its files can be taken from it all the same
        // when none of its processes is left.
        if let Some(agent) = pod.agent_now() {
            let _ = agent.signal(&self.id, SIGKILL, true).await;
        }
        let ended = tokio::time::timeout(EXIT_TIMEOUT, self.wait()).await;
        ended.map_err(|_| error)?;
        warn!("removing a container that stays in the guest: {reason}");
        Ok(())
    }

    /// Who reports the end of this container, if anybody does.
    fn exit_timeout(&self) -> Duration {
        match self.behind {
            Behind::Guest { .. } => EXIT_TIMEOUT,
            Behind::Pause => Duration::ZERO,
        }
    }
}

fn lost_exit(last_words: Option<String>) -> Exit {
    Exit {
        status: LOST_STATUS,
        at_ns: now_ns(),
        last_words,
    }
}

/// Why a call on a container failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It is not the time for it.
    #[error(transparent)]
    State(#[from] WrongState),
    /// It did not work.
    #[error(transparent)]
    Pod(#[from] Error),
}

struct PodVolumes<'a>(&'a mut dyn HostSide);

impl Volumes for PodVolumes<'_> {
    type Error = host::pod::Error;

    fn add(&mut self, source: &std::path::Path, access: Access) -> Result<PathBuf, Self::Error> {
        self.0.add_volume(source, access)
    }
}
