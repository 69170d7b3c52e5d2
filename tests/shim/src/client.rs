//! The task service of a shim, version 2 or 3, as containerd calls it.

use std::time::Duration;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use thiserror::Error;

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{method}: {code}: {message}")]
pub struct Refusal {
    /// As in "Start".
    pub method: String,
    /// The status code's name; `TIMEOUT` or `TRANSPORT` when there was none.
    pub code: String,
    /// The shim's words.
    pub message: String,
}

/// What is called that.
pub type Answer<T> = Result<T, Refusal>;

/// The code of an answer, `OK` included.
pub fn code<T>(answer: &Answer<T>) -> String {
    match answer {
        Ok(_) => "OK".to_owned(),
        Err(refusal) => refusal.code.clone(),
    }
}

/// A process of a shim's: a task's init when `exec` is empty.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The task.
    pub id: &'a str,
    /// The exec.
    pub exec: &'a str,
}

impl<'a> Target<'a> {
    /// The init of a task.
    pub fn init(id: &'a str) -> Self {
        Self { id, exec: "" }
    }
}

/// A connection to a shim. Clones share it.
#[derive(Clone)]
pub struct Client {
    inner: ttrpc::r#async::Client,
    service: &'static str,
    patience: Duration,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Client({})", self.service)
    }
}

impl Client {
    /// Connects to a shim that offers version `version` of the task service. A
    /// call that takes longer than `patience` has failed.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn connect(address: &str, version: i32, patience: Duration) -> ttrpc::Result<Self> {
        Ok(Self {
            inner: ttrpc::r#async::Client::connect(address).await?,
            service: if version >= 3 {
                "containerd.task.v3.Task"
            } else {
                "containerd.task.v2.Task"
            },
            patience,
        })
    }

    async fn call<T: Message>(&self, method: &str, request: &impl Message) -> Answer<T> {
        let refusal = |code: &str, message: String| Refusal {
            method: method.to_owned(),
            code: code.to_owned(),
            message,
        };
        let request = ttrpc::Request {
            service: self.service.to_owned(),
            method: method.to_owned(),
            payload: request.write_to_bytes().expect("a message encodes"),
            ..ttrpc::Request::default()
        };
        let answered = tokio::time::timeout(self.patience, self.inner.request(request)).await;
        match answered {
            Ok(Ok(response)) => T::parse_from_bytes(&response.payload)
                .map_err(|error| refusal("TRANSPORT", error.to_string())),
            Ok(Err(ttrpc::Error::RpcStatus(status))) => {
                let code = format!("{:?}", status.code());
                Err(refusal(&code, status.message))
            }
            Ok(Err(error)) => Err(refusal("TRANSPORT", error.to_string())),
            Err(_) => Err(refusal(
                "TIMEOUT",
                format!("no answer in {:?}", self.patience),
            )),
        }
    }

    /// Create.
    pub async fn create(&self, request: &CreateTaskRequest) -> Answer<CreateTaskResponse> {
        self.call("Create", request).await
    }

    /// Start.
    pub async fn start(&self, target: Target<'_>) -> Answer<StartResponse> {
        let request = StartRequest {
            id: target.id.to_owned(),
            exec_id: target.exec.to_owned(),
            ..StartRequest::default()
        };
        self.call("Start", &request).await
    }

    /// State.
    pub async fn state(&self, target: Target<'_>) -> Answer<StateResponse> {
        let request = StateRequest {
            id: target.id.to_owned(),
            exec_id: target.exec.to_owned(),
            ..StateRequest::default()
        };
        self.call("State", &request).await
    }

    /// Wait.
    pub async fn wait(&self, target: Target<'_>) -> Answer<WaitResponse> {
        let request = WaitRequest {
            id: target.id.to_owned(),
            exec_id: target.exec.to_owned(),
            ..WaitRequest::default()
        };
        self.call("Wait", &request).await
    }

    /// Kill, of one process or of all its container's.
    pub async fn kill(&self, target: Target<'_>, signal: u32, all: bool) -> Answer<Empty> {
        let request = KillRequest {
            id: target.id.to_owned(),
            exec_id: target.exec.to_owned(),
            signal,
            all,
            ..KillRequest::default()
        };
        self.call("Kill", &request).await
    }

    /// Delete.
    pub async fn delete(&self, target: Target<'_>) -> Answer<DeleteResponse> {
        let request = DeleteRequest {
            id: target.id.to_owned(),
            exec_id: target.exec.to_owned(),
            ..DeleteRequest::default()
        };
        self.call("Delete", &request).await
    }

    /// Exec; it is added, not started.
    pub async fn exec(&self, request: &ExecProcessRequest) -> Answer<Empty> {
        self.call("Exec", request).await
    }

    /// `ResizePty`, in characters.
    pub async fn resize(&self, target: Target<'_>, width: u32, height: u32) -> Answer<Empty> {
        let request = ResizePtyRequest {
            id: target.id.to_owned(),
            exec_id: target.exec.to_owned(),
            width,
            height,
            ..ResizePtyRequest::default()
        };
        self.call("ResizePty", &request).await
    }

    /// `CloseIO` of standard input.
    pub async fn close_stdin(&self, target: Target<'_>) -> Answer<Empty> {
        let request = CloseIORequest {
            id: target.id.to_owned(),
            exec_id: target.exec.to_owned(),
            stdin: true,
            ..CloseIORequest::default()
        };
        self.call("CloseIO", &request).await
    }

    /// Pause.
    pub async fn pause(&self, id: &str) -> Answer<Empty> {
        let request = PauseRequest {
            id: id.to_owned(),
            ..PauseRequest::default()
        };
        self.call("Pause", &request).await
    }

    /// Resume.
    pub async fn resume(&self, id: &str) -> Answer<Empty> {
        let request = ResumeRequest {
            id: id.to_owned(),
            ..ResumeRequest::default()
        };
        self.call("Resume", &request).await
    }

    /// Checkpoint.
    pub async fn checkpoint(&self, id: &str, path: &str) -> Answer<Empty> {
        let request = CheckpointTaskRequest {
            id: id.to_owned(),
            path: path.to_owned(),
            ..CheckpointTaskRequest::default()
        };
        self.call("Checkpoint", &request).await
    }

    /// Update with `linux.resources` of an OCI runtime configuration.
    pub async fn update(&self, id: &str, resources: &str) -> Answer<Empty> {
        let request = UpdateTaskRequest {
            id: id.to_owned(),
            resources: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
                    .to_owned(),
                value: resources.as_bytes().to_vec(),
                ..Any::default()
            }),
            ..UpdateTaskRequest::default()
        };
        self.call("Update", &request).await
    }

    /// Stats.
    pub async fn stats(&self, id: &str) -> Answer<StatsResponse> {
        let request = StatsRequest {
            id: id.to_owned(),
            ..StatsRequest::default()
        };
        self.call("Stats", &request).await
    }

    /// Pids.
    pub async fn pids(&self, id: &str) -> Answer<PidsResponse> {
        let request = PidsRequest {
            id: id.to_owned(),
            ..PidsRequest::default()
        };
        self.call("Pids", &request).await
    }

    /// Connect.
    pub async fn connect_task(&self, id: &str) -> Answer<ConnectResponse> {
        let request = ConnectRequest {
            id: id.to_owned(),
            ..ConnectRequest::default()
        };
        self.call("Connect", &request).await
    }

    /// Shutdown.
    pub async fn shutdown(&self, id: &str) -> Answer<Empty> {
        let request = ShutdownRequest {
            id: id.to_owned(),
            ..ShutdownRequest::default()
        };
        self.call("Shutdown", &request).await
    }
}
