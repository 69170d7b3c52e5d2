//! What the shim does for containerd: the tasks of one pod.
//!
//! [`Shim`] is the one implementation; [`rpc`] offers it as task service v2 and
//! v3.

mod error;
mod options;
pub mod rpc;
mod sandbox;
pub mod sandbox_rpc;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_protocol::api::Metrics;
use tokio::sync::Notify;
use tracing::{info, warn};

pub use error::Error;

use crate::events::Events;
use crate::host::directory::{self, PodPaths};
use crate::pod::container::{Container, Request};
use crate::pod::host_side::Maker;
use crate::pod::machine::End;
use crate::pod::process::{ExecRequest, Process};
use crate::pod::{Pod, chain};
use crate::spec::{self, GuestSpec, HostView, Membership, Peers};
use crate::task::{Exit, WrongState};
use sandbox::Sandboxed;

/// `_NSIG` of Linux: the last of the real-time signals.
const SIGNAL_MAX: u32 = 64;

/// A task as containerd knows it.
#[derive(Debug)]
pub struct Task {
    /// What runs, or ran.
    pub container: Container,
    /// Its bundle.
    pub bundle: PathBuf,
}

/// A task's name in use.
#[derive(Clone, Debug)]
enum Slot {
    /// Being created.
    Reserved {
        /// Whoever asked for it has given up since: nobody would ever delete
        /// what came of it.
        abandoned: bool,
    },
    Live(Arc<Task>),
}

/// The pod's VM, over the shim's life.
enum PodSlot {
    /// Not yet: the first container brings it up.
    Before(Maker),
    Running(Pod),
    /// Gone, and why.
    After(String),
}

/// The tasks of one pod.
pub struct Shim {
    paths: PodPaths,
    events: Events,
    tasks: Mutex<HashMap<String, Slot>>,
    /// If the sandbox service is used.
    sandbox: Mutex<Option<Sandboxed>>,
    /// Held while the pod comes up or goes down.
    pod: tokio::sync::Mutex<PodSlot>,
    /// Told when the pod has ended.
    over: Notify,
    /// Told when the shim has nothing left to do.
    done: Notify,
}

impl Shim {
    /// A shim for the pod of `paths`, whose host side `make` makes.
    pub fn new(paths: PodPaths, events: Events, make: Maker) -> Arc<Self> {
        Arc::new(Self {
            paths,
            events,
            tasks: Mutex::default(),
            sandbox: Mutex::default(),
            pod: tokio::sync::Mutex::new(PodSlot::Before(make)),
            over: Notify::new(),
            done: Notify::new(),
        })
    }

    /// Waits until containerd wants the shim to go, or does not say so within
    /// `linger` of the pod's end: its socket has gone with the pod, and a
    /// containerd that was restarted meanwhile will not find it.
    pub async fn done(&self, linger: Duration) {
        let left_alone = async {
            self.over.notified().await;
            tokio::time::sleep(linger).await;
        };
        tokio::select! {
            () = self.done.notified() => {}
            () = left_alone => info!("nobody asked the shim to shut down; leaving"),
        }
    }

    /// Whether there never was a pod: its directory is as `start` made it.
    pub async fn is_unused(&self) -> bool {
        matches!(&*self.pod.lock().await, PodSlot::Before(_))
    }

