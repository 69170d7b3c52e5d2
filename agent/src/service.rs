//! The agent's side of `agent.proto`.

use std::{
    path::Path,
    sync::{self, Arc, PoisonError},
    time::UNIX_EPOCH,
};

use agent_protocol::{
    PROTOCOL_VERSION,
    api::{
        AdjustTimeRequest, AdjustTimeResponse, CloseStdinRequest, CloseStdinResponse,
        ContainerStatsRequest, ContainerStatsResponse, CreateContainerRequest,
        CreateContainerResponse, CreatePodRequest, CreatePodResponse, DeleteProcessRequest,
        DeleteProcessResponse, ExecProcessRequest, ExecProcessResponse, FitMemoryRequest,
        FitMemoryResponse, HelloRequest, HelloResponse, ListProcessesRequest,
        ListProcessesResponse, LoadApparmorPolicyRequest, LoadApparmorPolicyResponse,
        PauseContainerRequest, PauseContainerResponse, ResizeTerminalRequest,
        ResizeTerminalResponse, ResumeContainerRequest, ResumeContainerResponse, SetCpusRequest,
        SetCpusResponse, SetNetworkRequest, SetNetworkResponse, SetSysctlsRequest,
        SetSysctlsResponse, ShutdownRequest, ShutdownResponse, SignalProcessRequest,
        SignalProcessResponse, StartProcessRequest, StartProcessResponse, UpdateContainerRequest,
        UpdateContainerResponse, WaitProcessRequest, WaitProcessResponse,
    },
    service::Agent,
};
use async_trait::async_trait;
use protobuf::MessageField;
use tokio::{
    sync::{Mutex, Notify},
    task::{self, spawn_blocking},
};
use ttrpc::{Code, r#async::TtrpcContext};

use crate::{
    apparmor, clock,
    containers::Containers,
    cpus, entropy, guest_memory,
    network::Network,
    pod,
    reaper::Exit,
    stats::metrics,
    status::{chain, cpus_code, internal, network_code, pod_code, refused, status, sysctls_code},
    sysctls,
};

/// Serves the contract. Each call that changes something runs [`to_its_end`].
pub struct Service {
    containers: Arc<Containers>,
    pod_created: Arc<Mutex<bool>>,
    network: Arc<sync::Mutex<Network>>,
    shutdown: Arc<Notify>,
}

impl Service {
    /// A service that tells `shutdown` when the pod is to end.
    pub fn new(containers: Arc<Containers>, shutdown: Arc<Notify>) -> Self {
        Self {
            containers,
            pod_created: Arc::default(),
            network: Arc::default(),
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
            paused_container_ids: self.containers.paused_ids().await,
            ..HelloResponse::default()
        })
    }

    async fn create_pod(
        &self,
        _: &TtrpcContext,
        request: CreatePodRequest,
    ) -> ttrpc::Result<CreatePodResponse> {
        let pod_created = Arc::clone(&self.pod_created);
        to_its_end(async move {
            let mut created = pod_created.lock().await;
            if *created {
                return Err(status(Code::ALREADY_EXISTS, "the pod exists already"));
            }
            spawn_blocking(move || pod::create(&request))
                .await
                .map_err(|error| internal(&error))?
                .map_err(|error| status(pod_code(&error), chain(&error)))?;
            *created = true;
            Ok(CreatePodResponse::default())
        })
        .await
    }

    async fn set_sysctls(
        &self,
        _: &TtrpcContext,
        request: SetSysctlsRequest,
    ) -> ttrpc::Result<SetSysctlsResponse> {
        to_its_end(async move {
            spawn_blocking(move || sysctls::set(&request.sysctls))
                .await
                .map_err(|error| internal(&error))?
                .map_err(|error| status(sysctls_code(&error), chain(&error)))
        })
        .await?;
        Ok(SetSysctlsResponse::default())
    }

    async fn set_cpus(
        &self,
        _: &TtrpcContext,
        request: SetCpusRequest,
    ) -> ttrpc::Result<SetCpusResponse> {
        to_its_end(async move {
            spawn_blocking(move || cpus::set(request.count))
                .await
                .map_err(|error| internal(&error))?
                .map_err(|error| status(cpus_code(&error), chain(&error)))
        })
        .await?;
        Ok(SetCpusResponse::default())
    }

    async fn fit_memory(
        &self,
        _: &TtrpcContext,
        _: FitMemoryRequest,
    ) -> ttrpc::Result<FitMemoryResponse> {
        let total_bytes = to_its_end(async {
            spawn_blocking(guest_memory::fit)
                .await
                .map_err(|error| internal(&error))?
                .map_err(|error| internal(&error))
        })
        .await?;
        Ok(FitMemoryResponse {
            total_bytes,
            ..FitMemoryResponse::default()
        })
    }

    async fn load_apparmor_policy(
        &self,
        _: &TtrpcContext,
        request: LoadApparmorPolicyRequest,
    ) -> ttrpc::Result<LoadApparmorPolicyResponse> {
        to_its_end(async move {
            spawn_blocking(move || apparmor::load(&request.policy))
                .await
                .map_err(|error| internal(&error))?
                .map_err(|error| status(Code::FAILED_PRECONDITION, chain(&error)))
        })
        .await?;
        Ok(LoadApparmorPolicyResponse::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        if !*self.pod_created.lock().await {
            return Err(status(Code::FAILED_PRECONDITION, "there is no pod yet"));
        }
        let containers = Arc::clone(&self.containers);
        let guest_pid = to_its_end(async move {
            let created = containers.create(
                &request.container_id,
                Path::new(&request.bundle),
                &request.spec_json,
                &request.stdio,
            );
            created.await.map_err(|error| refused(&error))
        })
        .await?;
        Ok(CreateContainerResponse {
            guest_pid,
            ..CreateContainerResponse::default()
        })
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        let containers = Arc::clone(&self.containers);
        let guest_pid = to_its_end(async move {
            let created = containers.exec(&request.process, &request.process_json, &request.stdio);
            created.await.map_err(|error| refused(&error))
        })
        .await?;
        Ok(ExecProcessResponse {
            guest_pid,
            ..ExecProcessResponse::default()
        })
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: StartProcessRequest,
    ) -> ttrpc::Result<StartProcessResponse> {
        let containers = Arc::clone(&self.containers);
        let guest_pid = to_its_end(async move {
            let started = containers.start(&request.process);
            started.await.map_err(|error| refused(&error))
        })
        .await?;
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
        let containers = Arc::clone(&self.containers);
        to_its_end(async move {
            let sent = containers.signal(&request.process, signal, request.all);
            sent.await.map_err(|error| refused(&error))
        })
        .await?;
        Ok(SignalProcessResponse::default())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let (exit, oom_kills) = self
            .containers
            .wait(&request.process)
            .await
            .map_err(|error| refused(&error))?;
        Ok(WaitProcessResponse {
            exit_status: exit.status,
            exited_at_ns: exited_at_ns(exit),
            oom_kills,
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

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<ResizeTerminalResponse> {
        let cells = |count: u32| {
            u16::try_from(count).map_err(|_| {
                let message = format!("a terminal cannot be {count} characters wide or high");
                status(Code::INVALID_ARGUMENT, message)
            })
        };
        let (rows, columns) = (cells(request.height)?, cells(request.width)?);
        self.containers
            .resize(&request.process, rows, columns)
            .map_err(|error| refused(&error))?;
        Ok(ResizeTerminalResponse::default())
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: PauseContainerRequest,
    ) -> ttrpc::Result<PauseContainerResponse> {
        let containers = Arc::clone(&self.containers);
        to_its_end(async move {
            let paused = containers.pause(&request.container_id);
            paused.await.map_err(|error| refused(&error))
        })
        .await?;
        Ok(PauseContainerResponse::default())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ResumeContainerRequest,
    ) -> ttrpc::Result<ResumeContainerResponse> {
        let containers = Arc::clone(&self.containers);
        to_its_end(async move {
            let resumed = containers.resume(&request.container_id);
            resumed.await.map_err(|error| refused(&error))
        })
        .await?;
        Ok(ResumeContainerResponse::default())
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerStatsRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        let figures = self.containers.figures(&request.container_id);
        let figures = figures.await.map_err(|error| refused(&error))?;
        Ok(ContainerStatsResponse {
            metrics: MessageField::some(metrics(&figures)),
            ..ContainerStatsResponse::default()
        })
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<UpdateContainerResponse> {
        let containers = Arc::clone(&self.containers);
        to_its_end(async move {
            let updated = containers.update(&request.container_id, &request.linux_resources_json);
            updated.await.map_err(|error| refused(&error))
        })
        .await?;
        Ok(UpdateContainerResponse::default())
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: DeleteProcessRequest,
    ) -> ttrpc::Result<DeleteProcessResponse> {
        let containers = Arc::clone(&self.containers);
        let exit = to_its_end(async move {
            let deleted = containers.delete(&request.process);
            deleted.await.map_err(|error| refused(&error))
        })
        .await?;
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

    async fn set_network(
        &self,
        _: &TtrpcContext,
        request: SetNetworkRequest,
    ) -> ttrpc::Result<SetNetworkResponse> {
        if !*self.pod_created.lock().await {
            return Err(status(Code::FAILED_PRECONDITION, "there is no pod yet"));
        }
        let network = Arc::clone(&self.network);
        to_its_end(async move {
            // What it holds is what has been done, also when a thread panicked over it.
            let set = move || {
                let mut network = network.lock().unwrap_or_else(PoisonError::into_inner);
                network.set(&request)
            };
            spawn_blocking(set)
                .await
                .map_err(|error| internal(&error))?
                .map_err(|error| status(network_code(&error), chain(&error)))?;
            Ok(SetNetworkResponse::default())
        })
        .await
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: ShutdownRequest,
    ) -> ttrpc::Result<ShutdownResponse> {
        let containers = Arc::clone(&self.containers);
        let shutdown = Arc::clone(&self.shutdown);
        to_its_end(async move {
            containers.delete_all().await;
            shutdown.notify_one();
            Ok(ShutdownResponse::default())
        })
        .await
    }
}

fn exited_at_ns(exit: Exit) -> i64 {
    let since = exit.at.duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as i64)
}

/// Runs a call to its end. ttrpc drops a handler whose caller is gone or has
/// waited long enough; what is half done then has no owner.
async fn to_its_end<T: Send + 'static>(
    call: impl Future<Output = ttrpc::Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    task::spawn(call).await.map_err(|error| internal(&error))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn to_its_end_of_a_caller_that_left_goes_on() {
        let (go, gate) = oneshot::channel();
        let (done, seen) = oneshot::channel();
        let mut call = Box::pin(to_its_end(async move {
            gate.await.expect("opened");
            done.send(()).expect("watched");
            Ok(())
        }));
        // Once, as a handler is that ttrpc drops later.
        tokio::select! {
            biased;
            _ = &mut call => panic!("the gate is closed"),
            () = std::future::ready(()) => {}
        }
        drop(call);
        go.send(()).expect("waited for");
        seen.await.expect("goes on");
    }
}
