//! The task service, as containerd calls it: v2 and v3 are the same messages
//! under two names.
//!
//! Calls that change something run in a task of their own: the library drops a
//! call's future when its client hangs up or its time is over, and half a
//! Create would be nobody's.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskIO};
use containerd_shim_protos::shim_async::{Task as TaskService, create_task};
use protobuf::well_known_types::any::Any;
use protobuf::{EnumOrUnknown, MessageField};
use tracing::{debug, warn};
use ttrpc::r#async::{Service, TtrpcContext};

use super::{Error, Io, Shim, Task};
use crate::events::{Event, timestamp};
use crate::host::mounts::Mount;
use crate::pod::chain;
use crate::pod::container::Request;
use crate::stdio::Plan;
use crate::task::{Exit, State};

/// The names under which the one service is offered.
const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// The task service under both of its names.
pub fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let mut services = create_task(Arc::new(Rpc(Arc::clone(shim))));
    let mut older = create_task(Arc::new(Rpc(Arc::clone(shim))));
    if let Some(service) = older.remove(TASK_V3) {
        services.insert(TASK_V2.to_owned(), service);
    }
    services
}

struct Rpc(Arc<Shim>);

impl Rpc {
    /// Runs a call to its end, whoever still listens.
    async fn run<T, F>(
        &self,
        call: &'static str,
        id: &str,
        work: impl FnOnce(Arc<Shim>) -> F,
    ) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        debug!(id, call, "called");
        let result = tokio::spawn(work(Arc::clone(&self.0))).await;
        let result = result.map_err(Error::from).flatten();
        result.map_err(|error| {
            warn!(id, call, "{}", chain(&error));
            error.into()
        })
    }

    /// A task's init: there is no other process yet.
    fn init(&self, id: &str, exec_id: &str) -> Result<Arc<Task>, Error> {
        let task = self.0.task(id)?;
        no_exec(id, exec_id)?;
        Ok(task)
    }
}

fn no_exec(id: &str, exec_id: &str) -> Result<(), Error> {
    if exec_id.is_empty() {
        Ok(())
    } else {
        Err(Error::NoProcess {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        })
    }
}

fn unsupported<T>(call: &'static str) -> ttrpc::Result<T> {
    Err(Error::Unsupported { call }.into())
}

/// Refuses what the request asks for beyond this release, by name.
fn check_create(request: &CreateTaskRequest) -> Result<(), Error> {
    for (what, value) in [
        ("checkpoint", &request.checkpoint),
        ("parent_checkpoint", &request.parent_checkpoint),
    ] {
        if !value.is_empty() {
            return Err(Error::Argument {
                what: what.to_owned(),
                reason: "restoring a checkpoint is not supported yet".to_owned(),
            });
        }
    }
    match request.options.as_ref() {
        Some(Any {
            type_url, value, ..
        }) if !value.is_empty() => Err(Error::Argument {
            what: format!("options of type {type_url}"),
            reason: "this runtime has no options yet: leave them out".to_owned(),
        }),
        _ => Ok(()),
    }
}

fn create_event(request: &CreateTaskRequest, pid: u32) -> Event {
    Event::Create(TaskCreate {
        container_id: request.id.clone(),
        bundle: request.bundle.clone(),
        rootfs: request.rootfs.clone(),
        io: MessageField::some(TaskIO {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..TaskIO::default()
        }),
        pid,
        ..TaskCreate::default()
    })
}

