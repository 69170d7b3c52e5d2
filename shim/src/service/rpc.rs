//! The task service, as containerd calls it: v2 and v3 are the same messages
//! under two names.
//!
//! Calls that change something run in a task of their own: the library drops a
//! call's future when its client hangs up or its time is over, and half a
//! Create would be nobody's.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use agent_protocol::api::Metrics;
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
use protobuf::{CodedOutputStream, EnumOrUnknown, Message, MessageField};
use serde_json::Value;
use tracing::{debug, warn};
use ttrpc::r#async::{Service, TtrpcContext};

use super::{Error, Shim, Task, options};
use crate::events::{Event, timestamp};
use crate::host::mounts::Mount;
use crate::pod::chain;
use crate::pod::container::Request;
use crate::pod::process::{ExecRequest, Process};
use crate::stdio::Io;
use crate::task::{Exit, State};

/// The names under which the one service is offered.
const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// What Stats answers with.
const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

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
    /// [`run`] of this service's shim.
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
        run(&self.0, call, id, work).await
    }
}

/// Runs a call to its end, whoever still listens.
pub(super) async fn run<T, F>(
    shim: &Arc<Shim>,
    call: &'static str,
    id: &str,
    work: impl FnOnce(Arc<Shim>) -> F,
) -> ttrpc::Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Error>> + Send + 'static,
{
    debug!(id, call, "called");
    let result = tokio::spawn(work(Arc::clone(shim))).await;
    let result = result.map_err(Error::from).flatten();
    result.map_err(|error| {
        warn!(id, call, "{}", chain(&error));
        error.into()
    })
}

/// Statistics, as clients know them.
pub(super) fn metrics_any(metrics: &Metrics) -> Any {
    Any {
        type_url: METRICS_TYPE.to_owned(),
        // By the agent's protocol these bytes are that message's.
        value: metrics.write_to_bytes().expect("a message encodes"),
        ..Any::default()
    }
}

/// A part of an OCI runtime configuration, which containerd sends as JSON in an
/// `Any`: `what` of the request.
fn json_object(what: &str, part: &Any) -> Result<Value, Error> {
    let wrong = |reason: String| Error::Argument {
        what: what.to_owned(),
        reason,
    };
    match serde_json::from_slice::<Value>(&part.value) {
        Ok(object @ Value::Object(_)) => Ok(object),
        Ok(_) => Err(wrong("is not an object".to_owned())),
        Err(error) => Err(wrong(format!("is not JSON: {error}"))),
    }
}

/// What Pids says of an exec: `containerd.runc.v1.ProcessDetails`, which is what
/// clients know, and of which only field 1, `exec_id`, exists.
fn process_details(exec_id: &str) -> Any {
    let mut value = Vec::new();
    let mut output = CodedOutputStream::vec(&mut value);
    output
        .write_string(1, exec_id)
        .and_then(|()| output.flush())
        .expect("memory takes it");
    drop(output);
    Any {
        type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
        value,
        ..Any::default()
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
    request.options.as_ref().map_or(Ok(()), options::check)
}

fn delete_response(pid: u32, exit: &Exit) -> DeleteResponse {
    DeleteResponse {
        pid,
        exit_status: exit.status,
        exited_at: MessageField::some(timestamp(exit.at_ns)),
        ..DeleteResponse::default()
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
            let io = Io {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            };
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
                plan: io.plan()?,
                io,
            };
            let events = shim.events().clone();
            let created =
                |task: &Task| events.publish(&create_event(&request, task.container.pid()));
            let task = shim.create(container, created).await?;
            Ok(CreateTaskResponse {
                pid: task.container.pid(),
                ..CreateTaskResponse::default()
            })
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let id = request.id.clone();
        self.run("Start", &id, |shim| async move {
            Ok(StartResponse {
                pid: shim.start(&request.id, &request.exec_id).await?,
                ..StartResponse::default()
            })
        })
        .await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let (task, process) = self.0.process(&request.id, &request.exec_id)?;
        let (state, exit) = {
            let life = process.life();
            (life.state(), life.exit().cloned())
        };
        let status = match state {
            State::Created => Status::CREATED,
            State::Running => Status::RUNNING,
            State::Paused => Status::PAUSED,
            State::Stopped => Status::STOPPED,
        };
        Ok(StateResponse {
            // As containerd's own shim: the exec's, of an exec.
            id: process.name().to_owned(),
            bundle: task.bundle.display().to_string(),
            pid: process.pid(),
            status: EnumOrUnknown::new(status),
            stdin: process.io().stdin.clone(),
            stdout: process.io().stdout.clone(),
            stderr: process.io().stderr.clone(),
            terminal: process.io().terminal,
            exec_id: request.exec_id,
            exit_status: exit.as_ref().map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at_ns)).into(),
            ..StateResponse::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let (_, process) = self.0.process(&request.id, &request.exec_id)?;
        let exit = process.wait().await;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..WaitResponse::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.run("Kill", &id, |shim| async move {
            shim.kill(&request.id, &request.exec_id, request.signal, request.all)
                .await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let id = request.id.clone();
        if !request.exec_id.is_empty() {
            let deleted = self.run("Delete", &id, |shim| async move {
                shim.delete_exec(&request.id, &request.exec_id).await
            });
            let (pid, exit) = deleted.await?;
            return Ok(delete_response(pid, &exit));
        }
        self.0.abandon(&id);
        self.run("Delete", &id, |shim| async move {
            let events = shim.events().clone();
            let mut response = DeleteResponse::default();
            let deleted = |task: &Task, exit: &Exit| {
                response = delete_response(task.container.pid(), exit);
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
        // The stand-ins: never a pid of the guest, which means something else
        // on this host. They end with their processes.
        let live = |process: &Arc<Process>| match process.life().state() {
            State::Created | State::Running | State::Paused => true,
            State::Stopped => false,
        };
        let processes = task.container.processes().into_iter().filter(live);
        let processes = processes.map(|process| ProcessInfo {
            pid: process.pid(),
            info: match process.id().exec_id.as_str() {
                "" => MessageField::none(),
                exec_id => MessageField::some(process_details(exec_id)),
            },
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
        let (_, process) = self.0.process(&request.id, &request.exec_id)?;
        if request.stdin {
            process.close_stdin();
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

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.run("Exec", &id, |shim| async move {
            // An unknown task first, whatever else is wrong.
            shim.task(&request.id)?;
            let io = Io {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            };
            let exec = ExecRequest {
                exec_id: request.exec_id,
                process: json_object("spec", &request.spec)?,
                plan: io.plan()?,
                io,
            };
            shim.exec(&request.id, exec).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.run("ResizePty", &id, |shim| async move {
            let (width, height) = (request.width, request.height);
            shim.resize(&request.id, &request.exec_id, width, height)
                .await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.run("Pause", &request.id.clone(), |shim| async move {
            shim.pause(&request.id).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.run("Resume", &request.id.clone(), |shim| async move {
            shim.resume(&request.id).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        // An unknown task first: that is the caller's mistake, here as elsewhere.
        self.0.task(&request.id)?;
        unsupported("Checkpoint")
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.run("Update", &request.id.clone(), |shim| async move {
            // An unknown task first, whatever else is wrong.
            shim.task(&request.id)?;
            let resources = json_object("resources", &request.resources)?;
            let resources = resources.to_string().into_bytes();
            shim.update(&request.id, resources).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.run("Stats", &request.id.clone(), |shim| async move {
            let metrics = shim.stats(&request.id).await?;
            Ok(StatsResponse {
                stats: MessageField::some(metrics_any(&metrics)),
                ..StatsResponse::default()
            })
        })
        .await
    }
}
