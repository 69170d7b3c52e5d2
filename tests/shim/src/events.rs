//! containerd's ear: the events service that shims publish to.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Events, create_events};
use protobuf::Message;
use tokio::sync::watch;
use ttrpc::r#async::{Server, TtrpcContext};

/// One event, as far as scenarios look at it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// As in "/tasks/start".
    pub topic: String,
    /// The namespace that it was published in.
    pub namespace: String,
    /// The container.
    pub container: String,
    /// The process: the exec's id, or of an init's exit the container's.
    pub process: String,
    /// The process's pid; 0 where the event has none.
    pub pid: u32,
    /// Of an exit or a deletion.
    pub status: u32,
}

impl Event {
    fn parse(envelope: &Envelope) -> protobuf::Result<Self> {
        let bytes = envelope.event.value.as_slice();
        let event = Self {
            topic: envelope.topic.clone(),
            namespace: envelope.namespace.clone(),
            ..Self::default()
        };
        Ok(match envelope.topic.as_str() {
            "/tasks/create" => {
                let told = TaskCreate::parse_from_bytes(bytes)?;
                Self {
                    container: told.container_id,
                    pid: told.pid,
                    ..event
                }
            }
            "/tasks/start" => {
                let told = TaskStart::parse_from_bytes(bytes)?;
                Self {
                    container: told.container_id,
                    pid: told.pid,
                    ..event
                }
            }
            "/tasks/exec-added" => {
                let told = TaskExecAdded::parse_from_bytes(bytes)?;
                Self {
                    container: told.container_id,
                    process: told.exec_id,
                    ..event
                }
            }
            "/tasks/exec-started" => {
                let told = TaskExecStarted::parse_from_bytes(bytes)?;
                Self {
                    container: told.container_id,
                    process: told.exec_id,
                    pid: told.pid,
                    ..event
                }
            }
            "/tasks/exit" => {
                let told = TaskExit::parse_from_bytes(bytes)?;
                Self {
                    container: told.container_id,
                    process: told.id,
                    pid: told.pid,
                    status: told.exit_status,
                    ..event
                }
            }
            "/tasks/delete" => {
                let told = TaskDelete::parse_from_bytes(bytes)?;
                Self {
                    container: told.container_id,
                    process: told.id,
                    pid: told.pid,
                    status: told.exit_status,
                    ..event
                }
            }
            "/tasks/paused" => {
                let told = TaskPaused::parse_from_bytes(bytes)?;
                Self {
                    container: told.container_id,
                    ..event
                }
            }
            "/tasks/resumed" => {
                let told = TaskResumed::parse_from_bytes(bytes)?;
                Self {
                    container: told.container_id,
                    ..event
                }
            }
            "/tasks/oom" => {
                let told = TaskOOM::parse_from_bytes(bytes)?;
                Self {
                    container: told.container_id,
                    ..event
                }
            }
            _ => event,
        })
    }
}

/// Listens for the events of any number of shims, and keeps them in the order
/// in which they came.
pub struct Sink {
    heard: Arc<Heard>,
    /// Serves while it lives.
    _server: Server,
}

struct Heard {
    events: Mutex<Vec<Event>>,
    count: watch::Sender<usize>,
}

impl Heard {
    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Service(Arc<Heard>);

#[async_trait]
impl Events for Service {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let event = Event::parse(&request.envelope).map_err(|error| {
            let status = ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, error.to_string());
            ttrpc::Error::RpcStatus(status)
        })?;
        let mut events = self.0.events();
        events.push(event);
        self.0.count.send_replace(events.len());
        Ok(Empty::new())
    }
}

impl Sink {
    /// Listens on a socket of this path.
    ///
    /// # Errors
    /// When it cannot be made.
    pub async fn listen(socket: &Path) -> Result<Self> {
        let heard = Arc::new(Heard {
            events: Mutex::default(),
            count: watch::Sender::new(0),
        });
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .with_context(|| format!("listen on {}", socket.display()))?
            .register_service(create_events(Arc::new(Service(Arc::clone(&heard)))));
        server.start().await.context("serve events")?;
        Ok(Self {
            heard,
            _server: server,
        })
    }

    /// The events of a container so far.
    pub fn of(&self, container: &str) -> Vec<Event> {
        let events = self.heard.events();
        let own = events.iter().filter(|event| event.container == container);
        own.cloned().collect()
    }

    /// Waits for an event of a container and returns all of its events then.
    ///
    /// # Errors
    /// When it does not come within `patience`.
    pub async fn wait_for(
        &self,
        container: &str,
        topic: &str,
        patience: Duration,
    ) -> Result<Vec<Event>> {
        let mut count = self.heard.count.subscribe();
        let found = async {
            loop {
                count.borrow_and_update();
                let events = self.of(container);
                if events.iter().any(|event| event.topic == topic) {
                    return events;
                }
                if count.changed().await.is_err() {
                    return events;
                }
            }
        };
        match tokio::time::timeout(patience, found).await {
            Ok(events) => Ok(events),
            Err(_) => bail!("no {topic} of {container} came: {:?}", self.of(container)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::shim_async::{Client, EventsClient};
    use protobuf::MessageField;
    use protobuf::well_known_types::any::Any;
    use ttrpc::context;

    fn envelope(topic: &str, event: &impl Message) -> ForwardRequest {
        ForwardRequest {
            envelope: MessageField::some(Envelope {
                namespace: "n".to_owned(),
                topic: topic.to_owned(),
                event: MessageField::some(Any {
                    value: event.write_to_bytes().expect("encodes"),
                    ..Any::default()
                }),
                ..Envelope::default()
            }),
            ..ForwardRequest::default()
        }
    }

    #[tokio::test]
    async fn sink_tells_a_containers_events_in_their_order() {
        let directory = tempfile::tempdir().expect("makes a directory");
        let socket = directory.path().join("sink");
        let sink = Sink::listen(&socket).await.expect("listens");
        let address = format!("unix://{}", socket.display());
        let connected = Client::connect(&address).await.expect("connects");
        let client = EventsClient::new(connected);
        for container in ["a", "b"] {
            let start = TaskStart {
                container_id: container.to_owned(),
                pid: 7,
                ..TaskStart::default()
            };
            let exit = TaskExit {
                container_id: container.to_owned(),
                id: "e".to_owned(),
                exit_status: 3,
                ..TaskExit::default()
            };
            for request in [
                envelope("/tasks/start", &start),
                envelope("/tasks/exit", &exit),
            ] {
                let answer = client.forward(context::with_timeout(0), &request).await;
                answer.expect("is taken");
            }
        }
        let events = sink
            .wait_for("b", "/tasks/exit", Duration::from_secs(5))
            .await
            .expect("came");
        let topics: Vec<_> = events.iter().map(|event| event.topic.as_str()).collect();
        assert_eq!(topics, ["/tasks/start", "/tasks/exit"]);
        assert_eq!((events[0].pid, events[1].status), (7, 3));
        assert_eq!(events[1].process, "e");
        let missing = sink.wait_for("b", "/tasks/delete", Duration::ZERO).await;
        missing.expect_err("never came");
    }
}
