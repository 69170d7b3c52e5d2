//! The tool's side of one session with a node's agent.

use std::collections::VecDeque;
use std::io::{self, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use node_agent::credit::Credit;
use node_agent::wire::{
    Claim, Exec, Exit, Frame, Stream, Token, WindowSize, WireError, read_frame, write_frame,
};
use node_agent::{MAX_DATA, VERSION, WINDOW};

use crate::command::NodeStatus;

/// What can go wrong in a session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The node's agent cannot be reached.
    #[error("connect to the node's agent on port {port}")]
    Connect {
        /// The loopback port.
        port: u16,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The agent refuses; the text is its own.
    #[error("the node's agent refuses: {0}")]
    Refused(String),
    /// The connection broke before the command had ended.
    #[error("the connection to the node was lost")]
    Lost,
    /// The protocol was not kept to, or the connection failed.
    #[error("session with the node's agent")]
    Wire(#[from] WireError),
}

/// Where an agent listens, and the key to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Endpoint {
    pub(crate) port: u16,
    pub(crate) token: Token,
}

impl Endpoint {
    /// Opens a session. `patience` bounds the time until the agent answers.
    pub(crate) fn open(&self, patience: Duration) -> Result<TcpStream, SessionError> {
        self.greet(&Frame::Hello(VERSION, self.token), patience)
    }

    /// Takes possession of a fresh node.
    pub(crate) fn claim(&self, claim: Claim, patience: Duration) -> Result<(), SessionError> {
        self.greet(&Frame::Claim(VERSION, Box::new(claim)), patience)
            .map(|_| ())
    }

    fn greet(&self, first: &Frame, patience: Duration) -> Result<TcpStream, SessionError> {
        let connect = || {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(patience))?;
            Ok::<_, io::Error>((stream.try_clone()?, write_frame(&mut stream, first)))
        };
        let (mut stream, sent) = connect().map_err(|source| SessionError::Connect {
            port: self.port,
            source,
        })?;
        sent?;
        match read_frame(&mut stream)? {
            Some(Frame::Welcome) => {
                stream.set_read_timeout(None).map_err(WireError::Io)?;
                Ok(stream)
            }
            Some(Frame::Refused(reason)) => Err(SessionError::Refused(reason)),
            _ => Err(SessionError::Lost),
        }
    }
}

/// What has come for one output stream and is not yet read.
#[derive(Debug, Default)]
struct Incoming {
    bytes: VecDeque<u8>,
    ended: bool,
}

#[derive(Debug, Default)]
struct State {
    pid: Option<u32>,
    stdout: Incoming,
    stderr: Incoming,
    exit: Option<Exit>,
    /// Why nothing more will come; set once.
    failure: Option<String>,
    refused: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stdin: Credit,
    outgoing: Mutex<TcpStream>,
    /// The same socket, to end it while a sender is stuck with the lock.
    socket: TcpStream,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, frame: &Frame) -> Result<(), WireError> {
        let mut stream = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        write_frame(&mut *stream, frame)
    }
}

/// A command under way in a node, in the manner of [`std::process::Child`]. Dropping it kills the command's process group.
#[derive(Debug)]
pub struct Process {
    shared: Arc<Shared>,
    /// Its standard input; drop it to end it.
    pub stdin: Option<ProcessInput>,
    /// Its standard output.
    pub stdout: Option<ProcessOutput>,
    /// Its standard error.
    pub stderr: Option<ProcessOutput>,
}

