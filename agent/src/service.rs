//! The agent's side of `agent.proto`.

use std::{error::Error, sync::Arc, time::UNIX_EPOCH};

use agent_container::CreateError;
use agent_protocol::{
    PROTOCOL_VERSION,
    api::{
        AdjustTimeRequest, AdjustTimeResponse, CloseStdinRequest, CloseStdinResponse,
        CreateContainerRequest, CreateContainerResponse, CreatePodRequest, CreatePodResponse,
        DeleteProcessRequest, DeleteProcessResponse, HelloRequest, HelloResponse,
        ListProcessesRequest, ListProcessesResponse, ShutdownRequest, ShutdownResponse,
        SignalProcessRequest, SignalProcessResponse, StartProcessRequest, StartProcessResponse,
        WaitProcessRequest, WaitProcessResponse,
    },
    service::Agent,
};
use async_trait::async_trait;
use tokio::{
    sync::{Mutex, Notify},
    task::spawn_blocking,
};
use ttrpc::{Code, r#async::TtrpcContext, get_status};

use crate::{
    clock,
    containers::{ContainerError, Containers},
    entropy, pod,
    reaper::Exit,
};

/// Serves the contract.
pub struct Service {
    containers: Arc<Containers>,
    pod_created: Mutex<bool>,
    shutdown: Arc<Notify>,
}

impl Service {
    /// A service that tells `shutdown` when the pod is to end.
    pub fn new(containers: Arc<Containers>, shutdown: Arc<Notify>) -> Self {
        Self {
            containers,
            pod_created: Mutex::default(),
            shutdown,
        }
    }
}

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> ttrpc::Result<HelloResponse> {
        let version = request.protocol_version;
        if version != PROTOCOL_VERSION {
            return Err(status(
                Code::FAILED_PRECONDITION,
                format!(
                    "protocol version {version} asked for, this agent speaks {PROTOCOL_VERSION}; \
                     install shim and guest of one release"
                ),
            ));
        }
        if request.realtime_ns != 0 {
            let now = clock::realtime_ns().map_err(|error| internal(&error))?;
            let step = clock::step_for_lower_bound(now, request.realtime_ns);
            clock::adjust(step).map_err(|error| internal(&error))?;
        }
        if !request.entropy.is_empty() {
            entropy::seed(&request.entropy).map_err(|error| internal(&error))?;
        }
        let kernel = nix::sys::utsname::uname().map_err(|error| internal(&error))?;
        Ok(HelloResponse {
            protocol_version: PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: kernel.release().to_string_lossy().into_owned(),
            container_ids: self.containers.ids(),
            ..HelloResponse::default()
        })
    }

    async fn create_pod(
        &self,
        _: &TtrpcContext,
        request: CreatePodRequest,
    ) -> ttrpc::Result<CreatePodResponse> {
        let mut created = self.pod_created.lock().await;
        if *created {
            return Err(status(Code::ALREADY_EXISTS, "the pod exists already"));
        }
        spawn_blocking(move || pod::create(&request))
            .await
            .map_err(|error| internal(&error))?
            .map_err(|error| match error {
                pod::PodError::Hostname { .. } => status(Code::INVALID_ARGUMENT, chain(&error)),
                _ => internal(&error),
            })?;
        *created = true;
        Ok(CreatePodResponse::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        if !*self.pod_created.lock().await {
            return Err(status(Code::FAILED_PRECONDITION, "there is no pod yet"));
        }
        let guest_pid = self
            .containers
            .create(&request.container_id, &request.spec_json, &request.stdio)
            .await
            .map_err(|error| refused(&error))?;
        Ok(CreateContainerResponse {
            guest_pid,
            ..CreateContainerResponse::default()
        })
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: StartProcessRequest,
    ) -> ttrpc::Result<StartProcessResponse> {
        let guest_pid = self
            .containers
            .start(&request.process)
            .await
            .map_err(|error| refused(&error))?;
        Ok(StartProcessResponse {
            guest_pid,
            ..StartProcessResponse::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<SignalProcessResponse> {
        let signal = i32::try_from(request.signal)
            .ok()
            .filter(|signal| (1..=libc::SIGRTMAX()).contains(signal))
            .ok_or_else(|| {
                let message = format!("there is no signal {}", request.signal);
                status(Code::INVALID_ARGUMENT, message)
            })?;
        self.containers
            .signal(&request.process, signal, request.all)
            .await
            .map_err(|error| refused(&error))?;
        Ok(SignalProcessResponse::default())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let exit = self
            .containers
            .wait(&request.process)
            .await
            .map_err(|error| refused(&error))?;
        Ok(WaitProcessResponse {
            exit_status: exit.status,
            exited_at_ns: exited_at_ns(exit),
            ..WaitProcessResponse::default()
        })
    }

    async fn close_stdin(
        &self,
        _: &TtrpcContext,
        request: CloseStdinRequest,
    ) -> ttrpc::Result<CloseStdinResponse> {
        self.containers
            .close_stdin(&request.process)
            .map_err(|error| refused(&error))?;
        Ok(CloseStdinResponse::default())
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: DeleteProcessRequest,
    ) -> ttrpc::Result<DeleteProcessResponse> {
        let exit = self
            .containers
            .delete(&request.process)
            .await
            .map_err(|error| refused(&error))?;
        Ok(DeleteProcessResponse {
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at_ns: exit.map_or(0, exited_at_ns),
            ..DeleteProcessResponse::default()
        })
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ListProcessesRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let guest_pids = self
            .containers
            .pids(&request.container_id)
            .await
            .map_err(|error| refused(&error))?;
        Ok(ListProcessesResponse {
            guest_pids,
            ..ListProcessesResponse::default()
        })
    }

    async fn adjust_time(
        &self,
        _: &TtrpcContext,
        request: AdjustTimeRequest,
    ) -> ttrpc::Result<AdjustTimeResponse> {
        let realtime_ns = clock::realtime_ns().map_err(|error| internal(&error))?;
        clock::adjust(request.adjust_ns).map_err(|error| internal(&error))?;
        Ok(AdjustTimeResponse {
            realtime_ns,
            ..AdjustTimeResponse::default()
        })
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: ShutdownRequest,
    ) -> ttrpc::Result<ShutdownResponse> {
        self.containers.delete_all().await;
        self.shutdown.notify_one();
        Ok(ShutdownResponse::default())
    }
}

fn exited_at_ns(exit: Exit) -> i64 {
    let since = exit.at.duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as i64)
}

fn refused(error: &ContainerError) -> ttrpc::Error {
    let code = match error {
        ContainerError::Id { .. } | ContainerError::Spec(_) | ContainerError::Rootfs { .. } => {
            Code::INVALID_ARGUMENT
        }
        ContainerError::NotFound { .. } | ContainerError::Ended { .. } => Code::NOT_FOUND,
        ContainerError::Exists { .. } => Code::ALREADY_EXISTS,
        ContainerError::Create {
            source: CreateError::Unsupported(_),
            ..
        } => Code::INVALID_ARGUMENT,
        ContainerError::Create { .. } | ContainerError::Operate { .. } => Code::INTERNAL,
    };
    status(code, chain(error))
}

fn internal(error: &dyn Error) -> ttrpc::Error {
    status(Code::INTERNAL, chain(error))
}

fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message.into()))
}

/// The whole chain of causes on one line, outermost first.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