    /// Its events.
    pub fn events(&self) -> &Events {
        &self.events
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sandbox(&self) -> MutexGuard<'_, Option<Sandboxed>> {
        self.sandbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A task that has been created.
    pub fn task(&self, id: &str) -> Result<Arc<Task>, Error> {
        match self.tasks().get(id) {
            Some(Slot::Live(task)) => Ok(Arc::clone(task)),
            Some(Slot::Reserved { .. }) | None => Err(Error::NoTask { id: id.to_owned() }),
        }
    }

    /// A task and a process of it that has been created: its init, when
    /// `exec_id` is empty.
    pub fn process(&self, id: &str, exec_id: &str) -> Result<(Arc<Task>, Arc<Process>), Error> {
        let task = self.task(id)?;
        let unknown = || Error::NoProcess {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        let process = task.container.process(exec_id).ok_or_else(unknown)?;
        Ok((task, process))
    }

    fn live_tasks(&self) -> Vec<Arc<Task>> {
        let tasks = self.tasks();
        let live = tasks.values().filter_map(|slot| match slot {
            Slot::Live(task) => Some(Arc::clone(task)),
            Slot::Reserved { .. } => None,
        });
        live.collect()
    }

    /// The pod, while it runs.
    async fn running_pod(&self) -> Result<Pod, Error> {
        match &*self.pod.lock().await {
            PodSlot::Running(pod) => Ok(pod.clone()),
            PodSlot::Before(_) => Err(Error::NoPod {
                id: self.paths.id().to_owned(),
            }),
            PodSlot::After(reason) => Err(Error::PodOver {
                id: self.paths.id().to_owned(),
                reason: reason.clone(),
            }),
        }
    }

    /// Creates a task: the pod too, if this is its first. `created` is called
    /// with it before anybody can see it end.
    pub async fn create(
        self: &Arc<Self>,
        request: Request,
        created: impl FnOnce(&Task),
    ) -> Result<Arc<Task>, Error> {
        directory::check_id(&request.id).map_err(Error::Id)?;
        let reservation = Reservation::take(self, &request.id)?;
        let bundle = request.bundle.clone();
        let (pod, container) = match self.create_container(request).await {
            Ok(made) => made,
            Err(error) => {
                self.give_up(reservation, &error).await;
                return Err(error);
            }
        };
        let task = Arc::new(Task { container, bundle });
        if !reservation.fulfil(&task, created) {
            let error = Error::Abandoned {
                id: task.container.id().to_owned(),
            };
            task.container.discard(&pod).await;
            // With its logging program, which the pod's end would wait for.
            drop(task);
            self.give_up(reservation, &error).await;
            return Err(error);
        }
        self.watch(&task, &pod);
        Ok(task)
    }

    /// Ends a Create that has come to nothing.
    async fn give_up(&self, reservation: Reservation<'_>, error: &Error) {
        let abandoned = reservation.release();
        self.close_if_empty(&chain(error)).await;
        // Nobody waits for an answer to shut the shim down after it.
        if abandoned && self.tasks().is_empty() {
            self.done.notify_one();
        }
    }

    /// containerd deletes a task that it is still asking for: its client has
    /// gone, or lost patience.
    pub fn abandon(&self, id: &str) {
        if let Some(Slot::Reserved { abandoned }) = self.tasks().get_mut(id) {
            info!(id, "abandoned while it is being created");
            *abandoned = true;
        }
    }

    async fn create_container(
        self: &Arc<Self>,
        request: Request,
    ) -> Result<(Pod, Container), Error> {
        let mut spec = spec::read(&request.bundle).map_err(crate::pod::Error::from)?;
        if let Some(files) = self.pod_files()
            && request.id != self.paths.id()
        {
            files.mount_into(&mut spec);
        }
        let (host_view, guest_spec) = GuestSpec::split(spec, &request.id, &self.peers().await)
            .map_err(crate::pod::Error::from)?;
        let pod = self.pod_for(&request.id, &host_view).await?;
        let container =
            Container::create(&pod, request, host_view, guest_spec, self.paths.namespace()).await?;
        Ok((pod, container))
    }

    async fn peers(&self) -> Peers {
        let mut peers = Peers::default();
        if let PodSlot::Running(pod) = &*self.pod.lock().await {
            peers.id_maps = pod.id_maps().cloned();
        }
        for task in self.live_tasks() {
            let container = &task.container;
            if container.is_sandbox() {
                peers.sandbox = Some(container.pid());
            } else {
                let id = container.id().to_owned();
                peers.containers.insert(container.pid(), id);
            }
        }
        peers
    }

    /// The pod that a container is created in.
    async fn pod_for(self: &Arc<Self>, id: &str, host_view: &HostView) -> Result<Pod, Error> {
        let pod_id = host_view.membership.pod_id(id);
        if pod_id != self.paths.id() {
            return Err(Error::OtherPod {
                id: id.to_owned(),
                wanted: pod_id.to_owned(),
                pod: self.paths.id().to_owned(),
            });
        }
        let is_member = matches!(host_view.membership, Membership::Member { .. });
        let mut slot = self.pod.lock().await;
        let make = match &mut *slot {
            PodSlot::Running(pod) => return Ok(pod.clone()),
            PodSlot::After(reason) => {
                return Err(Error::PodOver {
                    id: self.paths.id().to_owned(),
                    reason: reason.clone(),
                });
            }
            PodSlot::Before(_) if is_member => {
                return Err(Error::NoPod {
                    id: self.paths.id().to_owned(),
                });
            }
            before @ PodSlot::Before(_) => {
                match std::mem::replace(before, PodSlot::After("it did not start".to_owned())) {
                    PodSlot::Before(make) => make,
                    PodSlot::Running(_) | PodSlot::After(_) => unreachable!("matched above"),
                }
            }
        };
        let pod = Pod::launch(&self.paths, make, host_view).await?;
        *slot = PodSlot::Running(pod.clone());
        tokio::spawn(Arc::clone(self).watch_machine(pod.clone()));
        Ok(pod)
    }

    fn watch(self: &Arc<Self>, task: &Arc<Task>, pod: &Pod) {
        let (shim, task, pod) = (Arc::clone(self), Arc::clone(task), pod.clone());
        tokio::spawn(async move {
            task.container.watch(&pod, &shim.events).await;
            // The VM may have ended before the task was there to be told.
            if let Some(End { reason }) = pod.machine().end() {
                task.container.lose(&pod, &shim.events, &reason).await;
            }
        });
    }

    /// Tells every task when the VM ends under it.
    async fn watch_machine(self: Arc<Self>, pod: Pod) {
        let End { reason } = pod.machine().ended().await;
        let tasks = self.live_tasks();
        if !tasks.is_empty() {
            warn!(reason, "the pod's VM has ended");
        }
        for task in tasks {
            task.container.lose(&pod, &self.events, &reason).await;
        }
    }

    /// Creates a further process in a task.
    pub async fn exec(self: &Arc<Self>, id: &str, request: ExecRequest) -> Result<(), Error> {
        directory::check_id(&request.exec_id).map_err(Error::Id)?;
        let task = self.task(id)?;
        let pod = self.running_pod().await?;
        let created = task
            .container
            .exec(&pod, &self.events, request, self.paths.namespace());
        let exec = created.await?;
        let shim = Arc::clone(self);
        tokio::spawn(async move { exec.watch_exec(&pod, &shim.events).await });
        Ok(())
    }

    /// Lets a process's program run.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let (task, process) = self.process(id, exec_id)?;
        let pod = self.running_pod().await?;
        if process.is_init() {
            task.container.start(&pod, &self.events).await?;
        } else {
            process.start_exec(&pod, &self.events).await?;
        }
        Ok(process.pid())
    }

    /// Signals a process; with `all`, every one of its task, if it is the init.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let (task, process) = self.process(id, exec_id)?;
        if signal > SIGNAL_MAX {
            return Err(Error::Argument {
                what: format!("signal {signal}"),
                reason: format!("there is none above {SIGNAL_MAX}"),
            });
        }
        // Before the pod is asked for, which may have gone with the process.
        match process.check_signal() {
            // None is left to get it, as was asked for.
            Err(WrongState::Finished) if all && process.is_init() => return Ok(()),
            checked => checked.map_err(Error::State)?,
        }
        let pod = self.running_pod().await?;
        if process.is_init() {
            let container = &task.container;
            container.signal(&pod, &self.events, signal, all).await?;
        } else {
            process.signal(&pod, signal, all).await?;
        }
        Ok(())
    }