impl Process {
    pub(crate) fn start(stream: TcpStream, exec: Exec) -> Result<Self, SessionError> {
        let reader = stream.try_clone().map_err(WireError::Io)?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            stdin: Credit::default(),
            socket: stream.try_clone().map_err(WireError::Io)?,
            outgoing: Mutex::new(stream),
        });
        shared.send(&Frame::Exec(Box::new(exec)))?;
        let receiving = Arc::clone(&shared);
        thread::spawn(move || receive(&reader, &receiving));
        let process = Self {
            stdin: Some(ProcessInput(Arc::clone(&shared))),
            stdout: Some(ProcessOutput(Arc::clone(&shared), Stream::Stdout)),
            stderr: Some(ProcessOutput(Arc::clone(&shared), Stream::Stderr)),
            shared,
        };
        process.wait_until(None, |state| state.pid.is_some())?;
        Ok(process)
    }

    /// Its pid in the node.
    pub fn pid(&self) -> u32 {
        // Known since `start`.
        self.shared.lock().pid.unwrap_or_default()
    }

    /// Waits for its end. Output that nobody has read by then can still be read.
    ///
    /// # Errors
    /// [`SessionError::Lost`] when the connection broke.
    pub fn wait(&self) -> Result<NodeStatus, SessionError> {
        Ok(self
            .wait_deadline(None)?
            .unwrap_or(NodeStatus(Exit::Code(255))))
    }

    /// Waits for its end no longer than `timeout`; `None` when it still runs then.
    ///
    /// # Errors
    /// [`SessionError::Lost`] when the connection broke.
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<NodeStatus>, SessionError> {
        self.wait_deadline(Some(Instant::now() + timeout))
    }

    /// Sends a signal to its process group. After its end this does nothing.
    ///
    /// # Errors
    /// When the connection broke.
    pub fn signal(&self, number: i32) -> Result<(), SessionError> {
        Ok(self.shared.send(&Frame::Signal(number))?)
    }

    /// Tells its terminal, if it has one, a new size.
    ///
    /// # Errors
    /// When the connection broke.
    pub fn resize(&self, size: WindowSize) -> Result<(), SessionError> {
        Ok(self.shared.send(&Frame::Resize(size))?)
    }

    /// Something that can end this session from elsewhere: all that waits for the process then fails.
    pub(crate) fn cutter(&self) -> Cutter {
        Cutter(Arc::downgrade(&self.shared))
    }

    fn wait_deadline(&self, deadline: Option<Instant>) -> Result<Option<NodeStatus>, SessionError> {
        self.wait_until(deadline, |state| state.exit.is_some())?;
        Ok(self.shared.lock().exit.map(NodeStatus))
    }

    fn wait_until(
        &self,
        deadline: Option<Instant>,
        ready: impl Fn(&State) -> bool,
    ) -> Result<(), SessionError> {
        let mut state = self.shared.lock();
        while !ready(&state) && state.failure.is_none() {
            state = match deadline {
                None => self
                    .shared
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(());
                    }
                    let woken = self.shared.changed.wait_timeout(state, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        match &state.failure {
            Some(reason) if !ready(&state) && state.refused => {
                Err(SessionError::Refused(reason.clone()))
            }
            Some(_) if !ready(&state) => Err(SessionError::Lost),
            _ => Ok(()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.cutter().cut();
    }
}

/// Ends a session from outside.
#[derive(Clone, Debug)]
pub(crate) struct Cutter(Weak<Shared>);

impl Cutter {
    pub(crate) fn cut(&self) {
        if let Some(shared) = self.0.upgrade() {
            // Fails when it is closed already, which is what is wanted.
            let _ = shared.socket.shutdown(Shutdown::Both);
        }
    }

    /// Whether the session is over.
    pub(crate) fn is_over(&self) -> bool {
        self.0.strong_count() == 0
    }
}

fn receive(stream: &TcpStream, shared: &Shared) {
    let mut incoming = BufReader::with_capacity(MAX_DATA, stream);
    let mut refused = false;
    let reason = loop {
        match read_frame(&mut incoming) {
            Ok(Some(Frame::Refused(reason))) => {
                refused = true;
                break reason;
            }
            Ok(Some(frame)) => {
                if let Err(reason) = take(frame, shared) {
                    break reason;
                }
            }
            Ok(None) => break "the connection has ended".to_owned(),
            Err(error) => break error.to_string(),
        }
    };
    let mut state = shared.lock();
    state.failure = Some(reason);
    state.refused = refused;
    shared.stdin.close();
    shared.changed.notify_all();
}

fn take(frame: Frame, shared: &Shared) -> Result<(), String> {
    let mut state = shared.lock();
    match frame {
        Frame::Started(pid) => state.pid = Some(pid),
        Frame::Data(Stream::Stdout, bytes) => keep(&mut state.stdout, &bytes)?,
        Frame::Data(Stream::Stderr, bytes) => keep(&mut state.stderr, &bytes)?,
        Frame::Eof(Stream::Stdout) => state.stdout.ended = true,
        Frame::Eof(Stream::Stderr) => state.stderr.ended = true,
        Frame::Eof(Stream::Stdin) => shared.stdin.close(),
        Frame::Credit(Stream::Stdin, bytes) => {
            shared
                .stdin
                .give(bytes)
                .map_err(|error| error.to_string())?;
        }
        Frame::Exit(exit) => state.exit = Some(exit),
        other => return Err(format!("unexpected frame {other:?}")),
    }
    drop(state);
    shared.changed.notify_all();
    Ok(())
}

fn keep(incoming: &mut Incoming, bytes: &[u8]) -> Result<(), String> {
    if incoming.bytes.len() + bytes.len() > WINDOW as usize {
        return Err("more output than the window allows".to_owned());
    }
    incoming.bytes.extend(bytes);
    Ok(())
}

/// The writing end of a process's standard input.
#[derive(Debug)]
pub struct ProcessInput(Arc<Shared>);

impl Write for ProcessInput {
    /// Blocks while the command does not read. `BrokenPipe` when nobody reads any more.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let allowed = self.0.stdin.wait().ok_or(io::ErrorKind::BrokenPipe)?;
        let count = allowed.min(bytes.len());
        self.0.stdin.spend(count);
        self.0
            .send(&Frame::Data(Stream::Stdin, bytes[..count].to_vec()))
            .map_err(io::Error::other)?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ProcessInput {
    fn drop(&mut self) {
        // A process that has gone needs no end of its input.
        let _ = self.0.send(&Frame::Eof(Stream::Stdin));
    }
}

/// The reading end of a process's output. Dropped before the end, it closes the pipe, as a local one would: the command's next
/// write fails.
#[derive(Debug)]
pub struct ProcessOutput(Arc<Shared>, Stream);

impl Read for ProcessOutput {
    /// Blocks until there is something. An error when the connection broke before the stream's end.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let mut state = self.0.lock();
        let count = loop {
            let incoming = match self.1 {
                Stream::Stderr => &mut state.stderr,
                _ => &mut state.stdout,
            };
            let count = incoming.bytes.read(buffer)?;
            if count > 0 {
                break count;
            }
            if incoming.ended {
                return Ok(0);
            }
            if let Some(reason) = &state.failure {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionAborted,
                    reason.clone(),
                ));
            }
            state = self
                .0
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        // A connection that has just broken shows at the next read.
        let _ = self.0.send(&Frame::Credit(self.1, count as u32));
        Ok(count)
    }
}

impl Drop for ProcessOutput {
    fn drop(&mut self) {
        // A session that is over needs no more.
        let _ = self.0.send(&Frame::Eof(self.1));
    }
}
