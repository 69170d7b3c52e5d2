//! What the agent in the guest, and the monitor before it, answer to the shim:
//! any bytes where a line, a ttrpc frame or a message is expected, and any values
//! in messages that are right in their form.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use agent_protocol::PROTOCOL_VERSION;
use agent_protocol::api::stream_header::Kind;
use agent_protocol::api::{
    AdjustTimeResponse, ContainerStatsResponse, HelloResponse, HugeTlbStat, Metrics, ProcessId,
    WaitProcessResponse,
};
use arbitrary::{Result, Unstructured};
use protobuf::{Message, MessageField};
use shim::pod::agent::{Agent, Error};
use shim::pod::vsock::Vsock;
use tokio::runtime::{Builder, Runtime};
use tokio::task::spawn_blocking;

/// The monitor's lines on the connection for calls and on that for a stream.
const ACCEPTED: [&str; 2] = ["OK 1024\n", "OK 1025\n"];
/// A ttrpc frame's header: length, stream, type, flags.
const FRAME_HEADER: usize = 10;
const TYPE_RESPONSE: u8 = 2;
/// Longer than any answer takes: all of them are written before they are read.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest error that is told to containerd, with its operation.
const MAX_ERROR_BYTES: usize = 5000;

thread_local! {
    static RUNTIME: RefCell<Option<Runtime>> = const { RefCell::new(None) };
}

/// Tries one input.
pub fn run(data: &[u8]) {
    let directory = tempfile::tempdir().expect("directory");
    let socket = directory.path().join("s");
    RUNTIME.with_borrow_mut(|runtime| {
        let runtime = runtime.get_or_insert_with(|| {
            let builder = &mut Builder::new_current_thread();
            builder.enable_all().build().expect("runtime")
        });
        runtime.block_on(async {
            let called = tokio::time::timeout(PATIENCE, call(data, &socket));
            called.await.expect("an answer or its end is there");
        });
    });
}

/// Calls what a pod's life consists of, as far as the answers let it.
async fn call(data: &[u8], socket: &Path) {
    let (vsock, listener) = Vsock::listen(socket).expect("listens");
    let mut answers = Unstructured::new(data);
    let script = Script::new(&mut answers).unwrap_or_default();
    // Awaited, not joined: the client closes its connections meanwhile.
    let server = spawn_blocking(move || serve(&listener, script));
    let process = ProcessId {
        container_id: "c".to_owned(),
        ..ProcessId::default()
    };
    let outcome = async {
        let agent = Agent::connect(vsock).await?;
        let exit = agent.wait(&process).await?;
        assert!(exit.status <= 255, "an exit status that no process has");
        agent.stats("c").await?;
        agent.adjust_time(0, PATIENCE).await?;
        agent.start(&process).await?;
        agent.open_stream(&process, Kind::STDOUT).await.map(drop)
    };
    if let Err(error) = outcome.await {
        check_error(&error);
    }
    // The listener's end: it may still wait for a stream.
    let _ = UnixStream::connect(socket);
    let _ = UnixStream::connect(socket);
    server.await.expect("the server's thread");
}

/// Whoever reads an error did not choose to run what the guest says.
fn check_error(error: &Error) {
    let text = error.to_string();
    assert!(
        text.len() <= MAX_ERROR_BYTES,
        "an error of {} bytes",
        text.len()
    );
    let harmless = |character: char| !character.is_control();
    assert!(text.chars().all(harmless), "{text:?}");
    let _ = error.code();
}

/// What is said on each connection.
#[derive(Default)]
struct Script {
    lines: [Vec<u8>; 2],
    /// One for each call, in turn.
    frames: VecDeque<Frame>,
    stream: Vec<u8>,
}

enum Frame {
    /// As it is.
    Raw(Vec<u8>),
    /// The right header, and this.
    Response(Vec<u8>),
}

impl Script {
    fn new(input: &mut Unstructured<'_>) -> Result<Self> {
        let form: u8 = input.arbitrary()?;
        let mut lines = ACCEPTED.map(|line| line.as_bytes().to_vec());
        if form & 0xe0 == 0xe0 {
            lines[usize::from(form) % 2] = some_bytes(input)?;
        }
        let mut frames = VecDeque::new();
        for call in 0..5 {
            frames.push_back(frame(call, input)?);
        }
        Ok(Self {
            lines,
            frames,
            stream: some_bytes(input)?,
        })
    }
}

fn some_bytes(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let length = usize::from(input.arbitrary::<u8>()?).min(input.len());
    Ok(input.bytes(length)?.to_vec())
}

