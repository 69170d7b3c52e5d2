//! The sandbox service: a pod without a pause container.

use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest,
    SandboxStatusRequest, ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest,
    WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;

use super::*;
use crate::spec::cri::PodSandboxConfig;

struct Sandboxes {
    client: SandboxClient,
    bundle: std::path::PathBuf,
}

/// Calls with a request, the id of which is the pod's.
macro_rules! call {
    ($sandboxes:expr, $method:ident, $request:ident) => {{
        let client = $sandboxes.client.clone();
        let request = $request {
            sandbox_id: "box".to_owned(),
            ..$request::default()
        };
        async move { client.$method(Context::default(), &request).await }
    }};
}

impl Sandboxes {
    fn of(world: &World) -> Self {
        let bundle = world.directory.path().join("sandbox");
        std::fs::create_dir_all(&bundle).expect("makes a bundle");
        Self {
            client: SandboxClient::new(world.raw.clone()),
            bundle,
        }
    }

    async fn create(&self, id: &str) -> ttrpc::Result<()> {
        let config = PodSandboxConfig {
            hostname: "podhost".to_owned(),
            ..PodSandboxConfig::default()
        };
        let request = CreateSandboxRequest {
            sandbox_id: id.to_owned(),
            bundle_path: self.bundle.display().to_string(),
            netns_path: "/run/netns/cni-1".to_owned(),
            options: MessageField::some(Any {
                type_url: "runtime.v1.PodSandboxConfig".to_owned(),
                value: config.write_to_bytes().expect("encodes"),
                ..Any::default()
            }),
            ..CreateSandboxRequest::default()
        };
        let created = self.client.create_sandbox(Context::default(), &request);
        created.await.map(drop)
    }

    async fn start(&self) -> ttrpc::Result<u32> {
        let started = call!(self, start_sandbox, StartSandboxRequest);
        started.await.map(|response| response.pid)
    }

    async fn state(&self) -> ttrpc::Result<String> {
        let status = call!(self, sandbox_status, SandboxStatusRequest);
        status.await.map(|response| response.state)
    }

    async fn stop(&self) -> ttrpc::Result<()> {
        let stopped = call!(self, stop_sandbox, StopSandboxRequest);
        stopped.await.map(drop)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pod_of_the_sandbox_service_lives_and_ends_as_any_other() {
    let world = World::new("box").await;
    let sandboxes = Sandboxes::of(&world);
    sandboxes.create("box").await.expect("creates");
    let (code, _) = refused(sandboxes.create("box").await);
    assert_eq!(code, Code::ALREADY_EXISTS);
    let pid = sandboxes.start().await.expect("starts");
    let sysctls = world.guest.sysctls.lock().expect("unpoisoned").clone();
    assert_eq!(sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
    assert_eq!(sandboxes.state().await.expect("is known"), "SANDBOX_READY");
    let platform = PlatformRequest::default();
    let platform = sandboxes.client.platform(Context::default(), &platform);
    assert_eq!(platform.await.expect("answers").platform.os, "linux");
    let ping = call!(sandboxes, ping_sandbox, PingRequest);
    ping.await.expect("answers");

    let mut spec = member("box", pid, &["sleep"]);
    spec["mounts"] = json!([]);
    world.create("c", &spec).await.expect("creates");
    world.start("c").await.expect("starts");
    let given = world.guest.specs.lock().expect("unpoisoned")["c"].clone();
    let mounts = given["mounts"].as_array().expect("is a list");
    let places: Vec<_> = mounts
        .iter()
        .map(|mount| mount["destination"].as_str().expect("is text"))
        .collect();
    let wanted = [
        "/etc/hostname",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/dev/shm",
    ];
    assert_eq!(places, wanted);
    let metrics = call!(sandboxes, sandbox_metrics, SandboxMetricsRequest);
    let metrics = metrics.await.expect("answers").metrics;
    let sum = agent_protocol::api::Metrics::parse_from_bytes(&metrics.data.value);
    assert_eq!(sum.expect("are metrics").pids.current, 3);

    let waited = call!(sandboxes, wait_sandbox, WaitSandboxRequest);
    let (waited, stopped) = tokio::join!(waited, sandboxes.stop());
    stopped.expect("stops");
    assert_eq!(waited.expect("answers").exit_status, 137);
    assert_eq!(world.wait("c").await.exit_status, 137);
    assert_eq!(
        sandboxes.state().await.expect("is known"),
        "SANDBOX_NOTREADY"
    );
    // The VM goes with the last container that somebody has still to delete.
    world.delete("c").await.expect("deletes");
    let journal = world.journal.lock().expect("unpoisoned").clone();
    assert_eq!(journal.last().map(String::as_str), Some("destroy"));
    sandboxes.stop().await.expect("again");
    let shutdown = call!(sandboxes, shutdown_sandbox, ShutdownSandboxRequest);
    shutdown.await.expect("answers");
    tokio::time::timeout(Duration::from_secs(20), world.shim.done(Duration::MAX))
        .await
        .expect("the shim has nothing left to do");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pod_that_is_shut_down_with_containers_in_it_leaves_them_to_delete() {
    let world = World::new("box").await;
    let sandboxes = Sandboxes::of(&world);
    sandboxes.create("box").await.expect("creates");
    let pid = sandboxes.start().await.expect("starts");
    let member = member("box", pid, &["sleep"]);
    world.create("c", &member).await.expect("creates");
    world.start("c").await.expect("starts");
    let shutdown = call!(sandboxes, shutdown_sandbox, ShutdownSandboxRequest);
    shutdown.await.expect("answers");
    let journal = world.journal.lock().expect("unpoisoned").clone();
    assert_eq!(journal.last().map(String::as_str), Some("leave"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sandbox_that_is_not_there_or_not_cris_is_refused() {
    let world = World::new("box").await;
    let sandboxes = Sandboxes::of(&world);
    for refusal in [
        refused(sandboxes.start().await),
        refused(sandboxes.state().await),
        refused(sandboxes.stop().await),
        refused(sandboxes.create("other").await),
    ] {
        assert_eq!(refusal.0, Code::NOT_FOUND, "{}", refusal.1);
    }
    let no_config = call!(sandboxes, create_sandbox, CreateSandboxRequest);
    assert_eq!(refused(no_config.await).0, Code::INVALID_ARGUMENT);
    // containerd shuts down what it could not create.
    let shutdown = call!(sandboxes, shutdown_sandbox, ShutdownSandboxRequest);
    shutdown.await.expect("answers");
    tokio::time::timeout(Duration::from_secs(20), world.shim.done(Duration::MAX))
        .await
        .expect("the shim has nothing left to do");
}