#[async_trait]
impl TaskService for Rpc {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let id = request.id.clone();
        self.run("Create", &id, |shim| async move {
            check_create(&request)?;
            let plan = Plan::parse(
                &request.stdin,
                &request.stdout,
                &request.stderr,
                request.terminal,
            )?;
            let mounts = request.rootfs.iter().map(|mount| Mount {
                kind: mount.type_.clone(),
                source: mount.source.clone(),
                target: mount.target.clone(),
                options: mount.options.clone(),
            });
            let container = Request {
                id: request.id.clone(),
                bundle: request.bundle.clone().into(),
                mounts: mounts.collect(),
                plan,
            };
            let io = Io {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            };
            let events = shim.events().clone();
            let created =
                |task: &Task| events.publish(&create_event(&request, task.container.pid()));
            let task = shim.create(container, io, created).await?;
            Ok(CreateTaskResponse {
                pid: task.container.pid(),
                ..CreateTaskResponse::default()
            })
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        self.init(&request.id, &request.exec_id)?;
        let id = request.id.clone();
        self.run("Start", &id, |shim| async move {
            Ok(StartResponse {
                pid: shim.start(&request.id).await?,
                ..StartResponse::default()
            })
        })
        .await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let task = self.init(&request.id, &request.exec_id)?;
        let (state, exit) = {
            let life = task.container.life();
            (life.state(), life.exit().cloned())
        };
        let status = match state {
            State::Created => Status::CREATED,
            State::Running => Status::RUNNING,
            State::Stopped => Status::STOPPED,
        };
        Ok(StateResponse {
            id: request.id,
            bundle: task.bundle.display().to_string(),
            pid: task.container.pid(),
            status: EnumOrUnknown::new(status),
            stdin: task.io.stdin.clone(),
            stdout: task.io.stdout.clone(),
            stderr: task.io.stderr.clone(),
            terminal: task.io.terminal,
            exit_status: exit.as_ref().map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at_ns)).into(),
            ..StateResponse::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let task = self.init(&request.id, &request.exec_id)?;
        let exit = task.container.wait().await;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..WaitResponse::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.init(&request.id, &request.exec_id)?;
        let id = request.id.clone();
        self.run("Kill", &id, |shim| async move {
            shim.kill(&request.id, request.signal, request.all).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        if request.exec_id.is_empty() {
            self.0.abandon(&request.id);
        }
        self.init(&request.id, &request.exec_id)?;
        let id = request.id.clone();
        self.run("Delete", &id, |shim| async move {
            let events = shim.events().clone();
            let mut response = DeleteResponse::default();
            let deleted = |task: &Task, exit: &Exit| {
                response.pid = task.container.pid();
                response.exit_status = exit.status;
                response.exited_at = MessageField::some(timestamp(exit.at_ns));
                events.publish(&Event::Delete(TaskDelete {
                    container_id: task.container.id().to_owned(),
                    pid: response.pid,
                    exit_status: response.exit_status,
                    exited_at: response.exited_at.clone(),
                    ..TaskDelete::default()
                }));
            };
            shim.delete(&request.id, deleted).await?;
            Ok(response)
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let task = self.0.task(&request.id)?;
        // The stand-in: never a pid of the guest, which means something else
        // on this host. It ends with the task.
        let state = task.container.life().state();
        let pids = match state {
            State::Created | State::Running => vec![task.container.pid()],
            State::Stopped => Vec::new(),
        };
        let processes = pids.into_iter().map(|pid| ProcessInfo {
            pid,
            ..ProcessInfo::default()
        });
        Ok(PidsResponse {
            processes: processes.collect(),
            ..PidsResponse::default()
        })
    }

    /// Never fails, whatever is asked: containerd would throw the bundle away.
    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self
            .0
            .task(&request.id)
            .map_or(0, |task| task.container.pid());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let task = self.init(&request.id, &request.exec_id)?;
        if request.stdin {
            task.container.close_stdin();
        }
        Ok(Empty::new())
    }

    /// Asked after each task's end; an error would make that fail.
    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let asked = self.run("Shutdown", &request.id, |shim| async move {
            Ok(shim.shutdown().await)
        });
        let ends = asked.await.unwrap_or(false);
        debug!(ends, "asked to shut down");
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, _: ExecProcessRequest) -> ttrpc::Result<Empty> {
        unsupported("Exec")
    }

    async fn resize_pty(&self, _: &TtrpcContext, _: ResizePtyRequest) -> ttrpc::Result<Empty> {
        unsupported("ResizePty")
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> ttrpc::Result<Empty> {
        unsupported("Pause")
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> ttrpc::Result<Empty> {
        unsupported("Resume")
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        unsupported("Checkpoint")
    }

    async fn update(&self, _: &TtrpcContext, _: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        unsupported("Update")
    }

    async fn stats(&self, _: &TtrpcContext, _: StatsRequest) -> ttrpc::Result<StatsResponse> {
        unsupported("Stats")
    }
}
