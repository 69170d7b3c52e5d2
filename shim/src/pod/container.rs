//! One container of a pod, which is one task of containerd's.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use agent_protocol::api::{CpuStat, MemoryStat, Metrics, PidsStat, ProcessId};
use containerd_shim_protos::events::task::TaskExecAdded;
use protobuf::MessageField;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::warn;

use super::execs::Execs;
use super::host_side::HostSide;
use super::process::{
    CallError, DRAIN_TIMEOUT, EXIT_TIMEOUT, ExecRefusal, ExecRequest, Process, killed_exit,
    lost_exit,
};
use super::volumes::{PodVolumes, open_sources};
use super::{Error, Pod, blocking, chain, log_hooks};
use crate::events::{Event, Events, now_ns};
use crate::host;
use crate::host::deadline::Deadline;
use crate::host::mounts::{Mount, RootFs};
use crate::host::pod::ContainerRequest;
use crate::spec::{GuestSpec, HostView, Membership};
use crate::stdio::{Io, Opened, Plan};
use crate::task::{Exit, Lifecycle, WrongState};

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
    /// Its streams, as the client named them.
    pub io: Io,
    /// Where these streams go.
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
    init: Arc<Process>,
    execs: Execs,
    behind: Behind,
    /// Whether the pod is there for it alone.
    is_alone: bool,
    /// The pod's kernel parameters, if it stands for the pod.
    pod_sysctls: BTreeMap<String, String>,
    /// Held while `poststart` or `poststop` run, in this order.
    hooks: tokio::sync::Mutex<()>,
    /// Held while it is paused or resumed.
    pausing: tokio::sync::Mutex<()>,
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
        let (io, plan) = (request.io.clone(), request.plan.clone());
        let bundle = request.bundle.clone();
        let profile = host_view.apparmor_profile.clone();
        let pod_sysctls = host_view.pod_sysctls.clone();
        let follows_mounts = host_view.follows_mounts;
        let limits = host_view.limits;
        let created = async {
            let (pid, spec_json) =
                Self::create_on_host(pod, request, host_view, guest_spec).await?;
            let container = Self {
                init: Arc::new(Process::new(init_of(&id), pid, io)),
                execs: Execs::default(),
                behind,
                is_alone,
                pod_sysctls,
                hooks: tokio::sync::Mutex::default(),
                pausing: tokio::sync::Mutex::default(),
                failed_deletions: AtomicU32::new(0),
            };
            let agent = pod.agent().await?;
            if behind != Behind::Pause {
                pod.make_room(&id, limits).await;
                if follows_mounts {
                    pod.follow_mounts().await?;
                }
                let opened = Opened::open(&plan, &id, namespace).await?;
                let wanted = opened.wanted();
                pod.load_apparmor(agent, profile.as_deref()).await?;
                let created = agent.create_container(&id, &bundle, spec_json, wanted);
                pod.explain(created.await).await?;
                container.init.connect(pod, agent, opened).await?;
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
        // The pause container runs nowhere: it needs no volumes.
        let opened = match host_view.membership {
            Membership::Sandbox => BTreeMap::new(),
            Membership::Alone | Membership::Member { .. } => {
                open_sources(&host_view.bind_sources).await?
            }
        };
        let work = move |host: &mut dyn HostSide| {
            let id = request.id.clone();
            let rootfs = request.rootfs(&host_view.root);
            host.add_container(ContainerRequest {
                id: request.id,
                bundle: request.bundle,
                rootfs,
                hooks: host_view.hooks,
            })?;
            let spec_json = match host_view.membership {
                Membership::Sandbox => Vec::new(),
                Membership::Alone | Membership::Member { .. } => {
                    let opened = &opened;
                    guest_spec.into_json(&mut PodVolumes { host, opened })?
                }
            };
            let pid = host.start_stand_in(&init_of(&id))?;
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
        Self::undo(pod, self.id()).await;
    }

    /// Takes back what [`Container::create`] has done before it failed.
    async fn undo(pod: &Pod, id: &str) {
        if let Some(agent) = pod.agent_now()
            && let Err(error) = agent.delete(&init_of(id)).await
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
        pod.give_up_room(id);
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
        &self.init.id().container_id
    }

    /// Its init.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Its init's stand-in's pid.
    pub fn pid(&self) -> u32 {
        self.init.pid()
    }

    /// The process of an id; its init, when that is empty.
    pub fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        if exec_id.is_empty() {
            Some(Arc::clone(&self.init))
        } else {
            self.execs.find(exec_id)
        }
    }

    /// Its processes, init first, also those that have ended.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        let mut processes = vec![Arc::clone(&self.init)];
        processes.extend(self.execs.all());
        processes
    }

    /// Whether it stands for the pod itself.
    pub fn is_sandbox(&self) -> bool {
        self.behind == Behind::Pause
    }

    /// Waits in the guest for the program's end, and tells it.
    pub async fn watch(&self, pod: &Pod, events: &Events) {
        let Behind::Guest { own_pid_namespace } = self.behind else {
            return;
        };
        let Some(exit) = self.init.exit_in_guest(pod).await else {
            return;
        };
        if !own_pid_namespace && let Some(agent) = pod.agent_now() {
            // What init leaves behind would hold the streams open.
            let _ = agent.signal(self.init.id(), SIGKILL, true).await;
        }
        self.end(pod, events, exit).await;
    }

    /// Its program has ended. Only the first call counts.
    async fn end(&self, pod: &Pod, events: &Events, exit: Exit) {
        let execs_first = self.end_execs(pod, events, None);
        self.init.end_after(pod, events, exit, execs_first).await;
        pod.give_up_room(self.id());
    }

    /// Its pod's VM has ended under it.
    pub async fn lose(&self, pod: &Pod, events: &Events, reason: &str) {
        let execs_first = self.end_execs(pod, events, Some(reason));
        let exit = lost_exit(Some(reason.to_owned()));
        self.init.end_after(pod, events, exit, execs_first).await;
    }

    /// Sees to it that the end of every exec is told, and that none is added.
    /// They end with init: the guest says how, unless the pod was `lost`.
    async fn end_execs(&self, pod: &Pod, events: &Events, lost: Option<&str>) {
        let execs = self.execs.close();
        if let Some(reason) = lost {
            for exec in &execs {
                let exit = lost_exit(Some(reason.to_owned()));
                exec.end(pod, events, exit).await;
            }
        }
        let deadline = Instant::now() + EXIT_TIMEOUT;
        for exec in execs {
            // Also one whose start is being asked for: that is told first.
            if timeout_at(deadline, exec.wait()).await.is_err() {
                exec.end(pod, events, killed_exit()).await;
            }
        }
    }

    /// Creates a process in it, up to the point where its program waits to be
    /// started, and tells it.
    pub async fn exec(
        &self,
        pod: &Pod,
        events: &Events,
        request: ExecRequest,
        namespace: &str,
    ) -> Result<Arc<Process>, CallError> {
        self.check_is_guest()?;
        let id = self.id().to_owned();
        self.init.life().check_running()?;
        let exec_id = request.exec_id.clone();
        let Some(reservation) = self.execs.reserve(&exec_id) else {
            return Err(ExecRefusal::Exists { id, exec_id }.into());
        };
        let exec = Process::create_exec(pod, &id, request, namespace).await?;
        let exec = Arc::new(exec);
        let added = Event::ExecAdded(TaskExecAdded {
            container_id: id,
            exec_id,
            ..TaskExecAdded::default()
        });
        if !reservation.fulfil(&exec, || events.publish(&added)) {
            exec.discard(pod).await;
            return Err(WrongState::Ended.into());
        }
        Ok(exec)
    }

    /// Takes an exec down, and returns how it ended. The pod stays.
    pub async fn remove_exec(
        &self,
        exec: &Process,
        pod: &Pod,
        events: &Events,
    ) -> Result<Exit, Error> {
        let exit = exec.remove_exec(pod, events).await?;
        self.execs.remove(&exec.id().exec_id);
        Ok(exit)
    }

    /// Lets the program run.
    pub async fn start(&self, pod: &Pod, events: &Events) -> Result<(), CallError> {
        self.init.life().begin_start()?;
        let _hooks = self.hooks.lock().await;
        // Some clients set it up between Create and Start.
        if let Err(error) = pod.connect_network().await {
            self.init.announce(events, Lifecycle::start_failed);
            return Err(error.into());
        }
        match self.behind {
            Behind::Pause => {
                if let Err(error) = self.set_pod_sysctls(pod).await {
                    self.init.announce(events, Lifecycle::start_failed);
                    return Err(error.into());
                }
                pod.forward_ports().await;
                self.init.announce(events, Lifecycle::started);
            }
            Behind::Guest { .. } => self.init.execute(pod, events).await?,
        }
        self.run_poststart(pod).await.map_err(CallError::from)
    }

    async fn set_pod_sysctls(&self, pod: &Pod) -> Result<(), Error> {
        if self.pod_sysctls.is_empty() {
            return Ok(());
        }
        let agent = pod.agent().await?;
        pod.explain(agent.set_sysctls(&self.pod_sysctls).await)
            .await
    }

    async fn run_poststart(&self, pod: &Pod) -> Result<(), Error> {
        let id = self.id().to_owned();
        let hooks = pod.on_host(move |host| host.poststart_hooks(&id)).await?;
        if let Some(hooks) = hooks.transpose()? {
            let run = blocking(move || Ok(hooks.run_all(Deadline::NONE))).await?;
            log_hooks(run.map_err(host::pod::Error::from)?);
        }
        Ok(())
    }

    /// Sends a signal to its init, or to all its processes.
    pub async fn signal(
        &self,
        pod: &Pod,
        events: &Events,
        signal: u32,
        all: bool,
    ) -> Result<(), CallError> {
        match self.behind {
            Behind::Guest { .. } => self.init.signal(pod, signal, all).await,
            Behind::Pause => {
                self.init.check_signal()?;
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
                    oom_kills: 0,
                };
                self.end(pod, events, exit).await;
                Ok(())
            }
        }
    }

    /// Holds all its processes, and has what it wrote written to the host.
    pub async fn pause(&self, pod: &Pod, events: &Events) -> Result<(), CallError> {
        self.check_is_guest()?;
        let _one_at_a_time = self.pausing.lock().await;
        self.init.life().check_running()?;
        let agent = pod.agent().await?;
        pod.explain(agent.pause(self.id()).await).await?;
        self.init.announce(events, Lifecycle::paused);
        Ok(())
    }

    /// Lets its processes run again.
    pub async fn resume(&self, pod: &Pod, events: &Events) -> Result<(), CallError> {
        self.check_is_guest()?;
        let _one_at_a_time = self.pausing.lock().await;
        self.init.life().check_resume()?;
        let agent = pod.agent().await?;
        pod.explain(agent.resume(self.id()).await).await?;
        self.init.announce(events, Lifecycle::resumed);
        Ok(())
    }

    /// Changes its limits: `linux.resources` of the OCI runtime configuration.
    pub async fn update(&self, pod: &Pod, linux_resources_json: Vec<u8>) -> Result<(), CallError> {
        self.check_is_guest()?;
        let agent = pod.agent().await?;
        // What is wrong with it, the agent tells.
        let resources = serde_json::from_slice(&linux_resources_json).unwrap_or_default();
        let before = pod.change_room(self.id(), &resources).await;
        let updated = agent.update(self.id(), linux_resources_json).await;
        match updated {
            Ok(()) => pod.settled_room().await,
            Err(_) => pod.restore_room(self.id(), before),
        }
        Ok(pod.explain(updated).await?)
    }

    /// What it uses and is limited to, until it is deleted. Nothing of the
    /// guest's, for the pod's sandbox.
    pub async fn stats(&self, pod: &Pod) -> Result<Metrics, Error> {
        match self.behind {
            Behind::Guest { .. } => {
                let agent = pod.agent().await?;
                pod.explain(agent.stats(self.id()).await).await
            }
            // Clients read each of these parts without looking whether it is there.
            Behind::Pause => Ok(Metrics {
                pids: MessageField::some(PidsStat::default()),
                cpu: MessageField::some(CpuStat::default()),
                memory: MessageField::some(MemoryStat::default()),
                ..Metrics::default()
            }),
        }
    }

    fn check_is_guest(&self) -> Result<(), ExecRefusal> {
        match self.behind {
            Behind::Guest { .. } => Ok(()),
            Behind::Pause => Err(ExecRefusal::Sandbox {
                id: self.id().to_owned(),
            }),
        }
    }

    /// Sets the size of a process's terminal in characters.
    pub async fn resize(
        &self,
        process: &Process,
        pod: &Pod,
        width: u32,
        height: u32,
    ) -> Result<(), CallError> {
        self.check_is_guest()?;
        process.resize(pod, width, height).await
    }

    /// Takes it down, in the guest and then on the host, and returns how it
    /// ended. The caller has begun the deletion; an error leaves it to be tried
    /// again.
    pub async fn remove(&self, pod: &Pod, events: &Events) -> Result<Exit, Error> {
        if self.behind != Behind::Pause
            && let Some(agent) = pod.agent_now()
        {
            match pod.explain(agent.delete(self.init.id()).await).await {
                // Without a VM there is nothing left to delete in it.
                Ok(()) | Err(Error::Ended { .. }) => {}
                Err(error) => self.overrule(pod, error).await?,
            }
        }
        let told = timeout(self.exit_timeout(), self.init.wait()).await;
        let exit = if let Ok(exit) = told {
            exit
        } else {
            // Created and never started: it ends by being deleted.
            let exit = killed_exit();
            self.end(pod, events, exit.clone()).await;
            exit
        };
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        for process in self.processes() {
            let left = deadline.saturating_duration_since(Instant::now());
            process.drain(left).await;
        }
        // Not before `poststart` has run.
        let _hooks = self.hooks.lock().await;
        Self::remove_from_host(pod, self.id()).await?;
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
        let reason = format!(
            "it cannot delete container {}: {}",
            self.id(),
            chain(&error)
        );
        if self.is_alone {
            pod.stop(&reason).await;
            return Ok(());
        }
        // Its siblings need the VM. Its files can be taken from it all the same
        // when none of its processes is left.
        if let Some(agent) = pod.agent_now() {
            let _ = agent.signal(self.init.id(), SIGKILL, true).await;
        }
        let ended = timeout(EXIT_TIMEOUT, self.init.wait()).await;
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

fn init_of(container_id: &str) -> ProcessId {
    ProcessId {
        container_id: container_id.to_owned(),
        ..ProcessId::default()
    }
}
