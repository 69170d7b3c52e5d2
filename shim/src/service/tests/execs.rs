//! Processes besides a container's init.

use super::*;

use containerd_shim_protos::api::{
    PauseRequest, ProcessInfo, ResizePtyRequest, ResumeRequest, StateResponse, StatsRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted};
use protobuf::well_known_types::any::Any;

impl World {
    /// A running container `c`, whose events have been heard.
    async fn with_sleeper() -> Self {
        let mut world = Self::new("c").await;
        world.create("c", &spec(&["sleep"])).await.expect("creates");
        world.start("c").await.expect("starts");
        assert_eq!(world.topics(2).await, ["/tasks/create", "/tasks/start"]);
        world
    }

    async fn exec(&self, id: &str, exec_id: &str, arguments: &[&str]) -> ttrpc::Result<()> {
        let directory = self.directory.path().join("bundles").join(id);
        let fifo = |name: &str| {
            let path = directory.join(format!("{exec_id}-{name}"));
            // There already when it is asked for again.
            let _ = rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into());
            path.display().to_string()
        };
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdin: fifo("in"),
            stdout: fifo("out"),
            stderr: fifo("err"),
            spec: protobuf::MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: json!({"args": arguments, "cwd": "/"}).to_string().into(),
                ..Any::default()
            }),
            ..ExecProcessRequest::default()
        };
        let asked = self.client.exec(Context::default(), &request);
        asked.await.map(drop)
    }

    async fn start_exec(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..StartRequest::default()
        };
        let started = self.client.start(Context::default(), &request);
        started.await.map(|response| response.pid)
    }

    async fn run_exec(&self, id: &str, exec_id: &str, arguments: &[&str]) -> u32 {
        self.exec(id, exec_id, arguments).await.expect("execs");
        self.start_exec(id, exec_id).await.expect("starts")
    }

    async fn wait_exec(&self, id: &str, exec_id: &str) -> u32 {
        let request = WaitRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..WaitRequest::default()
        };
        let waited = self.client.wait(Context::default(), &request);
        waited.await.expect("waits").exit_status
    }

    async fn kill_exec(&self, id: &str, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            ..KillRequest::default()
        };
        let killed = self.client.kill(Context::default(), &request);
        killed.await.map(drop)
    }

    async fn delete_exec(&self, id: &str, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..DeleteRequest::default()
        };
        self.client.delete(Context::default(), &request).await
    }

    async fn state_of(&self, id: &str, exec_id: &str) -> StateResponse {
        let request = StateRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..StateRequest::default()
        };
        let state = self.client.state(Context::default(), &request);
        state.await.expect("answers")
    }

    async fn pids(&self, id: &str) -> Vec<ProcessInfo> {
        let request = PidsRequest {
            id: id.to_owned(),
            ..PidsRequest::default()
        };
        let pids = self.client.pids(Context::default(), &request);
        pids.await.expect("answers").processes
    }

    async fn exit(&mut self) -> TaskExit {
        let envelope = self.event().await;
        assert_eq!(envelope.topic, "/tasks/exit");
        TaskExit::parse_from_bytes(&envelope.event.value).expect("is an exit")
    }

    fn count(&self, what: &str) -> usize {
        let journal = self.journal.lock().expect("unpoisoned");
        journal.iter().filter(|entry| *entry == what).count()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn life_of_an_exec_is_told_in_order_and_leaves_its_container_alone() {
    let mut world = World::with_sleeper().await;
    world.exec("c", "e", &["exit", "7"]).await.expect("execs");
    let state = world.state_of("c", "e").await;
    assert_eq!(state.status.enum_value(), Ok(Status::CREATED));
    assert!(state.id == "e" && state.stdout.ends_with("e-out"));
    let pid = world.start_exec("c", "e").await.expect("starts");
    assert_eq!(state.pid, pid);
    assert_eq!(world.wait_exec("c", "e").await, 7);
    let state = world.state_of("c", "e").await;
    assert_eq!(state.status.enum_value(), Ok(Status::STOPPED));
    assert_eq!(state.exit_status, 7);
    let deleted = world.delete_exec("c", "e").await.expect("deletes");
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 7));
    assert_eq!(
        refused(world.delete_exec("c", "e").await).0,
        Code::NOT_FOUND
    );

    let added = world.event().await;
    assert_eq!(added.topic, "/tasks/exec-added");
    let added = TaskExecAdded::parse_from_bytes(&added.event.value).expect("decodes");
    assert_eq!((&*added.container_id, &*added.exec_id), ("c", "e"));
    let started = world.event().await;
    assert_eq!(started.topic, "/tasks/exec-started");
    let started = TaskExecStarted::parse_from_bytes(&started.event.value).expect("decodes");
    assert_eq!((&*started.exec_id, started.pid), ("e", pid));
    let exit = world.exit().await;
    assert_eq!((&*exit.container_id, &*exit.id), ("c", "e"));
    assert_eq!((exit.pid, exit.exit_status), (pid, 7));

    assert_eq!(world.status("c").await, Status::RUNNING);
    assert!(world.did("stand-in of c/e ends") && !world.did("stand-in of c ends"));
    assert!(!world.did("destroy") && !world.did("record c 7"));
    // Its id is free again; no event told of its deletion.
    world.exec("c", "e", &["sleep"]).await.expect("execs");
    assert_eq!(world.topics(1).await, ["/tasks/exec-added"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_reads_and_writes_its_own_streams() {
    let world = World::with_sleeper().await;
    world.exec("c", "e", &["cat"]).await.expect("execs");
    let client = world.reader("c", "e-out");
    world.start_exec("c", "e").await.expect("starts");
    let path = world.directory.path().join("bundles/c/e-in");
    tokio::task::spawn_blocking(move || std::fs::write(path, "hi\n").expect("writes"))
        .await
        .expect("ends");
    let request = CloseIORequest {
        id: "c".to_owned(),
        exec_id: "e".to_owned(),
        stdin: true,
        ..CloseIORequest::default()
    };
    let closed = world.client.close_io(Context::default(), &request);
    closed.await.expect("closes");
    assert_eq!(world.wait_exec("c", "e").await, 0);
    assert_eq!(client.await.expect("ends"), b"hi\n");
    world.delete_exec("c", "e").await.expect("deletes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pids_names_the_execs_that_live() {
    let world = World::with_sleeper().await;
    let pid = world.run_exec("c", "e", &["sleep"]).await;
    world.run_exec("c", "short", &["exit", "0"]).await;
    world.wait_exec("c", "short").await;
    let processes = world.pids("c").await;
    assert_eq!(processes.len(), 2);
    assert!(processes[0].info.is_none() && processes[1].pid == pid);
    // As Go's encoder writes containerd.runc.v1.ProcessDetails{ExecID: "e"}.
    let details = &processes[1].info;
    assert_eq!(details.type_url, "containerd.runc.v1.ProcessDetails");
    assert_eq!(details.value, b"\x0a\x01e");
    world.kill_exec("c", "e", 15).await.expect("kills");
    assert_eq!(world.wait_exec("c", "e").await, 143);
    assert_eq!(world.status("c").await, Status::RUNNING);
    assert_eq!(
        refused(world.kill_exec("c", "e", 9).await).0,
        Code::NOT_FOUND
    );
    assert_eq!(world.pids("c").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn end_of_init_is_told_after_the_end_of_every_exec() {
    let mut world = World::with_sleeper().await;
    world.run_exec("c", "e1", &["sleep"]).await;
    world.exec("c", "e2", &["sleep"]).await.expect("execs");
    world.topics(3).await;
    world.kill("c", 9).await.expect("kills");
    assert_eq!(world.wait("c").await.exit_status, 137);
    let mut exits = Vec::new();
    for _ in 0..3 {
        exits.push(world.exit().await.id);
    }
    exits[..2].sort();
    assert_eq!(exits, ["e1", "e2", "c"]);
    let (code, message) = refused(world.exec("c", "e3", &["sleep"]).await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
    assert_eq!(world.delete("c").await.expect("deletes").exit_status, 137);
    assert!(world.did("stand-in of c/e1 ends") && world.did("stand-in of c/e2 ends"));
    assert!(world.did("destroy"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn end_of_the_vm_is_told_of_execs_first_and_with_the_reason() {
    let mut world = World::with_sleeper().await;
    world.exec("c", "e", &["sleep"]).await.expect("execs");
    let client = world.reader("c", "e-err");
    world.start_exec("c", "e").await.expect("starts");
    world.topics(2).await;
    world.guest.die("the guest's kernel panicked");
    assert_eq!(world.wait("c").await.exit_status, 255);
    for id in ["e", "c"] {
        let exit = world.exit().await;
        assert_eq!((&*exit.id, exit.exit_status), (id, 255));
    }
    assert_eq!(
        client.await.expect("ends"),
        b"bulkhead: the guest's kernel panicked\n"
    );
    let deleted = world.delete_exec("c", "e").await.expect("deletes");
    assert_eq!(deleted.exit_status, 255);
    world.delete("c").await.expect("deletes");
    assert!(world.did("destroy"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_that_cannot_be_created_or_started_leaves_nothing() {
    let world = World::with_sleeper().await;
    let (code, message) = refused(world.exec("c", "e", &["missing"]).await);
    assert!(
        code == Code::INVALID_ARGUMENT && message.ends_with("no such file in the container"),
        "{message}"
    );
    assert!(world.did("stand-in of c/e ends"));
    world
        .exec("c", "e", &["unstartable"])
        .await
        .expect("its id is free");
    let (code, message) = refused(world.start_exec("c", "e").await);
    assert!(
        code == Code::INVALID_ARGUMENT && message.ends_with("permission denied"),
        "{message}"
    );
    assert!(world.count("stand-in of c/e ends") >= 2);
    let programs = world.guest.programs.lock().expect("unpoisoned").len();
    assert_eq!(programs, 1, "only init is left in the guest");
    assert_eq!(world.wait_exec("c", "e").await, 255);
    assert_eq!(
        refused(world.start_exec("c", "e").await).0,
        Code::FAILED_PRECONDITION
    );
    world.delete_exec("c", "e").await.expect("deletes");
    assert_eq!(world.pids("c").await.len(), 1);
    assert_eq!(world.status("c").await, Status::RUNNING);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delete_of_an_exec_never_started_ends_it() {
    let world = World::with_sleeper().await;
    world.exec("c", "e", &["sleep"]).await.expect("execs");
    let deleted = world.delete_exec("c", "e").await.expect("deletes");
    assert_eq!(deleted.exit_status, 137);
    assert!(world.did("stand-in of c/e ends"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_execs_are_refused_with_containerds_codes() {
    let world = World::new("box").await;
    let code = |refusal: ttrpc::Result<()>| refused(refusal).0;
    assert_eq!(
        code(world.exec("none", "e", &["sleep"]).await),
        Code::NOT_FOUND
    );
    let sandbox_pid = world.create("box", &sandbox()).await.expect("creates");
    world.start("box").await.expect("starts");
    let (refusal, message) = refused(world.exec("box", "e", &["sleep"]).await);
    assert!(
        refusal == Code::FAILED_PRECONDITION && message.contains("sandbox"),
        "{message}"
    );
    world
        .create("c", &member("box", sandbox_pid, &["sleep"]))
        .await
        .expect("creates");
    assert_eq!(
        code(world.exec("c", "e", &["sleep"]).await),
        Code::FAILED_PRECONDITION
    );
    assert!(!world.did("stand-in of c/e starts"));
    world.start("c").await.expect("starts");
    for id in ["../e", ""] {
        assert_eq!(
            code(world.exec("c", id, &["sleep"]).await),
            Code::INVALID_ARGUMENT
        );
    }
    let request = ExecProcessRequest {
        id: "c".to_owned(),
        exec_id: "e".to_owned(),
        ..ExecProcessRequest::default()
    };
    let (refusal, message) = refused(world.client.exec(Context::default(), &request).await);
    assert!(
        refusal == Code::INVALID_ARGUMENT && message.contains("spec"),
        "{message}"
    );
    world.exec("c", "e", &["sleep"]).await.expect("execs");
    // It waits to be started: nothing runs yet that a signal could end.
    assert_eq!(
        code(world.kill_exec("c", "e", 9).await),
        Code::FAILED_PRECONDITION
    );
    world.start_exec("c", "e").await.expect("starts");
    assert_eq!(
        code(world.kill_exec("c", "e", 65).await),
        Code::INVALID_ARGUMENT
    );
    world.kill_exec("c", "e", 0).await.expect("it is there");
    assert_eq!(
        code(world.exec("c", "e", &["sleep"]).await),
        Code::ALREADY_EXISTS
    );
    assert_eq!(
        refused(world.delete_exec("c", "e").await).0,
        Code::FAILED_PRECONDITION
    );
    assert_eq!(
        refused(world.start_exec("c", "other").await).0,
        Code::NOT_FOUND
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paused_task_takes_no_exec_until_it_is_resumed() {
    let mut world = World::with_sleeper().await;
    let client = world.client.clone();
    let pause = || async {
        let request = PauseRequest {
            id: "c".to_owned(),
            ..PauseRequest::default()
        };
        client.pause(Context::default(), &request).await
    };
    let resume = || async {
        let request = ResumeRequest {
            id: "c".to_owned(),
            ..ResumeRequest::default()
        };
        client.resume(Context::default(), &request).await
    };
    assert_eq!(refused(resume().await).0, Code::FAILED_PRECONDITION);
    pause().await.expect("pauses");
    assert_eq!(world.status("c").await, Status::PAUSED);
    let held = world.guest.paused.lock().expect("unpoisoned").contains("c");
    assert!(held && world.pids("c").await.len() == 1);
    assert_eq!(refused(pause().await).0, Code::FAILED_PRECONDITION);
    let (code, message) = refused(world.exec("c", "e", &["sleep"]).await);
    assert!(
        code == Code::FAILED_PRECONDITION && message.contains("paused"),
        "{message}"
    );
    resume().await.expect("resumes");
    assert_eq!(world.status("c").await, Status::RUNNING);
    assert!(world.guest.paused.lock().expect("unpoisoned").is_empty());
    assert_eq!(world.topics(2).await, ["/tasks/paused", "/tasks/resumed"]);
    pause().await.expect("pauses");
    world.kill("c", 9).await.expect("kills");
    assert_eq!(world.wait("c").await.exit_status, 137);
    assert_eq!(world.topics(2).await, ["/tasks/paused", "/tasks/exit"]);
    assert_eq!(refused(pause().await).0, Code::FAILED_PRECONDITION);
    world.delete("c").await.expect("deletes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stats_are_the_guests_until_delete_and_nothing_of_the_sandbox() {
    let world = World::new("box").await;
    let sandbox_pid = world.create("box", &sandbox()).await.expect("creates");
    let ended = member("box", sandbox_pid, &["exit", "0"]);
    world.create("c", &ended).await.expect("creates");
    world.start("c").await.expect("starts");
    world.wait("c").await;
    let stats = |id: &str| {
        let request = StatsRequest {
            id: id.to_owned(),
            ..StatsRequest::default()
        };
        let client = world.client.clone();
        async move {
            let answer = client.stats(Context::default(), &request).await?;
            assert_eq!(answer.stats.type_url, "io.containerd.cgroups.v2.Metrics");
            Ok(Metrics::parse_from_bytes(&answer.stats.value).expect("decodes"))
        }
    };
    let metrics = stats("c").await.expect("answers after the end");
    assert_eq!(
        (metrics.pids.current, metrics.cpu.usage_usec),
        (3, 1_500_000)
    );
    assert_eq!(metrics.memory.usage, 4096);
    assert_eq!(metrics.memory.usage_limit, u64::MAX);
    assert_eq!(metrics.memory_events.oom_kill, 1);
    let metrics = stats("box").await.expect("answers");
    assert!(metrics.cpu.is_some() && metrics.memory.usage == 0);
    world.delete("c").await.expect("deletes");
    assert_eq!(refused(stats("c").await).0, Code::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn update_reaches_the_guest_as_the_client_wrote_it() {
    let world = World::with_sleeper().await;
    let limits = json!({"memory": {"limit": 1_048_576}});
    world
        .update("c", &limits.to_string())
        .await
        .expect("updates");
    assert_eq!(
        *world.guest.limits.lock().expect("unpoisoned"),
        Some(limits)
    );
    for (id, value, code) in [
        ("none", "{}", Code::NOT_FOUND),
        ("c", "", Code::INVALID_ARGUMENT),
        ("c", "[]", Code::INVALID_ARGUMENT),
    ] {
        assert_eq!(refused(world.update(id, value).await).0, code);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oom_kill_is_told_before_the_exit_and_only_when_there_was_one() {
    let mut world = World::new("c").await;
    let program = spec(&["exit", "137", "oom"]);
    world.create("c", &program).await.expect("creates");
    world.start("c").await.expect("starts");
    let topics = world.topics(4).await;
    assert_eq!(
        topics,
        ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminals_of_init_and_execs_are_resized_and_the_sandbox_has_none() {
    let world = World::new("box").await;
    let sandbox_pid = world.create("box", &sandbox()).await.expect("creates");
    let member = member("box", sandbox_pid, &["sleep"]);
    world.create("c", &member).await.expect("creates");
    world.start("c").await.expect("starts");
    world.run_exec("c", "e", &["sleep"]).await;
    let resize = |id: &str, exec_id: &str, width| {
        let request = ResizePtyRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            width,
            height: 24,
            ..ResizePtyRequest::default()
        };
        let client = world.client.clone();
        async move { client.resize_pty(Context::default(), &request).await }
    };
    resize("c", "", 80).await.expect("resizes");
    resize("c", "e", 132).await.expect("resizes");
    assert_eq!(
        refused(resize("box", "", 80).await).0,
        Code::FAILED_PRECONDITION
    );
    assert_eq!(refused(resize("c", "x", 80).await).0, Code::NOT_FOUND);
    let sizes = world.guest.sizes.lock().expect("unpoisoned").clone();
    assert_eq!(
        sizes,
        [("c".to_owned(), 80, 24), ("c/e".to_owned(), 132, 24)]
    );
}
