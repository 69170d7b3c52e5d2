//! A guest without a VM: an agent behind the socket that a monitor would
//! serve, whose containers are a few lines of async code.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_protocol::api::{
    AdjustTimeRequest, AdjustTimeResponse, ContainerStatsRequest, ContainerStatsResponse,
    CreateContainerRequest, CreateContainerResponse, CreatePodRequest, CreatePodResponse,
    DeleteProcessRequest, DeleteProcessResponse, ExecProcessRequest, ExecProcessResponse,
    FitMemoryRequest, FitMemoryResponse, HelloRequest, HelloResponse, Metrics,
    PauseContainerRequest, PauseContainerResponse, ProcessId, ResizeTerminalRequest,
    ResizeTerminalResponse, ResumeContainerRequest, ResumeContainerResponse, SetCpusRequest,
    SetCpusResponse, SetSysctlsRequest, SetSysctlsResponse, ShutdownRequest, ShutdownResponse,
    SignalProcessRequest, SignalProcessResponse, StartProcessRequest, StartProcessResponse,
    UpdateContainerRequest, UpdateContainerResponse, WaitProcessRequest, WaitProcessResponse,
    stream_header::Kind,
};
use agent_protocol::service::{Agent, create_agent};
use agent_protocol::{
    AGENT_PORT, PROTOCOL_VERSION, STREAM_ACCEPTED, STREAM_PORT, decode_stream_header,
};
use async_trait::async_trait;
use protobuf::MessageField;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use ttrpc::r#async::{Server, TtrpcContext};
use vmm_config::control::Request;

use crate::events::now_ns;
use crate::pod::machine::{End, State, Watcher};

/// What the tests call a process: `CONTAINER`, or `CONTAINER/EXEC`.
pub fn name(process: &ProcessId) -> String {
    if process.exec_id.is_empty() {
        process.container_id.clone()
    } else {
        format!("{}/{}", process.container_id, process.exec_id)
    }
}

type Streams = HashMap<(String, i32), UnixStream>;

pub struct Program {
    arguments: Vec<String>,
    status: watch::Sender<Option<u32>>,
}

/// What the agent was told, and what runs.
pub struct Guest {
    streams: Mutex<Streams>,
    pub programs: Mutex<HashMap<String, Arc<Program>>>,
    pub specs: Mutex<HashMap<String, Value>>,
    pub pod: Mutex<Option<CreatePodRequest>>,
    /// The sizes that the VM's memory was to have, in MiB.
    pub memory_sizes: watch::Sender<Vec<u32>>,
    /// What the monitor and the agent did about vCPUs.
    pub vcpus: watch::Sender<Vec<String>>,
    /// How often the agent has fitted its containers to it.
    pub fits: AtomicU32,
    /// Of the pod.
    pub sysctls: Mutex<HashMap<String, String>>,
    /// What an update asked for last.
    pub limits: Mutex<Option<Value>>,
    pub paused: Mutex<HashSet<String>>,
    /// Whose terminal was resized, and to which width and height.
    pub sizes: Mutex<Vec<(String, u32, u32)>>,
    pub vm: Mutex<Option<watch::Sender<State>>>,
    /// Whether the guest may become ready.
    pub may_boot: watch::Sender<bool>,
    /// How far its clock is ahead of the host's.
    pub clock_ahead_ns: Mutex<i64>,
    /// The same when its first container was created.
    pub ahead_at_create_ns: watch::Sender<Option<i64>>,
}

