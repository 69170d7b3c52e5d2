//! What containerd is told, in order: one queue, one sender, sent again after
//! containerd has been away.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{MessageField, MessageFull};
use tokio::sync::watch;
use tracing::{debug, warn};
use ttrpc::{Code, context};

/// Most events kept while containerd is away; the oldest go first. A pod makes
/// four for each container it runs.
const MAX_QUEUED: usize = 4096;
/// One attempt; containerd answers at once when it is there.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses between attempts while containerd does not answer.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How often an event is sent that containerd answers with an error, about half
/// a minute's worth: its exchange may not be up yet, but one event must not hold
/// up the others for ever.
const MAX_REFUSALS: u32 = 12;

/// One thing to tell.
#[derive(Clone, Debug)]
pub enum Event {
    /// A task was created.
    Create(TaskCreate),
    /// Its program runs.
    Start(TaskStart),
    /// A further process was created in it.
    ExecAdded(TaskExecAdded),
    /// That process's program runs.
    ExecStarted(TaskExecStarted),
    /// The program of one of its processes has ended.
    Exit(TaskExit),
    /// The OOM killer has ended a process of it.
    Oom(TaskOOM),
    /// It is paused.
    Paused(TaskPaused),
    /// It runs again.
    Resumed(TaskResumed),
    /// It was deleted.
    Delete(TaskDelete),
}

impl Event {
    fn topic(&self) -> &'static str {
        match self {
            Self::Create(_) => topics::TASK_CREATE_EVENT_TOPIC,
            Self::Start(_) => topics::TASK_START_EVENT_TOPIC,
            Self::ExecAdded(_) => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            Self::ExecStarted(_) => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Self::Exit(_) => topics::TASK_EXIT_EVENT_TOPIC,
            Self::Oom(_) => topics::TASK_OOM_EVENT_TOPIC,
            Self::Paused(_) => topics::TASK_PAUSED_EVENT_TOPIC,
            Self::Resumed(_) => topics::TASK_RESUMED_EVENT_TOPIC,
            Self::Delete(_) => topics::TASK_DELETE_EVENT_TOPIC,
        }
    }

    fn to_any(&self) -> Any {
        match self {
            Self::Create(event) => any(event),
            Self::Start(event) => any(event),
            Self::ExecAdded(event) => any(event),
            Self::ExecStarted(event) => any(event),
            Self::Exit(event) => any(event),
            Self::Oom(event) => any(event),
            Self::Paused(event) => any(event),
            Self::Resumed(event) => any(event),
            Self::Delete(event) => any(event),
        }
    }
}

/// containerd's type URLs are bare names, without a host.
fn any<M: MessageFull>(message: &M) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        value: message
            .write_to_bytes()
            .expect("a message without required fields encodes"),
        ..Any::default()
    }
}

/// A time as the messages carry it.
pub fn timestamp(ns: i64) -> Timestamp {
    const NS_PER_S: i64 = 1_000_000_000;
    Timestamp {
        seconds: ns.div_euclid(NS_PER_S),
        nanos: i32::try_from(ns.rem_euclid(NS_PER_S)).unwrap_or(0),
        ..Timestamp::default()
    }
}

/// The host's time in nanoseconds since the epoch.
pub fn now_ns() -> i64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|elapsed| i64::try_from(elapsed.as_nanos()).ok())
        .unwrap_or(0)
}

/// The way to containerd's ears. Clones share one queue.
#[derive(Clone, Debug)]
pub struct Events {
    namespace: Arc<str>,
    queue: Arc<Mutex<VecDeque<Envelope>>>,
    /// How many wait, for who waits for them.
    waiting: Arc<watch::Sender<usize>>,
}

