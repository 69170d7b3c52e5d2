//! The sandbox service, as containerd calls it (`containerd.runtime.sandbox.v1`).
//!
//! Calls that change something run in a task of their own, as those of the task
//! service do.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use containerd_shim_protos::types::platform::Platform;
use protobuf::MessageField;
use ttrpc::r#async::{Service, TtrpcContext};

use super::rpc::{metrics_any, run};
use super::sandbox::SandboxRequest;
use super::{Error, Shim};
use crate::events::{now_ns, timestamp};
use crate::spec::parse_pod;

/// What CRI sends of a pod, as the name of an `Any`.
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";
/// States, as CRI names them.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The sandbox service.
pub fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(Rpc(Arc::clone(shim))))
}

struct Rpc(Arc<Shim>);

/// The pod that is asked for.
///
/// # Errors
/// When it is not one of CRI's, or has a root file system, for which there is nothing
/// to run in it.
pub(super) fn sandbox_request(request: CreateSandboxRequest) -> Result<SandboxRequest, Error> {
    let wrong = |what: &str, reason: String| Error::Argument {
        what: what.to_owned(),
        reason,
    };
    if !request.rootfs.is_empty() {
        let reason = "a sandbox has none here: it is a VM".to_owned();
        return Err(wrong("rootfs", reason));
    }
    let options = request.options.unwrap_or_default();
    if options.type_url.rsplit('/').next() != Some(CONFIG_TYPE) {
        let reason = format!(
            "is {:?}: need a {CONFIG_TYPE}, as CRI sends",
            options.type_url
        );
        return Err(wrong("options", reason));
    }
    let config = parse_pod(&options.value).map_err(|error| wrong("options", error.to_string()))?;
    Ok(SandboxRequest {
        id: request.sandbox_id,
        bundle: request.bundle_path.into(),
        config,
        network_path: request.netns_path,
    })
}

#[async_trait]
impl Sandbox for Rpc {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let id = request.sandbox_id.clone();
        run(&self.0, "CreateSandbox", &id, |shim| async move {
            shim.create_sandbox(sandbox_request(request)?).await?;
            Ok(CreateSandboxResponse::default())
        })
        .await
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let id = request.sandbox_id;
        run(&self.0, "StartSandbox", &id.clone(), |shim| async move {
            let status = shim.start_sandbox(&id).await?;
            Ok(StartSandboxResponse {
                pid: status.pid,
                created_at: MessageField::some(timestamp(status.created_at_ns)),
                ..StartSandboxResponse::default()
            })
        })
        .await
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        Ok(PlatformResponse {
            platform: MessageField::some(Platform {
                os: "linux".to_owned(),
                architecture: "amd64".to_owned(),
                ..Platform::default()
            }),
            ..PlatformResponse::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let id = request.sandbox_id;
        run(&self.0, "StopSandbox", &id.clone(), |shim| async move {
            shim.stop_sandbox(&id).await?;
            Ok(StopSandboxResponse::default())
        })
        .await
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.0.wait_sandbox(&request.sandbox_id).await?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let status = self.0.sandbox_status(&request.sandbox_id)?;
        let state = if status.exit.is_none() {
            READY
        } else {
            NOT_READY
        };
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: status.pid,
            state: state.to_owned(),
            created_at: MessageField::some(timestamp(status.created_at_ns)),
            exited_at: status.exit.map(|exit| timestamp(exit.at_ns)).into(),
            ..SandboxStatusResponse::default()
        })
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        self.0.sandbox_status(&request.sandbox_id)?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let id = request.sandbox_id;
        run(&self.0, "ShutdownSandbox", &id.clone(), |shim| async move {
            shim.shutdown_sandbox(&id).await?;
            Ok(ShutdownSandboxResponse::default())
        })
        .await
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let id = request.sandbox_id;
        run(&self.0, "SandboxMetrics", &id.clone(), |shim| async move {
            let metrics = shim.sandbox_metrics(&id).await?;
            let mut response = SandboxMetricsResponse::default();
            let metric = response.metrics.mut_or_insert_default();
            metric.timestamp = MessageField::some(timestamp(now_ns()));
            metric.id = id;
            metric.data = MessageField::some(metrics_any(&metrics));
            Ok(response)
        })
        .await
    }
}