/// Words of any length, short ones most of the time.
fn words(input: &mut Unstructured<'_>) -> Result<String> {
    let bytes = some_bytes(input)?;
    let times = if input.arbitrary::<u8>()? == 0xff {
        200
    } else {
        1
    };
    Ok(String::from_utf8_lossy(&bytes).repeat(times))
}

fn frame(call: usize, input: &mut Unstructured<'_>) -> Result<Frame> {
    let form: u8 = input.arbitrary()?;
    if form & 0xf0 == 0xf0 {
        return Ok(Frame::Raw(some_bytes(input)?));
    }
    let mut response = ttrpc::Response::new();
    if form & 0xf0 == 0xe0 {
        return Ok(Frame::Response(some_bytes(input)?));
    }
    if form & 0xf0 == 0xd0 {
        let mut status = ttrpc::Status::new();
        status.code = protobuf::EnumOrUnknown::from_i32(input.arbitrary()?);
        status.message = words(input)?;
        response.status = MessageField::some(status);
    }
    response.payload = if form & 0xf0 == 0xc0 {
        some_bytes(input)?
    } else {
        payload(call, form, input)?
    };
    Ok(Frame::Response(response.write_to_bytes().expect("encodes")))
}

/// A message of the right type with any values.
fn payload(call: usize, form: u8, input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let bytes = match call {
        0 => HelloResponse {
            protocol_version: if form & 7 == 7 {
                input.arbitrary()?
            } else {
                PROTOCOL_VERSION
            },
            agent_version: words(input)?,
            kernel_release: words(input)?,
            container_ids: vec![words(input)?; usize::from(form % 8)],
            ..HelloResponse::default()
        }
        .write_to_bytes(),
        1 => WaitProcessResponse {
            exit_status: input.arbitrary()?,
            exited_at_ns: input.arbitrary()?,
            oom_kills: input.arbitrary()?,
            ..WaitProcessResponse::default()
        }
        .write_to_bytes(),
        2 => ContainerStatsResponse {
            metrics: MessageField::some(Metrics {
                hugetlb: vec![
                    HugeTlbStat {
                        pagesize: words(input)?,
                        current: input.arbitrary()?,
                        ..HugeTlbStat::default()
                    };
                    usize::from(form % 8)
                ],
                ..Metrics::default()
            }),
            ..ContainerStatsResponse::default()
        }
        .write_to_bytes(),
        3 => AdjustTimeResponse {
            realtime_ns: input.arbitrary()?,
            ..AdjustTimeResponse::default()
        }
        .write_to_bytes(),
        _ => Ok(Vec::new()),
    };
    Ok(bytes.expect("encodes"))
}

/// The monitor and the agent behind it: one connection for calls, one stream.
fn serve(listener: &UnixListener, mut script: Script) {
    let lines = std::mem::take(&mut script.lines);
    for (index, line) in lines.into_iter().enumerate() {
        let Ok((mut stream, _)) = listener.accept() else {
            return;
        };
        // The greeting, or the end of somebody who does not say it.
        let _ = read_line(&mut stream);
        // After any other line nobody is there: a client would wait for more of it.
        if stream.write_all(&line).is_err() || line != ACCEPTED[index].as_bytes() {
            continue;
        }
        if index == 0 {
            answer(&mut stream, &mut script.frames);
        } else {
            let _ = stream.write_all(&script.stream);
        }
    }
}

fn read_line(stream: &mut UnixStream) -> std::io::Result<()> {
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte != *b"\n" {}
    Ok(())
}

/// Answers each request with the next frame; after the last, nobody is there.
fn answer(stream: &mut UnixStream, frames: &mut VecDeque<Frame>) {
    while let Some(frame) = frames.pop_front() {
        let mut header = [0; FRAME_HEADER];
        if stream.read_exact(&mut header).is_err() {
            return;
        }
        let number = |at: usize| {
            let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_be_bytes(bytes)
        };
        let mut request = vec![0; number(0) as usize];
        if stream.read_exact(&mut request).is_err() {
            return;
        }
        let (bytes, goes_on) = match frame {
            Frame::Raw(bytes) => (bytes, false),
            Frame::Response(body) => {
                let mut bytes = (body.len() as u32).to_be_bytes().to_vec();
                bytes.extend(number(4).to_be_bytes());
                bytes.extend([TYPE_RESPONSE, 0]);
                bytes.extend(body);
                (bytes, true)
            }
        };
        // After bytes that are no frame, nothing is an answer to anything.
        if stream.write_all(&bytes).is_err() || !goes_on {
            return;
        }
    }
}