impl Events {
    /// Starts to send events of `namespace` to containerd's ttrpc socket, a
    /// path or `unix://` address.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(ttrpc_address: &str, namespace: &str) -> Self {
        let address = if ttrpc_address.contains("://") {
            ttrpc_address.to_owned()
        } else {
            format!("unix://{ttrpc_address}")
        };
        let events = Self {
            namespace: namespace.into(),
            queue: Arc::default(),
            waiting: Arc::new(watch::Sender::new(0)),
        };
        tokio::spawn(send(
            address,
            Arc::clone(&events.queue),
            Arc::downgrade(&events.waiting),
            events.waiting.subscribe(),
        ));
        events
    }

    /// Queues an event. Never blocks.
    pub fn publish(&self, event: &Event) {
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(now_ns())),
            namespace: self.namespace.to_string(),
            topic: event.topic().to_owned(),
            event: MessageField::some(event.to_any()),
            ..Envelope::default()
        };
        let mut queue = locked(&self.queue);
        if queue.len() == MAX_QUEUED
            && let Some(lost) = queue.pop_front()
        {
            warn!(
                topic = lost.topic,
                "containerd has not taken {MAX_QUEUED} events; the oldest is lost"
            );
        }
        queue.push_back(envelope);
        self.waiting.send_replace(queue.len());
    }

    /// Waits until everything is sent, at most `bound`.
    pub async fn flush(&self, bound: Duration) {
        let mut waiting = self.waiting.subscribe();
        let empty = waiting.wait_for(|waiting| *waiting == 0);
        if tokio::time::timeout(bound, empty).await.is_err() {
            warn!(
                events = locked(&self.queue).len(),
                "containerd did not take the last events"
            );
        }
    }
}

fn locked(queue: &Mutex<VecDeque<Envelope>>) -> MutexGuard<'_, VecDeque<Envelope>> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends from the front of the queue; an event leaves it only once containerd
/// has answered. Ends with the last [`Events`].
async fn send(
    address: String,
    queue: Arc<Mutex<VecDeque<Envelope>>>,
    left: std::sync::Weak<watch::Sender<usize>>,
    mut waiting: watch::Receiver<usize>,
) {
    let mut client = None;
    let mut pause = FIRST_PAUSE;
    let mut refusals = 0;
    while waiting.wait_for(|waiting| *waiting > 0).await.is_ok() {
        let Some(envelope) = locked(&queue).front().cloned() else {
            continue;
        };
        let again = match forward(&address, &mut client, envelope.clone()).await {
            Ok(()) => false,
            Err(ttrpc::Error::RpcStatus(status)) => {
                refusals += 1;
                let lost = gives_up(status.code(), refusals);
                if lost {
                    warn!(
                        topic = envelope.topic,
                        "containerd refused an event: {}", status.message
                    );
                }
                !lost
            }
            Err(error) => {
                debug!("containerd does not take events, trying again: {error}");
                client = None;
                true
            }
        };
        if again {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            continue;
        }
        (pause, refusals) = (FIRST_PAUSE, 0);
        let mut queue = locked(&queue);
        // The front may have been dropped for room meanwhile.
        if queue.front() == Some(&envelope) {
            queue.pop_front();
        }
        if let Some(left) = left.upgrade() {
            left.send_replace(queue.len());
        }
    }
}

/// Whether an event that was refused so often is not sent again: it is wrong, or
/// nobody there takes events, or the others have waited for long enough.
fn gives_up(code: Code, refusals: u32) -> bool {
    match code {
        Code::INVALID_ARGUMENT | Code::NOT_FOUND | Code::UNIMPLEMENTED => true,
        _ => refusals >= MAX_REFUSALS,
    }
}