    /// Holds a task.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let task = self.task(id)?;
        let pod = self.running_pod().await?;
        Ok(task.container.pause(&pod, &self.events).await?)
    }

    /// Lets a task run again.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let task = self.task(id)?;
        let pod = self.running_pod().await?;
        Ok(task.container.resume(&pod, &self.events).await?)
    }

    /// Changes a task's limits: `linux.resources` as JSON.
    pub async fn update(&self, id: &str, linux_resources_json: Vec<u8>) -> Result<(), Error> {
        let task = self.task(id)?;
        let pod = self.running_pod().await?;
        Ok(task.container.update(&pod, linux_resources_json).await?)
    }

    /// What a task uses and is limited to.
    pub async fn stats(&self, id: &str) -> Result<Metrics, Error> {
        let task = self.task(id)?;
        let pod = self.running_pod().await?;
        Ok(task.container.stats(&pod).await?)
    }

    /// Sets the size of a process's terminal in characters.
    pub async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        width: u32,
        height: u32,
    ) -> Result<(), Error> {
        let (task, process) = self.process(id, exec_id)?;
        let pod = self.running_pod().await?;
        Ok(task.container.resize(&process, &pod, width, height).await?)
    }

    /// Deletes an exec that does not run, and tells its pid and its end.
    pub async fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(u32, Exit), Error> {
        let (task, exec) = self.process(id, exec_id)?;
        exec.life().begin_delete().map_err(Error::State)?;
        let removed = async {
            let pod = self.running_pod().await?;
            let removed = task.container.remove_exec(&exec, &pod, &self.events);
            Ok::<_, Error>(removed.await?)
        };
        let exit = removed.await.inspect_err(|_| exec.life().delete_failed())?;
        Ok((exec.pid(), exit))
    }

    /// Deletes a task that does not run; with the pod's last task goes the pod.
    /// `deleted` is called when everything of it is gone.
    pub async fn delete(&self, id: &str, deleted: impl FnOnce(&Task, &Exit)) -> Result<(), Error> {
        let task = self.task(id)?;
        task.container
            .init()
            .life()
            .begin_delete()
            .map_err(Error::State)?;
        let removed = async {
            let pod = self.running_pod().await?;
            Ok(task.container.remove(&pod, &self.events).await?)
        };
        let exit = match removed.await {
            Ok(exit) => exit,
            Err(error) => {
                task.container.init().life().delete_failed();
                return Err(error);
            }
        };
        self.tasks().remove(id);
        self.close_if_empty("its last container was deleted").await;
        deleted(&task, &exit);
        Ok(())
    }

    /// Takes the pod down once it has no task, nor one in the making.
    async fn close_if_empty(&self, reason: &str) {
        let mut slot = self.pod.lock().await;
        if !self.tasks().is_empty() {
            return;
        }
        if let PodSlot::Running(pod) = &*slot {
            pod.close().await;
            *slot = PodSlot::After(reason.to_owned());
            self.over.notify_one();
        }
    }

    /// containerd has no more use for the shim: true if that ends it. Tasks
    /// that are still being created are abandoned with it, and the last of them
    /// ends it then.
    pub async fn shutdown(&self) -> bool {
        if !self.abandon_all() {
            return false;
        }
        self.close_if_empty("the shim was shut down").await;
        self.done.notify_one();
        true
    }

    /// Abandons what is being created, unless there is a task: whether there is
    /// neither.
    fn abandon_all(&self) -> bool {
        let mut tasks = self.tasks();
        if tasks.values().any(|slot| matches!(slot, Slot::Live(_))) {
            return false;
        }
        for slot in tasks.values_mut() {
            *slot = Slot::Reserved { abandoned: true };
        }
        tasks.is_empty()
    }

    /// Ends everything at once, for SIGTERM. Where there are tasks, what the pod
    /// has on the host is left to the `delete` that containerd runs when the
    /// shim has gone: it reports what is on record.
    pub async fn terminate(&self) {
        const REASON: &str = "the shim was terminated";
        info!("terminating with everything in the pod");
        if let Ok(pod) = self.running_pod().await {
            pod.stop(REASON).await;
            let tasks = self.live_tasks();
            for task in &tasks {
                task.container.lose(&pod, &self.events, REASON).await;
            }
            if tasks.is_empty() {
                pod.close().await;
            } else {
                pod.leave().await;
            }
        }
        self.done.notify_one();
    }
}

