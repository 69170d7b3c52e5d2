//! The whole shim against a containerd, a host and a guest of the tests'.

mod endings;
mod execs;
mod guest;
mod host;
mod room;
mod sandboxes;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest,
    DeleteResponse, ExecProcessRequest, KillRequest, PidsRequest, ShutdownRequest, StartRequest,
    StateRequest, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use ttrpc::Code;
use ttrpc::r#async::Server;
use ttrpc::context::Context;

use super::*;
use crate::events::tests::listen;
use crate::host::cgroup::CgroupPath;
use crate::pod::host_side::HostSide;
use guest::Guest;
use host::{FakeHost, Journal};

/// One shim with its containerd.
struct World {
    directory: TempDir,
    journal: Journal,
    guest: Arc<Guest>,
    shim: Arc<Shim>,
    client: TaskClient,
    raw: Client,
    events: mpsc::UnboundedReceiver<Envelope>,
    _servers: (Server, Server),
}

impl World {
    async fn new(pod_id: &str) -> Self {
        Self::granted(pod_id, None).await
    }

    /// With so much of the host's memory for the pod, if that is limited.
    async fn granted(pod_id: &str, granted_bytes: Option<u64>) -> Self {
        let directory = tempfile::tempdir().expect("makes a directory");
        let ttrpc_address = format!("unix://{}/events", directory.path().display());
        let (events_server, events) = listen(&ttrpc_address).await;
        let paths = PodPaths::below(directory.path(), "default", pod_id).expect("is an id");
        std::fs::create_dir_all(paths.directory()).expect("makes a directory");
        let journal = Journal::default();
        let guest = Guest::new();
        let mut host = FakeHost::new(&journal, &guest, directory.path());
        host.granted_bytes = granted_bytes;
        let make = Box::new(move |_: CgroupPath| Ok(Box::new(host) as Box<dyn HostSide>));
        let shim = Shim::new(paths, Events::start(&ttrpc_address, "default"), make);
        let address = format!("unix://{}/shim.sock", directory.path().display());
        let mut server = Server::new()
            .bind(&address)
            .expect("binds")
            .register_service(rpc::services(&shim))
            .register_service(sandbox_rpc::services(&shim));
        server.start().await.expect("serves");
        let raw = Client::connect(&address).await.expect("connects");
        Self {
            directory,
            journal,
            guest,
            shim,
            client: TaskClient::new(raw.clone()),
            raw,
            events,
            _servers: (events_server, server),
        }
    }

    fn bundle(&self, id: &str, spec: &Value) -> CreateTaskRequest {
        let bundle = self.directory.path().join("bundles").join(id);
        std::fs::create_dir_all(&bundle).expect("makes a bundle");
        std::fs::write(bundle.join("config.json"), spec.to_string()).expect("writes");
        let fifo = |name: &str| {
            let path = bundle.join(name);
            rustix::fs::mknodat(
                rustix::fs::CWD,
                &path,
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::RWXU,
                0,
            )
            .expect("makes a FIFO");
            path.display().to_string()
        };
        CreateTaskRequest {
            id: id.to_owned(),
            stdin: fifo("in"),
            stdout: fifo("out"),
            stderr: fifo("err"),
            bundle: bundle.display().to_string(),
            ..CreateTaskRequest::default()
        }
    }

    async fn create(&self, id: &str, spec: &Value) -> ttrpc::Result<u32> {
        let request = self.bundle(id, spec);
        self.client
            .create(Context::default(), &request)
            .await
            .map(|response| response.pid)
    }