async fn forward(
    address: &str,
    client: &mut Option<EventsClient>,
    envelope: Envelope,
) -> ttrpc::Result<()> {
    let client = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    let request = ForwardRequest {
        envelope: MessageField::some(envelope),
        ..ForwardRequest::default()
    };
    let timeout_ns = i64::try_from(FORWARD_TIMEOUT.as_nanos()).unwrap_or(i64::MAX);
    client
        .forward(context::with_timeout(timeout_ns), &request)
        .await
        .map(drop)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events as EventsService, create_events};
    use protobuf::Message;
    use tokio::sync::mpsc;
    use ttrpc::r#async::{Server, TtrpcContext};

    /// containerd's side of the events service.
    struct Listener {
        received: mpsc::UnboundedSender<Envelope>,
        /// What to answer first.
        refusals: Mutex<VecDeque<Code>>,
    }

    #[async_trait]
    impl EventsService for Listener {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let refusal = self.refusals.lock().expect("unpoisoned").pop_front();
            if let Some(code) = refusal {
                let status = ttrpc::get_status(code, "not now");
                return Err(ttrpc::Error::RpcStatus(status));
            }
            let _ = self.received.send(request.envelope.unwrap_or_default());
            Ok(Empty::new())
        }
    }

    pub(crate) async fn listen(address: &str) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        refuse_first(address, &[]).await
    }

    async fn refuse_first(
        address: &str,
        refusals: &[Code],
    ) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let listener = Listener {
            received: sender,
            refusals: Mutex::new(refusals.iter().copied().collect()),
        };
        let mut server = Server::new()
            .bind(address)
            .expect("binds")
            .register_service(create_events(Arc::new(listener)));
        server.start().await.expect("starts");
        (server, receiver)
    }

    fn exit(number: u32) -> Event {
        Event::Exit(TaskExit {
            container_id: "c".to_owned(),
            exit_status: number,
            ..TaskExit::default()
        })
    }

    #[tokio::test]
    async fn publish_before_containerd_listens_arrives_in_order_later() {
        let directory = tempfile::tempdir().expect("makes a directory");
        let address = format!("unix://{}/ttrpc", directory.path().display());
        let events = Events::start(&address, "k8s.io");
        for number in 0..50 {
            events.publish(&exit(number));
        }
        let (_server, mut received) = listen(&address).await;
        for number in 0..50 {
            let envelope = received.recv().await.expect("arrives");
            let any = envelope.event.unwrap_or_default();
            assert_eq!(envelope.namespace, "k8s.io");
            assert_eq!(envelope.topic, "/tasks/exit");
            assert_eq!(any.type_url, "containerd.events.TaskExit");
            let event = TaskExit::parse_from_bytes(&any.value).expect("decodes");
            assert_eq!(event.exit_status, number);
        }
        events.flush(Duration::from_secs(5)).await;
        assert_eq!(locked(&events.queue).len(), 0);
    }

    #[tokio::test]
    async fn publish_across_a_restart_of_containerd_loses_nothing() {
        let directory = tempfile::tempdir().expect("makes a directory");
        let path = directory.path().join("ttrpc");
        let address = format!("unix://{}", path.display());
        let (mut server, mut received) = listen(&address).await;
        let events = Events::start(&address, "default");
        events.publish(&exit(1));
        received.recv().await.expect("arrives");
        server.shutdown().await.expect("shuts down");
        std::fs::remove_file(&path).expect("removes the socket");
        events.publish(&exit(2));
        let (_server, mut received) = listen(&address).await;
        let envelope = received.recv().await.expect("arrives after the restart");
        let event = TaskExit::parse_from_bytes(&envelope.event.value).expect("decodes");
        assert_eq!(event.exit_status, 2);
    }

    #[tokio::test]
    async fn publish_refused_for_now_is_sent_again_and_for_good_is_dropped() {
        let directory = tempfile::tempdir().expect("makes a directory");
        let address = format!("unix://{}/ttrpc", directory.path().display());
        let refusals = [Code::UNAVAILABLE, Code::INTERNAL, Code::NOT_FOUND];
        let (_server, mut received) = refuse_first(&address, &refusals[..2]).await;
        let events = Events::start(&address, "default");
        events.publish(&exit(1));
        let status = |envelope: Envelope| {
            let event = TaskExit::parse_from_bytes(&envelope.event.value);
            event.expect("decodes").exit_status
        };
        assert_eq!(status(received.recv().await.expect("arrives")), 1);

        let address = format!("unix://{}/other", directory.path().display());
        let (_server, mut received) = refuse_first(&address, &refusals[2..]).await;
        let events = Events::start(&address, "default");
        events.publish(&exit(2));
        events.publish(&exit(3));
        assert_eq!(status(received.recv().await.expect("arrives")), 3);
    }

    #[test]
    fn gives_up_at_once_on_what_is_wrong_and_late_on_what_may_pass() {
        assert!(gives_up(Code::INVALID_ARGUMENT, 1));
        assert!(!gives_up(Code::INTERNAL, MAX_REFUSALS - 1));
        assert!(gives_up(Code::INTERNAL, MAX_REFUSALS));
    }

    #[tokio::test]
    async fn publish_beyond_the_bound_drops_the_oldest() {
        let events = Events::start("unix:///nonexistent/ttrpc", "default");
        for number in 0..=u32::try_from(MAX_QUEUED).expect("fits") {
            events.publish(&exit(number));
        }
        let queue = locked(&events.queue);
        assert_eq!(queue.len(), MAX_QUEUED);
        let first = TaskExit::parse_from_bytes(&queue[0].event.value).expect("decodes");
        assert_eq!(first.exit_status, 1);
    }

    #[test]
    fn timestamp_before_the_epoch_keeps_nanos_positive() {
        let time = timestamp(-1);
        assert_eq!((time.seconds, time.nanos), (-1, 999_999_999));
    }
}