/// An id that nobody else can create while it is held.
struct Reservation<'a> {
    shim: &'a Shim,
    id: String,
}

impl<'a> Reservation<'a> {
    fn take(shim: &'a Shim, id: &str) -> Result<Self, Error> {
        use std::collections::hash_map::Entry;
        match shim.tasks().entry(id.to_owned()) {
            Entry::Occupied(_) => Err(Error::Exists { id: id.to_owned() }),
            Entry::Vacant(entry) => {
                entry.insert(Slot::Reserved { abandoned: false });
                Ok(Self {
                    shim,
                    id: id.to_owned(),
                })
            }
        }
    }

    /// Lets go of the id: whether it was abandoned, by whoever came before this.
    fn release(mut self) -> bool {
        // Taken, so that nobody else's is dropped with this.
        let id = std::mem::take(&mut self.id);
        let slot = self.shim.tasks().remove(&id);
        matches!(slot, Some(Slot::Reserved { abandoned: true }))
    }

    /// Puts the task into its place, after `created`; false if it was
    /// abandoned.
    fn fulfil(&self, task: &Arc<Task>, created: impl FnOnce(&Task)) -> bool {
        // One step: whoever asks for its deletion marks it before or finds it
        // after.
        let mut tasks = self.shim.tasks();
        let slot = tasks.get_mut(&self.id);
        let Some(slot @ Slot::Reserved { abandoned: false }) = slot else {
            return false;
        };
        created(task);
        *slot = Slot::Live(Arc::clone(task));
        true
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut tasks = self.shim.tasks();
        if matches!(tasks.get(&self.id), Some(Slot::Reserved { .. })) {
            tasks.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests;