    async fn start(&self, id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.to_owned(),
            ..StartRequest::default()
        };
        self.client
            .start(Context::default(), &request)
            .await
            .map(|response| response.pid)
    }

    async fn wait(&self, id: &str) -> WaitResponse {
        let request = WaitRequest {
            id: id.to_owned(),
            ..WaitRequest::default()
        };
        self.client
            .wait(Context::default(), &request)
            .await
            .expect("waits")
    }

    async fn kill(&self, id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: id.to_owned(),
            signal,
            ..KillRequest::default()
        };
        self.client
            .kill(Context::default(), &request)
            .await
            .map(drop)
    }

    async fn delete(&self, id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: id.to_owned(),
            ..DeleteRequest::default()
        };
        self.client.delete(Context::default(), &request).await
    }

    async fn update(&self, id: &str, resources_json: &str) -> ttrpc::Result<()> {
        let request = UpdateTaskRequest {
            id: id.to_owned(),
            resources: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
                    .to_owned(),
                value: resources_json.into(),
                ..Any::default()
            }),
            ..UpdateTaskRequest::default()
        };
        let updated = self.client.update(Context::default(), &request);
        updated.await.map(drop)
    }

    async fn status(&self, id: &str) -> Status {
        let request = StateRequest {
            id: id.to_owned(),
            ..StateRequest::default()
        };
        let state = self
            .client
            .state(Context::default(), &request)
            .await
            .expect("answers");
        state.status.enum_value().expect("is known")
    }

    async fn event(&mut self) -> Envelope {
        tokio::time::timeout(Duration::from_secs(20), self.events.recv())
            .await
            .expect("arrives")
            .expect("arrives")
    }

    async fn topics(&mut self, count: usize) -> Vec<String> {
        let mut topics = Vec::new();
        for _ in 0..count {
            topics.push(self.event().await.topic);
        }
        topics
    }

    /// Creates a task whose guest does not come up yet.
    async fn begin_create(&self, id: &str) -> tokio::task::JoinHandle<ttrpc::Result<()>> {
        let request = self.bundle(id, &spec(&["sleep"]));
        let client = self.client.clone();
        let creating =
            tokio::spawn(
                async move { client.create(Context::default(), &request).await.map(drop) },
            );
        self.until(&format!("hooks of {id}")).await;
        creating
    }

    /// Waits until the host has done something.
    async fn until(&self, what: &str) {
        let done = async {
            while !self.did(what) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), done)
            .await
            .expect("is done");
    }

    fn did(&self, what: &str) -> bool {
        self.journal
            .lock()
            .expect("unpoisoned")
            .iter()
            .any(|entry| entry == what)
    }

    fn reader(&self, id: &str, fifo: &str) -> tokio::task::JoinHandle<Vec<u8>> {
        let path = self.directory.path().join("bundles").join(id).join(fifo);
        let mut fifo = tokio::net::unix::pipe::OpenOptions::new()
            .open_receiver(path)
            .expect("opens");
        tokio::spawn(async move {
            let mut bytes = Vec::new();
            fifo.read_to_end(&mut bytes).await.expect("reads");
            bytes
        })
    }
}

fn spec(arguments: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "hostname": "h",
        "process": {"args": arguments},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}
        ]},
    })
}

fn sandbox() -> Value {
    let mut spec = spec(&["/pause"]);
    spec["annotations"] = json!({"io.kubernetes.cri.container-type": "sandbox"});
    spec
}

fn member(sandbox_id: &str, sandbox_pid: u32, arguments: &[&str]) -> Value {
    let mut spec = spec(arguments);
    spec["annotations"] = json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": sandbox_id,
    });
    let shared = ["network", "ipc", "uts"].map(|kind| {
        let name = if kind == "network" { "net" } else { kind };
        json!({"type": kind, "path": format!("/proc/{sandbox_pid}/ns/{name}")})
    });
    spec["linux"]["namespaces"] = json!([{"type": "pid"}, shared[0], shared[1], shared[2]]);
    spec
}