impl Guest {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            streams: Mutex::default(),
            programs: Mutex::default(),
            specs: Mutex::default(),
            pod: Mutex::default(),
            memory_sizes: watch::Sender::new(Vec::new()),
            vcpus: watch::Sender::new(Vec::new()),
            fits: AtomicU32::new(0),
            sysctls: Mutex::default(),
            limits: Mutex::default(),
            paused: Mutex::default(),
            sizes: Mutex::default(),
            vm: Mutex::default(),
            may_boot: watch::Sender::new(true),
            clock_ahead_ns: Mutex::default(),
            ahead_at_create_ns: watch::Sender::new(None),
        })
    }

    fn note_vcpus(&self, what: String) {
        self.vcpus.send_modify(|done| done.push(what));
    }

    /// Boots on the monitor's listener.
    pub fn boot(self: &Arc<Self>, listener: OwnedFd, watcher: Watcher, directory: PathBuf) {
        let Watcher {
            state,
            memory_mib,
            mut stop,
            mut changes,
        } = watcher;
        *self.vm.lock().expect("unpoisoned") = Some(state);
        let guest = Arc::clone(self);
        let stopped = Arc::clone(self);
        let changed = Arc::clone(self);
        tokio::spawn(async move {
            while let Some(change) = changes.recv().await {
                match change.request {
                    Request::ResizeMemory { size_mib } => {
                        changed
                            .memory_sizes
                            .send_modify(|sizes| sizes.push(size_mib));
                        let _ = change.answer.send(Ok(size_mib));
                        memory_mib.send_replace(size_mib);
                    }
                    Request::ResizeVcpus { count } => {
                        changed.note_vcpus(format!("made {count}"));
                        let _ = change.answer.send(Ok(count.into()));
                    }
                    _ => {}
                }
            }
        });
        tokio::spawn(async move {
            while let Some(reason) = stop.recv().await {
                stopped.die(&reason);
            }
        });
        tokio::spawn(async move {
            let agent_socket = directory.join("agent.sock");
            let mut server = Server::new()
                .bind(&format!("unix://{}", agent_socket.display()))
                .expect("binds")
                .register_service(create_agent(Arc::new(Rpc(Arc::clone(&guest)))));
            server.start().await.expect("serves");
            let listener = std::os::unix::net::UnixListener::from(listener);
            listener.set_nonblocking(true).expect("is a socket");
            let listener = UnixListener::from_std(listener).expect("registers");
            let mut may_boot = guest.may_boot.subscribe();
            may_boot.wait_for(|may| *may).await.expect("is told");
            if let Some(state) = &*guest.vm.lock().expect("unpoisoned") {
                state.send_if_modified(|state| {
                    let booting = *state == State::Booting;
                    if booting {
                        *state = State::Ready;
                    }
                    booting
                });
            }
            while let Ok((stream, _)) = listener.accept().await {
                let (guest, agent_socket) = (Arc::clone(&guest), agent_socket.clone());
                tokio::spawn(async move { guest.serve(stream, agent_socket).await });
            }
        });
    }

    /// The VM ends, and with it every stream.
    pub fn die(&self, reason: &str) {
        self.streams.lock().expect("unpoisoned").clear();
        if let Some(state) = self.vm.lock().expect("unpoisoned").take() {
            state.send_replace(State::Ended(End {
                reason: reason.to_owned(),
            }));
        }
    }

    async fn serve(&self, stream: UnixStream, agent_socket: PathBuf) {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).await.expect("reads");
        let port: u32 = line
            .trim()
            .strip_prefix("CONNECT ")
            .expect("a port")
            .parse()
            .expect("a number");
        stream
            .write_all(format!("OK {port}\n").as_bytes())
            .await
            .expect("writes");
        assert!(stream.buffer().is_empty());
        let mut stream = stream.into_inner();
        match port {
            AGENT_PORT => {
                let mut agent = UnixStream::connect(agent_socket).await.expect("connects");
                let _ = copy_bidirectional(&mut stream, &mut agent).await;
            }
            STREAM_PORT => {
                let length = stream.read_u16().await.expect("reads");
                let mut header = vec![0; usize::from(length)];
                stream.read_exact(&mut header).await.expect("reads");
                let header = decode_stream_header(&header).expect("is a header");
                stream.write_u8(STREAM_ACCEPTED).await.expect("writes");
                let key = (name(&header.process), header.kind.value());
                self.streams.lock().expect("unpoisoned").insert(key, stream);
            }
            port => panic!("nobody listens on port {port}"),
        }
    }

    fn stream(&self, id: &str, kind: Kind) -> Option<UnixStream> {
        self.streams
            .lock()
            .expect("unpoisoned")
            .remove(&(id.to_owned(), kind as i32))
    }

    fn program(&self, id: &str) -> ttrpc::Result<Arc<Program>> {
        let programs = self.programs.lock().expect("unpoisoned");
        programs
            .get(id)
            .cloned()
            .ok_or_else(|| status(ttrpc::Code::NOT_FOUND, "no such container"))
    }

    /// `exit N`, `fill N` (bytes to stdout), `cat`, `sleep`.
    async fn run(&self, id: &str, arguments: &[String]) -> Option<u32> {
        let number = || arguments[1].parse::<u32>().expect("a number");
        match arguments[0].as_str() {
            "exit" => Some(number()),
            "fill" => {
                let mut stdout = self.stream(id, Kind::STDOUT).expect("is connected");
                stdout
                    .write_all(&vec![b'x'; number() as usize])
                    .await
                    .expect("writes");
                Some(0)
            }
            "cat" => {
                let mut stdin = self.stream(id, Kind::STDIN).expect("is connected");
                let mut stdout = self.stream(id, Kind::STDOUT).expect("is connected");
                tokio::io::copy(&mut stdin, &mut stdout)
                    .await
                    .expect("copies");
                Some(0)
            }
            "sleep" => None,
            other => panic!("no program {other}"),
        }
    }

    /// It ends, and with an init every exec.
    fn end(&self, id: &str, program: &Program, exit_status: u32) {
        let execs = format!("{id}/");
        let programs = self.programs.lock().expect("unpoisoned").clone();
        for (exec, program) in programs.iter().filter(|(id, _)| id.starts_with(&execs)) {
            self.end(exec, program, 137);
        }
        self.streams
            .lock()
            .expect("unpoisoned")
            .retain(|(owner, _), _| owner != id);
        program.status.send_if_modified(|status| {
            let first = status.is_none();
            status.get_or_insert(exit_status);
            first
        });
    }
}

