//! One process of a container, as a client sees it: its init, or an exec.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_protocol::api::ProcessId;
use agent_protocol::api::stream_header::Kind as StreamKind;
use containerd_shim_protos::events::task::{
    TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use protobuf::MessageField;
use serde_json::Value;
use tokio::sync::{OnceCell, watch};
use tracing::{info, warn};

use super::agent::Agent;
use super::apparmor;
use super::{EXPLAIN_TIMEOUT, Error, Pod, chain};
use crate::events::{Event, Events, now_ns, timestamp};
use crate::host::pod::ExitRecord;
use crate::stdio::{Io, Opened, Plan, Streams};
use crate::task::{Announcement, Exit, Lifecycle, WrongState};

/// How long the last output may wait for a slow reader at Delete.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a process that the agent has deleted may take to be reported ended.
pub const EXIT_TIMEOUT: Duration = Duration::from_secs(5);
/// Exit status for what ended with its pod, as containerd's own for a lost shim.
const LOST_STATUS: u32 = 255;
/// Exit status for what was killed, or was deleted before it was started.
const KILLED_STATUS: u32 = 128 + libc::SIGKILL.unsigned_abs();

/// An exec as containerd asks for it.
#[derive(Clone, Debug)]
pub struct ExecRequest {
    /// Its id, unique in its container.
    pub exec_id: String,
    /// `process` of the OCI runtime configuration.
    pub process: Value,
    /// Its streams, as the client named them.
    pub io: Io,
    /// Where these streams go.
    pub plan: Plan,
}

/// Why a call on a container or one of its processes failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It is not the time for it.
    #[error(transparent)]
    State(#[from] WrongState),
    /// It did not work.
    #[error(transparent)]
    Pod(#[from] Error),
    /// No such process can be.
    #[error(transparent)]
    Exec(#[from] ExecRefusal),
}

/// Why a container does not get a further process, or has none.
#[derive(Debug, thiserror::Error)]
pub enum ExecRefusal {
    /// Nothing runs in it.
    #[error(
        "container {id} is the pod's sandbox, which runs no program: use one of the pod's other containers"
    )]
    Sandbox {
        /// The container.
        id: String,
    },
    /// The id is in use.
    #[error("container {id} has a process {exec_id} already")]
    Exists {
        /// The container.
        id: String,
        /// As asked for.
        exec_id: String,
    },
}

/// One process.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pid: u32,
    io: Io,
    life: Mutex<Lifecycle>,
    exit: watch::Sender<Option<Exit>>,
    streams: OnceCell<Streams>,
    /// Held while its end is written down: the first that is told counts.
    ending: tokio::sync::Mutex<()>,
}

impl Process {
    /// A process with a stand-in of `pid`, not yet started. Its streams come
    /// with [`Process::connect`].
    pub fn new(id: ProcessId, pid: u32, io: Io) -> Self {
        Self {
            id,
            pid,
            io,
            life: Mutex::new(Lifecycle::new()),
            exit: watch::Sender::new(None),
            streams: OnceCell::new(),
            ending: tokio::sync::Mutex::default(),
        }
    }

    /// Creates an exec in `pod`'s container `container_id`, up to the point
    /// where its program waits to be started. After an error nothing of it is
    /// left.
    pub async fn create_exec(
        pod: &Pod,
        container_id: &str,
        request: ExecRequest,
        namespace: &str,
    ) -> Result<Self, Error> {
        let id = ProcessId {
            container_id: container_id.to_owned(),
            exec_id: request.exec_id,
            ..ProcessId::default()
        };
        let created = async {
            let agent = pod.agent().await?;
            // A logging program is told the exec's id, as by containerd's own shim.
            let opened = Opened::open(&request.plan, &id.exec_id, namespace).await?;
            let stand_for = id.clone();
            let started = pod.on_host(move |host| host.start_stand_in(&stand_for));
            let pid = started.await?.ok_or_else(|| Error::Ended {
                reason: "it was taken down".to_owned(),
            })??;
            let process = Self::new(id.clone(), pid, request.io);
            // Without one it gets the container's.
            let profile = apparmor::profile_of(&request.process);
            pod.load_apparmor(agent, profile.as_deref()).await?;
            let process_json = request.process.to_string().into_bytes();
            let asked = agent.exec(&id, process_json, opened.wanted());
            pod.explain(asked.await).await?;
            process.connect(pod, agent, opened).await?;
            Ok(process)
        }
        .await;
        if created.is_err() {
            Self::undo(pod, &id).await;
        }
        created
    }

    /// Takes back an exec that nobody has seen.
    pub async fn discard(&self, pod: &Pod) {
        Self::undo(pod, &self.id).await;
    }

    /// Takes back what [`Process::create_exec`] has done before it failed.
    async fn undo(pod: &Pod, id: &ProcessId) {
        if let Some(agent) = pod.agent_now()
            && let Err(error) = agent.delete(id).await
        {
            let (id, exec_id) = (&id.container_id, &id.exec_id);
            warn!(
                id,
                exec_id, "an exec that failed stays in the guest: {error}"
            );
        }
        Self::end_stand_in(pod, id).await;
    }