fn refused<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        other => panic!("is not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn life_of_a_lone_container_is_told_in_order_and_leaves_nothing() {
    let mut world = World::new("c").await;
    let pid = world
        .create("c", &spec(&["exit", "42"]))
        .await
        .expect("creates");
    assert_eq!(world.status("c").await, Status::CREATED);
    assert_eq!(world.start("c").await.expect("starts"), pid);
    assert_eq!(world.wait("c").await.exit_status, 42);
    assert_eq!(world.status("c").await, Status::STOPPED);
    let deleted = world.delete("c").await.expect("deletes");
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 42));
    assert_eq!(world.topics(2).await, ["/tasks/create", "/tasks/start"]);
    let exit = TaskExit::parse_from_bytes(&world.event().await.event.value).expect("is an exit");
    assert_eq!(
        (exit.pid, exit.exit_status, exit.id.as_str()),
        (pid, 42, "c")
    );
    assert_eq!(world.topics(1).await, ["/tasks/delete"]);

    let journal = world.journal.lock().expect("unpoisoned").clone();
    assert_eq!(
        journal,
        [
            "start VM",
            "network New",
            "add c",
            "stand-in of c starts",
            "hooks of c",
            "stand-in of c ends",
            "record c 42",
            "remove c",
            "destroy",
        ]
    );
    let pod = world
        .guest
        .pod
        .lock()
        .expect("unpoisoned")
        .clone()
        .expect("was made");
    assert_eq!((pod.pod_id.as_str(), pod.hostname.as_str()), ("c", "h"));
    assert!(world.shim.shutdown().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_just_before_the_end_reaches_the_client_whole() {
    const BYTES: usize = 20_000_000;
    let world = World::new("c").await;
    world
        .create("c", &spec(&["fill", &BYTES.to_string()]))
        .await
        .expect("creates");
    let client = world.reader("c", "out");
    world.start("c").await.expect("starts");
    assert_eq!(world.wait("c").await.exit_status, 0);
    // The client sees the end before it deletes, as containerd's does.
    assert_eq!(client.await.expect("ends").len(), BYTES);
    world.delete("c").await.expect("deletes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn input_is_echoed_and_ends_with_close_io() {
    let world = World::new("c").await;
    world.create("c", &spec(&["cat"])).await.expect("creates");
    let client = world.reader("c", "out");
    world.start("c").await.expect("starts");
    let path = world.directory.path().join("bundles/c/in");
    tokio::task::spawn_blocking(move || std::fs::write(path, "hi\n").expect("writes"))
        .await
        .expect("ends");
    let request = CloseIORequest {
        id: "c".to_owned(),
        stdin: true,
        ..CloseIORequest::default()
    };
    world
        .client
        .close_io(Context::default(), &request)
        .await
        .expect("closes");
    assert_eq!(world.wait("c").await.exit_status, 0);
    assert_eq!(client.await.expect("ends"), b"hi\n");
    world.delete("c").await.expect("deletes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pod_outlives_each_of_its_containers() {
    let world = World::new("box").await;
    let sandbox_pid = world.create("box", &sandbox()).await.expect("creates");
    world.start("box").await.expect("starts");
    for id in ["a", "b"] {
        world
            .create(id, &member("box", sandbox_pid, &["sleep"]))
            .await
            .expect("creates");
        world.start(id).await.expect("starts");
    }
    world.kill("a", 15).await.expect("kills");
    assert_eq!(world.wait("a").await.exit_status, 143);
    world.delete("a").await.expect("deletes");
    assert!(!world.shim.shutdown().await);
    assert_eq!(world.status("b").await, Status::RUNNING);
    world
        .create("c", &member("box", sandbox_pid, &["exit", "0"]))
        .await
        .expect("creates");
    assert!(!world.did("destroy"));
    // The sandbox has no process in the guest, and ends as pause does.
    assert!(
        !world
            .guest
            .specs
            .lock()
            .expect("unpoisoned")
            .contains_key("box")
    );
    world.kill("b", 9).await.expect("kills");
    world.wait("b").await;
    world.kill("box", 15).await.expect("kills");
    assert_eq!(world.wait("box").await.exit_status, 0);
    for id in ["b", "c", "box"] {
        assert!(!world.did("destroy"));
        world.delete(id).await.expect("deletes");
    }
    assert!(world.did("destroy"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn death_of_the_vm_ends_its_tasks_with_the_reason() {
    let mut world = World::new("c").await;
    world.create("c", &spec(&["sleep"])).await.expect("creates");
    let client = world.reader("c", "err");
    world.start("c").await.expect("starts");
    world.guest.die("the guest's kernel panicked");
    assert_eq!(world.wait("c").await.exit_status, 255);
    assert_eq!(
        client.await.expect("ends"),
        b"bulkhead: the guest's kernel panicked\n"
    );
    assert_eq!(
        world.topics(3).await,
        ["/tasks/create", "/tasks/start", "/tasks/exit"]
    );
    let (code, message) = refused(world.kill("c", 9).await);
    assert_eq!(code, Code::NOT_FOUND, "{message}");
    assert_eq!(world.delete("c").await.expect("deletes").exit_status, 255);
    assert!(world.did("destroy"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_that_the_agent_refuses_says_why_and_leaves_nothing() {
    let world = World::new("c").await;
    let (code, message) = refused(world.create("c", &spec(&["missing"])).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        message.ends_with("missing: no such file in the container"),
        "{message}"
    );
    assert!(world.did("remove c") && world.did("destroy"));
    assert_eq!(refused(world.start("c").await).0, Code::NOT_FOUND);
    assert!(world.shim.shutdown().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delete_of_a_task_never_started_tells_its_end() {
    let mut world = World::new("c").await;
    world.create("c", &spec(&["sleep"])).await.expect("creates");
    assert_eq!(world.delete("c").await.expect("deletes").exit_status, 137);
    assert_eq!(
        world.topics(3).await,
        ["/tasks/create", "/tasks/exit", "/tasks/delete"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_calls_are_refused_with_containerds_codes() {
    let world = World::new("c").await;
    assert_eq!(refused(world.start("c").await).0, Code::NOT_FOUND);
    let mut checkpoint = world.bundle("c", &spec(&["sleep"]));
    checkpoint.checkpoint = "/somewhere".to_owned();
    let (code, message) = refused(world.client.create(Context::default(), &checkpoint).await);
    assert!(
        code == Code::INVALID_ARGUMENT && message.contains("checkpoint"),
        "{message}"
    );
    std::fs::remove_dir_all(world.directory.path().join("bundles")).expect("removes");

    world.create("c", &spec(&["sleep"])).await.expect("creates");
    std::fs::remove_dir_all(world.directory.path().join("bundles")).expect("removes");
    assert_eq!(
        refused(world.create("c", &spec(&["sleep"])).await).0,
        Code::ALREADY_EXISTS
    );
    let (code, message) = refused(world.create("d", &spec(&["sleep"])).await);
    assert!(
        code == Code::INVALID_ARGUMENT && message.contains("pod d"),
        "{message}"
    );
    for (id, expected) in [("d", Code::NOT_FOUND), ("c", Code::UNIMPLEMENTED)] {
        let mut checkpoint = CheckpointTaskRequest::default();
        id.clone_into(&mut checkpoint.id);
        let answer = world.client.checkpoint(Context::default(), &checkpoint);
        assert_eq!(refused(answer.await).0, expected);
    }
    world.start("c").await.expect("starts");
    assert_eq!(refused(world.start("c").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(
        refused(world.delete("c").await).0,
        Code::FAILED_PRECONDITION
    );
    let mut exec = KillRequest::default();
    (exec.id, exec.exec_id) = ("c".to_owned(), "e".to_owned());
    assert_eq!(
        refused(world.client.kill(Context::default(), &exec).await).0,
        Code::NOT_FOUND
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarted_containerd_finds_its_tasks() {
    let world = World::new("c").await;
    let pid = world.create("c", &spec(&["sleep"])).await.expect("creates");
    for (id, task_pid) in [("c", pid), ("unknown", 0)] {
        let request = ConnectRequest {
            id: id.to_owned(),
            ..ConnectRequest::default()
        };
        let answer = world
            .client
            .connect(Context::default(), &request)
            .await
            .expect("never fails");
        assert_eq!(answer.task_pid, task_pid);
    }
    let request = PidsRequest {
        id: "c".to_owned(),
        ..PidsRequest::default()
    };
    let pids = world
        .client
        .pids(Context::default(), &request)
        .await
        .expect("answers");
    assert_eq!(
        pids.processes
            .iter()
            .map(|process| process.pid)
            .collect::<Vec<_>>(),
        [pid]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn task_service_v2_is_the_same_service() {
    let world = World::new("c").await;
    world.create("c", &spec(&["sleep"])).await.expect("creates");
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let state = StateRequest {
            id: "c".to_owned(),
            ..StateRequest::default()
        };
        let request = ttrpc::Request {
            service: service.to_owned(),
            method: "State".to_owned(),
            payload: state.write_to_bytes().expect("encodes"),
            ..ttrpc::Request::default()
        };
        world.raw.request(request).await.expect("answers");
    }
    let request = ShutdownRequest::default();
    world
        .client
        .shutdown(Context::default(), &request)
        .await
        .expect("is always fine");
    assert_eq!(world.status("c").await, Status::CREATED);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shim_that_nobody_shuts_down_leaves_after_its_pod() {
    let world = World::new("c").await;
    world.create("c", &spec(&["sleep"])).await.expect("creates");
    let linger = Duration::from_millis(10);
    let shim = Arc::clone(&world.shim);
    let mut done = tokio::spawn(async move { shim.done(linger).await });
    let early = tokio::time::timeout(10 * linger, &mut done).await;
    assert!(early.is_err(), "it stays while it has a task");
    world.delete("c").await.expect("deletes");
    let left = tokio::time::timeout(Duration::from_secs(20), done).await;
    left.expect("leaves").expect("is no panic");
}