fn status(code: ttrpc::Code, message: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

struct Rpc(Arc<Guest>);

#[async_trait]
impl Agent for Rpc {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> ttrpc::Result<HelloResponse> {
        assert!(request.entropy.len() >= 32 && request.realtime_ns > 0);
        Ok(HelloResponse {
            protocol_version: PROTOCOL_VERSION,
            ..HelloResponse::default()
        })
    }

    async fn create_pod(
        &self,
        _: &TtrpcContext,
        request: CreatePodRequest,
    ) -> ttrpc::Result<CreatePodResponse> {
        *self.0.pod.lock().expect("unpoisoned") = Some(request);
        Ok(CreatePodResponse::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let ahead_ns = *self.0.clock_ahead_ns.lock().expect("unpoisoned");
        self.0.ahead_at_create_ns.send_if_modified(|at_create| {
            at_create.get_or_insert(ahead_ns);
            true
        });
        let spec: Value = serde_json::from_slice(&request.spec_json).expect("is JSON");
        let arguments: Vec<String> =
            serde_json::from_value(spec["process"]["args"].clone()).expect("has arguments");
        if arguments[0] == "missing" {
            return Err(status(
                ttrpc::Code::INVALID_ARGUMENT,
                "missing: no such file in the container",
            ));
        }
        let program = Program {
            arguments,
            status: watch::Sender::new(None),
        };
        let id = request.container_id;
        self.0
            .specs
            .lock()
            .expect("unpoisoned")
            .insert(id.clone(), spec);
        self.0
            .programs
            .lock()
            .expect("unpoisoned")
            .insert(id, Arc::new(program));
        Ok(CreateContainerResponse::new())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        let process: Value = serde_json::from_slice(&request.process_json).expect("is JSON");
        let arguments: Vec<String> =
            serde_json::from_value(process["args"].clone()).expect("has arguments");
        if arguments[0] == "missing" {
            return Err(status(
                ttrpc::Code::INVALID_ARGUMENT,
                "missing: no such file in the container",
            ));
        }
        self.0.program(&request.process.container_id)?;
        let program = Program {
            arguments,
            status: watch::Sender::new(None),
        };
        let mut programs = self.0.programs.lock().expect("unpoisoned");
        programs.insert(name(&request.process), Arc::new(program));
        Ok(ExecProcessResponse::new())
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: PauseContainerRequest,
    ) -> ttrpc::Result<PauseContainerResponse> {
        self.0.program(&request.container_id)?;
        let mut paused = self.0.paused.lock().expect("unpoisoned");
        paused.insert(request.container_id);
        Ok(PauseContainerResponse::new())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ResumeContainerRequest,
    ) -> ttrpc::Result<ResumeContainerResponse> {
        let mut paused = self.0.paused.lock().expect("unpoisoned");
        paused.remove(&request.container_id);
        Ok(ResumeContainerResponse::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<UpdateContainerResponse> {
        self.0.program(&request.container_id)?;
        let resources = serde_json::from_slice(&request.linux_resources_json).expect("is JSON");
        *self.0.limits.lock().expect("unpoisoned") = Some(resources);
        Ok(UpdateContainerResponse::new())
    }

    async fn set_sysctls(
        &self,
        _: &TtrpcContext,
        request: SetSysctlsRequest,
    ) -> ttrpc::Result<SetSysctlsResponse> {
        *self.0.sysctls.lock().expect("unpoisoned") = request.sysctls;
        Ok(SetSysctlsResponse::new())
    }

    async fn set_cpus(
        &self,
        _: &TtrpcContext,
        request: SetCpusRequest,
    ) -> ttrpc::Result<SetCpusResponse> {
        self.0.note_vcpus(format!("online {}", request.count));
        Ok(SetCpusResponse::new())
    }

    async fn fit_memory(
        &self,
        _: &TtrpcContext,
        _: FitMemoryRequest,
    ) -> ttrpc::Result<FitMemoryResponse> {
        self.0.fits.fetch_add(1, Ordering::Relaxed);
        Ok(FitMemoryResponse::new())
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerStatsRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        self.0.program(&request.container_id)?;
        let mut metrics = Metrics::new();
        metrics.pids.mut_or_insert_default().current = 3;
        metrics.cpu.mut_or_insert_default().usage_usec = 1_500_000;
        metrics.memory.mut_or_insert_default().usage = 4096;
        metrics.memory.mut_or_insert_default().usage_limit = u64::MAX;
        metrics.memory_events.mut_or_insert_default().oom_kill = 1;
        Ok(ContainerStatsResponse {
            metrics: MessageField::some(metrics),
            ..ContainerStatsResponse::default()
        })
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<ResizeTerminalResponse> {
        let size = (name(&request.process), request.width, request.height);
        self.0.sizes.lock().expect("unpoisoned").push(size);
        Ok(ResizeTerminalResponse::new())
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: StartProcessRequest,
    ) -> ttrpc::Result<StartProcessResponse> {
        let id = name(&request.process);
        let program = self.0.program(&id)?;
        if program.arguments[0] == "unstartable" {
            return Err(status(
                ttrpc::Code::INVALID_ARGUMENT,
                "unstartable: permission denied",
            ));
        }
        let guest = Arc::clone(&self.0);
        let running = tokio::spawn(async move {
            if let Some(status) = guest.run(&id, &program.arguments).await {
                guest.end(&id, &program, status);
            }
        });
        // A program that is this quick ends before Start is answered.
        if self.0.program(&name(&request.process))?.arguments[0] == "exit" {
            running.await.expect("ends");
        }
        Ok(StartProcessResponse::new())
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<SignalProcessResponse> {
        let id = &name(&request.process);
        self.0.end(id, &*self.0.program(id)?, 128 + request.signal);
        Ok(SignalProcessResponse::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let program = self.0.program(&name(&request.process))?;
        let mut exit = program.status.subscribe();
        let exit_status = exit
            .wait_for(Option::is_some)
            .await
            .expect("is told")
            .unwrap_or_default();
        Ok(WaitProcessResponse {
            exit_status,
            exited_at_ns: now_ns(),
            oom_kills: u64::from(program.arguments.last().is_some_and(|last| last == "oom")),
            ..WaitProcessResponse::default()
        })
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: DeleteProcessRequest,
    ) -> ttrpc::Result<DeleteProcessResponse> {
        let id = &name(&request.process);
        if let Ok(program) = self.0.program(id)
            && program
                .arguments
                .last()
                .is_some_and(|last| last == "undeletable")
        {
            return Err(status(ttrpc::Code::INTERNAL, "device or resource busy"));
        }
        if let Ok(program) = self.0.program(id) {
            self.0.end(id, &program, 137);
        }
        let mut programs = self.0.programs.lock().expect("unpoisoned");
        programs.retain(|program, _| program != id && !program.starts_with(&format!("{id}/")));
        Ok(DeleteProcessResponse::new())
    }

    async fn adjust_time(
        &self,
        _: &TtrpcContext,
        request: AdjustTimeRequest,
    ) -> ttrpc::Result<AdjustTimeResponse> {
        if request.adjust_ns != 0 {
            // Long enough for whoever does not wait for it to be seen.
            let mut at_create = self.0.ahead_at_create_ns.subscribe();
            let created = at_create.wait_for(Option::is_some);
            let _ = tokio::time::timeout(Duration::from_millis(200), created).await;
        }
        let mut ahead_ns = self.0.clock_ahead_ns.lock().expect("unpoisoned");
        let realtime_ns = now_ns() + *ahead_ns;
        *ahead_ns += request.adjust_ns;
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
        self.0.die("the guest powered off");
        Ok(ShutdownResponse::new())
    }
}
