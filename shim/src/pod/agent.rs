//! The agent in the guest, as the shim calls it.

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use agent_protocol::api::stream_header::Kind;
use agent_protocol::api::{
    AdjustTimeRequest, ContainerStatsRequest, CreateContainerRequest, CreatePodRequest,
    DeleteProcessRequest, ExecProcessRequest, FitMemoryRequest, HelloRequest,
    LoadApparmorPolicyRequest, Metrics, PauseContainerRequest, ProcessId, ResizeTerminalRequest,
    ResumeContainerRequest, SetCpusRequest, SetNetworkRequest, SetSysctlsRequest, ShutdownRequest,
    SignalProcessRequest, StartProcessRequest, Stdio, StreamHeader, UpdateContainerRequest,
    WaitProcessRequest, WaitProcessResponse,
};
use agent_protocol::service::AgentClient;
use agent_protocol::{
    AGENT_PORT, PROTOCOL_VERSION, STREAM_ACCEPTED, STREAM_PORT, StreamHeaderError,
    encode_stream_header,
};
use protobuf::{EnumOrUnknown, MessageField};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tracing::info;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::{self, Context};

use super::printable::printable;
use super::vsock::{self, Vsock};
use crate::events::now_ns;
use crate::task::Exit;

/// Calls that end by themselves. Generous: a guest may be busy, and a
/// container with many files to write back is.
const CALL_TIMEOUT: Duration = Duration::from_mins(2);
/// Largest status of a process that has ended (`WaitProcessResponse.exit_status`).
const MAX_EXIT_STATUS: u32 = 255;
/// Bytes of entropy for the guest (`HelloRequest.entropy`).
const ENTROPY_BYTES: usize = 64;

/// Why the agent did not do what was asked.
#[derive(Debug, Error)]
pub enum Error {
    /// It cannot be reached.
    #[error(transparent)]
    Vsock(#[from] vsock::Error),
    /// The host's generator.
    #[error("read entropy for the guest")]
    Entropy(#[source] io::Error),
    /// It refused or failed; its own words are for the user.
    #[error("{operation}: {}", message(.answer))]
    Call {
        /// As in "create the container".
        operation: &'static str,
        /// Its answer, or why there is none.
        answer: Box<ttrpc::Error>,
    },
    /// It speaks another version.
    #[error(
        "the guest's agent speaks protocol {theirs}, this shim {PROTOCOL_VERSION}: install both of one release"
    )]
    Version {
        /// As it says.
        theirs: u32,
    },
    /// A stream's header.
    #[error(transparent)]
    Header(#[from] StreamHeaderError),
    /// A stream that breaks before it begins.
    #[error("open the container's {kind:?} stream")]
    Stream {
        /// Which.
        kind: Kind,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// A stream that the agent does not want.
    #[error("the guest's agent refused the container's {kind:?} stream")]
    StreamRefused {
        /// Which.
        kind: Kind,
    },
}

impl Error {
    /// The agent's own verdict, if it is one.
    pub fn code(&self) -> Option<ttrpc::Code> {
        match self {
            Self::Call { answer, .. } => match answer.as_ref() {
                ttrpc::Error::RpcStatus(status) => Some(status.code()),
                _ => None,
            },
            _ => None,
        }
    }
}

/// The agent's words are the guest's, which may have been taken over.
fn message(error: &ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => printable(&status.message),
        error => printable(&error.to_string()),
    }
}

/// How a process ended, in values that a process can have: clients reckon with
/// the status, and a guest that has been taken over may say anything.
fn exit_of(answer: &WaitProcessResponse) -> Exit {
    Exit {
        status: answer.exit_status.min(MAX_EXIT_STATUS),
        at_ns: answer.exited_at_ns,
        last_words: None,
        oom_kills: answer.oom_kills,
    }
}

/// A connection to the agent. Clones share it.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    vsock: Vsock,
}

fn bounded(timeout: Duration) -> Context {
    context::with_timeout(i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX))
}