    async fn end_stand_in(pod: &Pod, id: &ProcessId) {
        let stands_for = id.clone();
        let ended = pod.on_host(move |host| host.end_stand_in(&stands_for));
        let error = match ended.await {
            Ok(None | Some(Ok(()))) => return,
            Ok(Some(Err(error))) => chain(&error),
            Err(error) => chain(&error),
        };
        warn!(id = id.container_id, exec_id = id.exec_id, "{error}");
    }

    /// Connects its streams. Once, before anybody else has it.
    pub async fn connect(&self, pod: &Pod, agent: &Agent, opened: Opened) -> Result<(), Error> {
        let connect = |kind: StreamKind| agent.open_stream(&self.id, kind);
        let connected = opened.connect(connect, &self.exit.subscribe()).await;
        let _ = self.streams.set(pod.explain(connected).await?);
        Ok(())
    }

    /// What the agent knows it by.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Whether it is its container's init.
    pub fn is_init(&self) -> bool {
        self.id.exec_id.is_empty()
    }

    /// Its stand-in's pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its streams, as the client named them.
    pub fn io(&self) -> &Io {
        &self.io
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
    pub fn announce(
        &self,
        events: &Events,
        transition: impl FnOnce(&mut Lifecycle) -> Vec<Announcement>,
    ) {
        let mut life = self.life();
        for announcement in transition(&mut life) {
            match announcement {
                Announcement::Started => events.publish(&self.started_event()),
                Announcement::Paused => events.publish(&Event::Paused(TaskPaused {
                    container_id: self.id.container_id.clone(),
                    ..TaskPaused::default()
                })),
                Announcement::Resumed => events.publish(&Event::Resumed(TaskResumed {
                    container_id: self.id.container_id.clone(),
                    ..TaskResumed::default()
                })),
                Announcement::Exited(exit) => {
                    info!(
                        id = self.id.container_id,
                        exec_id = self.id.exec_id,
                        status = exit.status,
                        "the process has ended"
                    );
                    // Of an exec they may be others' deaths: init's end tells.
                    if self.is_init() && exit.oom_kills > 0 {
                        events.publish(&Event::Oom(TaskOOM {
                            container_id: self.id.container_id.clone(),
                            ..TaskOOM::default()
                        }));
                    }
                    events.publish(&self.exit_event(&exit));
                    self.exit.send_replace(Some(exit));
                }
            }
        }
    }

    fn started_event(&self) -> Event {
        let container_id = self.id.container_id.clone();
        if self.is_init() {
            return Event::Start(TaskStart {
                container_id,
                pid: self.pid,
                ..TaskStart::default()
            });
        }
        Event::ExecStarted(TaskExecStarted {
            container_id,
            exec_id: self.id.exec_id.clone(),
            pid: self.pid,
            ..TaskExecStarted::default()
        })
    }

    fn exit_event(&self, exit: &Exit) -> Event {
        Event::Exit(TaskExit {
            container_id: self.id.container_id.clone(),
            id: self.name().to_owned(),
            pid: self.pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..TaskExit::default()
        })
    }

    /// What containerd calls it: by its container's id when it is the init.
    pub fn name(&self) -> &str {
        if self.is_init() {
            &self.id.container_id
        } else {
            &self.id.exec_id
        }
    }

    /// Waits in the guest for its end. `None` for a connection that breaks:
    /// that is the pod's end, which is told to every process by its watcher.
    pub async fn exit_in_guest(&self, pod: &Pod) -> Option<Exit> {
        match pod.agent_now()?.wait(&self.id).await {
            Ok(exit) => Some(exit),
            Err(error) if error.code().is_some() => {
                warn!(
                    id = self.id.container_id,
                    exec_id = self.id.exec_id,
                    "{error}"
                );
                Some(lost_exit(Some(chain(&error))))
            }
            Err(error) => {
                // A VM that ends takes its connections with it, and tells why
                // only then.
                let ended = tokio::time::timeout(EXPLAIN_TIMEOUT, pod.machine().ended());
                if ended.await.is_err() {
                    pod.machine()
                        .stop(format!("the guest's agent is gone: {}", chain(&error)));
                }
                None
            }
        }
    }

    /// Waits in the guest for an exec's end, and tells it.
    pub async fn watch_exec(&self, pod: &Pod, events: &Events) {
        if let Some(exit) = self.exit_in_guest(pod).await {
            self.end(pod, events, exit).await;
        }
    }

    /// It has ended, or its container or pod with it. Only the first call
    /// counts. `before` is what has to be over before that is told.
    pub async fn end_after(
        &self,
        pod: &Pod,
        events: &Events,
        exit: Exit,
        before: impl Future<Output = ()>,
    ) {
        let _one_at_a_time = self.ending.lock().await;
        // Or the end of the pod would overwrite on record how it ended.
        if self.life().has_ended() {
            return;
        }
        before.await;
        Self::end_stand_in(pod, &self.id).await;
        if self.is_init() {
            self.record(pod, &exit).await;
        }
        self.announce(events, |life| life.exited(exit));
    }

    /// [`Process::end_after`], for a process that others do not end with.
    pub async fn end(&self, pod: &Pod, events: &Events, exit: Exit) {
        self.end_after(pod, events, exit, async {}).await;
    }

    async fn record(&self, pod: &Pod, exit: &Exit) {
        let record = ExitRecord {
            status: exit.status,
            exited_at_ns: exit.at_ns,
        };
        let id = self.id.container_id.clone();
        let recorded = pod.on_host(move |host| host.record_exit(&id, record));
        match recorded.await {
            Ok(None | Some(Ok(()))) => {}
            Ok(Some(Err(error))) => warn!(id = self.id.container_id, "{}", chain(&error)),
            Err(error) => warn!(id = self.id.container_id, "{}", chain(&error)),
        }
    }

    /// Lets an exec's program run. One that cannot be executed has ended.
    pub async fn start_exec(&self, pod: &Pod, events: &Events) -> Result<(), CallError> {
        self.life().begin_start()?;
        if let Err(error) = self.execute(pod, events).await {
            if let Some(agent) = pod.agent_now()
                && let Err(error) = agent.delete(&self.id).await
            {
                let (id, exec_id) = (&self.id.container_id, &self.id.exec_id);
                warn!(
                    id,
                    exec_id, "an exec that failed stays in the guest: {error}"
                );
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// Executes the program of a process whose start has begun. An exec that
    /// cannot be started has ended.
    pub async fn execute(&self, pod: &Pod, events: &Events) -> Result<(), Error> {
        let started = match pod.agent().await {
            Ok(agent) => pod.explain(agent.start(&self.id).await).await,
            Err(error) => Err(error),
        };
        if let Err(error) = started {
            if !self.is_init() {
                // Told with the next transition: it is never seen as created
                // again.
                self.end(pod, events, lost_exit(None)).await;
            }
            self.announce(events, Lifecycle::start_failed);
            return Err(error);
        }
        self.announce(events, Lifecycle::started);
        if let Some(Err(error)) = self.streams.get().map(Streams::start_input) {
            warn!(
                id = self.id.container_id,
                exec_id = self.id.exec_id,
                "{}",
                chain(&error)
            );
        }
        Ok(())
    }

    /// Whether it could get a signal.
    pub fn check_signal(&self) -> Result<(), WrongState> {
        if self.is_init() {
            self.life().check_signal()
        } else {
            self.life().check_exec_signal()
        }
    }

    /// Sends it a signal; to `all` of its container, if it is the init.
    pub async fn signal(&self, pod: &Pod, signal: u32, all: bool) -> Result<(), CallError> {
        self.check_signal()?;
        // As kill(2): whether it could get a signal, and no more.
        if signal == 0 {
            return Ok(());
        }
        let agent = pod.agent().await?;
        let all = all && self.is_init();
        Ok(pod
            .explain(agent.signal(&self.id, signal, all).await)
            .await?)
    }

    /// Sets the size of its terminal in characters.
    pub async fn resize(&self, pod: &Pod, width: u32, height: u32) -> Result<(), CallError> {
        let agent = pod.agent().await?;
        let resized = agent.resize_terminal(&self.id, width, height);
        Ok(pod.explain(resized.await).await?)
    }

    /// Ends standard input.
    pub fn close_stdin(&self) {
        if let Some(streams) = self.streams.get() {
            streams.close_stdin();
        }
    }

    /// Waits, at most `bound`, for the client to read the last output.
    pub async fn drain(&self, bound: Duration) {
        if let Some(streams) = self.streams.get() {
            streams.drain(bound).await;
        }
    }

    /// Takes an exec down, and returns how it ended. The caller has begun the
    /// deletion; an error leaves it to be tried again.
    pub async fn remove_exec(&self, pod: &Pod, events: &Events) -> Result<Exit, Error> {
        if let Some(agent) = pod.agent_now() {
            match pod.explain(agent.delete(&self.id).await).await {
                // Without a VM there is nothing left to delete in it.
                Ok(()) | Err(Error::Ended { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if tokio::time::timeout(EXIT_TIMEOUT, self.wait())
            .await
            .is_err()
        {
            self.end(pod, events, killed_exit()).await;
        }
        let exit = self.wait().await;
        self.drain(DRAIN_TIMEOUT).await;
        Ok(exit)
    }
}

/// The end of what ended with its pod, or otherwise without anybody's word.
pub fn lost_exit(last_words: Option<String>) -> Exit {
    Exit {
        status: LOST_STATUS,
        at_ns: now_ns(),
        last_words,
        oom_kills: 0,
    }
}

/// The end of what was killed without anybody's word.
pub fn killed_exit() -> Exit {
    Exit {
        status: KILLED_STATUS,
        at_ns: now_ns(),
        last_words: None,
        oom_kills: 0,
    }
}