async fn call<T>(
    operation: &'static str,
    answer: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T, Error> {
    answer.await.map_err(|error| Error::Call {
        operation,
        answer: Box::new(error),
    })
}

impl Agent {
    /// Connects to the agent of a guest that is ready, and gives it time and
    /// entropy.
    pub async fn connect(vsock: Vsock) -> Result<Self, Error> {
        let stream = vsock.connect(AGENT_PORT).await?;
        let agent = Self {
            client: AgentClient::new(Client::new(Socket::from(stream))),
            vsock,
        };
        let mut entropy = vec![0; ENTROPY_BYTES];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut source| source.read_exact(&mut entropy))
            .map_err(Error::Entropy)?;
        let request = HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            realtime_ns: now_ns(),
            entropy,
            ..HelloRequest::default()
        };
        let hello = call(
            "greet the guest's agent",
            agent.client.hello(bounded(CALL_TIMEOUT), &request),
        )
        .await?;
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(Error::Version {
                theirs: hello.protocol_version,
            });
        }
        info!(
            agent = printable(&hello.agent_version),
            kernel = printable(&hello.kernel_release),
            "connected to the guest's agent"
        );
        Ok(agent)
    }

    /// Prepares what the pod's containers share.
    pub async fn create_pod(&self, request: &CreatePodRequest) -> Result<(), Error> {
        call(
            "prepare the pod in the guest",
            self.client.create_pod(bounded(CALL_TIMEOUT), request),
        )
        .await
        .map(drop)
    }

    /// Gives the pod the network that it has on the host.
    pub async fn set_network(&self, request: &SetNetworkRequest) -> Result<(), Error> {
        call(
            "set up the pod's network in the guest",
            self.client.set_network(bounded(CALL_TIMEOUT), request),
        )
        .await
        .map(drop)
    }

    /// Gives the guest's kernel AppArmor policy of the host's.
    pub async fn load_apparmor_policy(&self, policy: Vec<u8>) -> Result<(), Error> {
        let request = LoadApparmorPolicyRequest {
            policy,
            ..LoadApparmorPolicyRequest::default()
        };
        call(
            "load the AppArmor policy in the guest",
            self.client
                .load_apparmor_policy(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(drop)
    }

    /// Sets kernel parameters of the namespaces that the pod's containers share.
    pub async fn set_sysctls(&self, sysctls: &BTreeMap<String, String>) -> Result<(), Error> {
        let request = SetSysctlsRequest {
            sysctls: sysctls.clone().into_iter().collect(),
            ..SetSysctlsRequest::default()
        };
        call(
            "set the pod's sysctls in the guest",
            self.client.set_sysctls(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(drop)
    }

    /// Creates a container up to the point where its init waits.
    pub async fn create_container(
        &self,
        id: &str,
        bundle: &Path,
        spec_json: Vec<u8>,
        stdio: Stdio,
    ) -> Result<(), Error> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            bundle: bundle.to_string_lossy().into_owned(),
            spec_json,
            stdio: MessageField::some(stdio),
            ..CreateContainerRequest::default()
        };
        call(
            "create the container in the guest",
            self.client
                .create_container(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(drop)
    }

    /// Creates a process in a container up to the point where it waits.
    pub async fn exec(
        &self,
        process: &ProcessId,
        process_json: Vec<u8>,
        stdio: Stdio,
    ) -> Result<(), Error> {
        let request = ExecProcessRequest {
            process: MessageField::some(process.clone()),
            process_json,
            stdio: MessageField::some(stdio),
            ..ExecProcessRequest::default()
        };
        call(
            "create the process in the guest",
            self.client.exec_process(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(drop)
    }

    /// Sets the size of a process's terminal in characters.
    pub async fn resize_terminal(
        &self,
        process: &ProcessId,
        width: u32,
        height: u32,
    ) -> Result<(), Error> {
        let request = ResizeTerminalRequest {
            process: MessageField::some(process.clone()),
            width,
            height,
            ..ResizeTerminalRequest::default()
        };
        call(
            "resize the terminal",
            self.client.resize_terminal(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(drop)
    }

    /// Lets a process execute the user's program.
    pub async fn start(&self, process: &ProcessId) -> Result<(), Error> {
        let request = StartProcessRequest {
            process: MessageField::some(process.clone()),
            ..StartProcessRequest::default()
        };
        call(
            "start the program",
            self.client.start_process(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(drop)
    }

    /// Sends a signal to a process, or, by its init, to all of a container's.
    pub async fn signal(&self, process: &ProcessId, signal: u32, all: bool) -> Result<(), Error> {
        let request = SignalProcessRequest {
            process: MessageField::some(process.clone()),
            signal,
            all,
            ..SignalProcessRequest::default()
        };
        call(
            "signal the process",
            self.client.signal_process(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(drop)
    }

    /// Waits for a process to end, however long that takes.
    pub async fn wait(&self, process: &ProcessId) -> Result<Exit, Error> {
        let request = WaitProcessRequest {
            process: MessageField::some(process.clone()),
            ..WaitProcessRequest::default()
        };
        let answer = call(
            "wait for the process",
            self.client.wait_process(Context::default(), &request),
        )
        .await?;
        Ok(exit_of(&answer))
    }

    /// Ends a process and forgets it. For an init: ends what is left of its
    /// container, writes its files back, unmounts it.
    pub async fn delete(&self, process: &ProcessId) -> Result<(), Error> {
        let request = DeleteProcessRequest {
            process: MessageField::some(process.clone()),
            ..DeleteProcessRequest::default()
        };
        call(
            "delete the process in the guest",
            self.client.delete_process(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(drop)
    }

    /// Stops every process of a container and writes its files back, however
    /// long that takes: after half of it nobody would know where it stands.
    pub async fn pause(&self, container_id: &str) -> Result<(), Error> {
        let request = PauseContainerRequest {
            container_id: container_id.to_owned(),
            ..PauseContainerRequest::default()
        };
        call(
            "pause the container",
            self.client.pause_container(Context::default(), &request),
        )
        .await
        .map(drop)
    }

    /// Lets every process of a container run again.
    pub async fn resume(&self, container_id: &str) -> Result<(), Error> {
        let request = ResumeContainerRequest {
            container_id: container_id.to_owned(),
            ..ResumeContainerRequest::default()
        };
        call(
            "resume the container",
            self.client
                .resume_container(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(drop)
    }

    /// Changes limits of a container: `linux.resources` as JSON.
    pub async fn update(
        &self,
        container_id: &str,
        linux_resources_json: Vec<u8>,
    ) -> Result<(), Error> {
        let request = UpdateContainerRequest {
            container_id: container_id.to_owned(),
            linux_resources_json,
            ..UpdateContainerRequest::default()
        };
        call(
            "change the container's limits",
            self.client
                .update_container(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(drop)
    }

    /// Brings the guest's first `count` CPUs online, and the others offline.
    pub async fn set_cpus(&self, count: u8) -> Result<(), Error> {
        let request = SetCpusRequest {
            count: count.into(),
            ..SetCpusRequest::default()
        };
        call(
            "bring the guest's CPUs on- or offline",
            self.client.set_cpus(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(drop)
    }

    /// Has the guest bound its containers by the memory that it has now, which is
    /// returned in bytes.
    pub async fn fit_memory(&self) -> Result<u64, Error> {
        call(
            "fit the containers to the guest's memory",
            self.client
                .fit_memory(bounded(CALL_TIMEOUT), &FitMemoryRequest::default()),
        )
        .await
        .map(|answer| answer.total_bytes)
    }

    /// What a container uses and is limited to, also after its end.
    pub async fn stats(&self, container_id: &str) -> Result<Metrics, Error> {
        let request = ContainerStatsRequest {
            container_id: container_id.to_owned(),
            ..ContainerStatsRequest::default()
        };
        call(
            "read what the container uses",
            self.client.container_stats(bounded(CALL_TIMEOUT), &request),
        )
        .await
        .map(|answer| answer.metrics.unwrap_or_default())
    }

    /// Moves the guest's clock by `adjust_ns` and returns what it showed before.
    pub async fn adjust_time(&self, adjust_ns: i64, timeout: Duration) -> Result<i64, Error> {
        let request = AdjustTimeRequest {
            adjust_ns,
            ..AdjustTimeRequest::default()
        };
        call(
            "set the guest's clock",
            self.client.adjust_time(bounded(timeout), &request),
        )
        .await
        .map(|answer| answer.realtime_ns)
    }

    /// Ends the pod: the guest syncs and powers off.
    pub async fn shutdown(&self, timeout: Duration) -> Result<(), Error> {
        call(
            "shut the guest down",
            self.client
                .shutdown(bounded(timeout), &ShutdownRequest::new()),
        )
        .await
        .map(drop)
    }

    /// Opens one stdio stream of a process.
    pub async fn open_stream(&self, process: &ProcessId, kind: Kind) -> Result<UnixStream, Error> {
        let header = encode_stream_header(&StreamHeader {
            process: MessageField::some(process.clone()),
            kind: EnumOrUnknown::new(kind),
            ..StreamHeader::default()
        })?;
        let mut stream = self.vsock.connect(STREAM_PORT).await?;
        let failed = |source| Error::Stream { kind, source };
        stream.write_all(&header).await.map_err(failed)?;
        match stream.read_u8().await.map_err(failed)? {
            STREAM_ACCEPTED => Ok(stream),
            _ => Err(Error::StreamRefused { kind }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::printable::MAX_BYTES;
    use super::*;

    #[test]
    fn exit_of_any_answer_has_a_status_that_a_process_can_have() {
        let status = |exit_status| {
            exit_of(&WaitProcessResponse {
                exit_status,
                ..WaitProcessResponse::default()
            })
            .status
        };
        assert_eq!(
            [0, 137, 255, 256, u32::MAX].map(status),
            [0, 137, 255, 255, 255]
        );
    }

    #[test]
    fn call_error_of_a_hostile_guest_is_bounded_and_printable() {
        let words = format!("\x1b]0;owned\x07{}", "x".repeat(3 * MAX_BYTES));
        let status = ttrpc::get_status(ttrpc::Code::INTERNAL, words);
        let error = Error::Call {
            operation: "greet",
            answer: Box::new(ttrpc::Error::RpcStatus(status)),
        };
        let shown = error.to_string();
        assert!(shown.starts_with("greet: ?]0;owned?xxx"), "{shown}");
        assert!(shown.len() <= "greet: ".len() + MAX_BYTES);
    }
}
