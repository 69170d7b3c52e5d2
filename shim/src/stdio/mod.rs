//! A task's standard streams: between the places that the client names and the
//! agent's byte streams.
//!
//! FIFOs are opened at both ends, so that a client that goes away ends nothing:
//! output waits in the pipe for the next one to attach, and standard input ends
//! by `CloseIO` only.
//!
//! Standard input is opened when the program starts, not before: a client that
//! copies a short input sees its end as soon as somebody reads the FIFO, and
//! its `CloseIO` would then come while the task is still being created, when
//! containerd knows no task to close.

mod copy;
mod endpoint;
mod logger;

use std::future::Future;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_protocol::api::stream_header::Kind;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::task::Exit;

pub use copy::Sink;
pub use endpoint::{Io, LoggerCommand, Plan, PlanError, Ready, Target};
pub use logger::Logger;

/// Why the client's ends cannot be opened.
#[derive(Debug, Error)]
pub enum Error {
    /// A FIFO or file.
    #[error("open {path} as the container's {stream}")]
    Open {
        /// As in "standard output".
        stream: &'static str,
        /// As the client named it.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A logging program.
    #[error("start logging program {path}")]
    Logger {
        /// As the client named it.
        path: PathBuf,
        /// Why it does not run.
        #[source]
        source: logger::Error,
    },
}

/// The client's ends, open; not yet connected to the guest.
#[derive(Debug, Default)]
pub struct Opened {
    stdin: Option<PathBuf>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    terminal: bool,
    logger: Option<Logger>,
}

impl Opened {
    /// Opens what the plan names; standard input must be there, see above.
    pub async fn open(plan: &Plan, container_id: &str, namespace: &str) -> Result<Self, Error> {
        let mut opened = Self {
            terminal: plan.terminal,
            ..Self::default()
        };
        if let Some(path) = &plan.stdin {
            check_fifo(path).map_err(open_error("standard input", path))?;
            opened.stdin = Some(path.clone());
        }
        if let Some(command) = plan.logger() {
            let failed = |source| Error::Logger {
                path: command.path.clone(),
                source,
            };
            let (logger, stdout, stderr) = Logger::start(command, container_id, namespace)
                .await
                .map_err(failed)?;
            opened.logger = Some(logger);
            // Without a stderr of its own (a terminal) the guest must not be
            // asked for one; the program then reads its end at once.
            opened.stdout = Some(Sink::Pipe(stdout));
            opened.stderr = matches!(plan.stderr, Target::Logger(_)).then_some(Sink::Pipe(stderr));
            return Ok(opened);
        }
        opened.stdout = Sink::open(&plan.stdout, "standard output").await?;
        opened.stderr = Sink::open(&plan.stderr, "standard error").await?;
        Ok(opened)
    }

    /// Which streams the guest is asked for.
    pub fn wanted(&self) -> agent_protocol::api::Stdio {
        agent_protocol::api::Stdio {
            stdin: self.stdin.is_some(),
            stdout: self.stdout.is_some(),
            stderr: self.stderr.is_some(),
            terminal: self.terminal,
            ..Default::default()
        }
    }

    /// Connects every stream and starts to copy. `connect` opens the agent's
    /// stream of a kind; `exit` becomes `Some` when the process has ended.
    pub async fn connect<F, E>(
        self,
        connect: impl Fn(Kind) -> F,
        exit: &watch::Receiver<Option<Exit>>,
    ) -> Result<Streams, E>
    where
        F: Future<Output = Result<UnixStream, E>>,
    {
        let mut outputs = Vec::new();
        if let Some(sink) = self.stdout {
            let stream = connect(Kind::STDOUT).await?;
            // The last words go to standard error; with a terminal there is
            // only this stream.
            let last_words = self.terminal.then(|| exit.clone());
            outputs.push(tokio::spawn(copy::output(stream, sink, last_words)));
        }
        if let Some(sink) = self.stderr {
            let stream = connect(Kind::STDERR).await?;
            outputs.push(tokio::spawn(copy::output(stream, sink, Some(exit.clone()))));
        }
        let mut stdin = Stdin::None;
        if let Some(fifo) = self.stdin {
            stdin = Stdin::Waiting {
                fifo,
                stream: connect(Kind::STDIN).await?,
                exit: exit.clone(),
                closed: false,
            };
        }
        Ok(Streams {
            outputs: Mutex::new(outputs),
            stdin: Mutex::new(stdin),
            logger: Mutex::new(self.logger),
        })
    }
}

fn open_error<'a>(
    stream: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> Error + use<'a> {
    move |source| Error::Open {
        stream,
        path: path.to_owned(),
        source,
    }
}

fn check_fifo(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path)?.file_type().is_fifo() {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a FIFO",
        ))
    }
}

/// Standard input, from Create to the end.
#[derive(Debug)]
enum Stdin {
    /// There is none, or it has ended.
    None,
    /// The program has not been started.
    Waiting {
        fifo: PathBuf,
        stream: UnixStream,
        exit: watch::Receiver<Option<Exit>>,
        /// `CloseIO` came: it ends with what the client has written by then.
        closed: bool,
    },
    /// It is copied; `keep` is our own writing end, which keeps the FIFO from
    /// ending when the client goes.
    Copied {
        keep: Option<pipe::Sender>,
        copying: JoinHandle<()>,
    },
}

/// A task's streams while they are copied.
#[derive(Debug)]
pub struct Streams {
    outputs: Mutex<Vec<JoinHandle<()>>>,
    stdin: Mutex<Stdin>,
    logger: Mutex<Option<Logger>>,
}

impl Streams {
    /// Starts to copy standard input: the program runs. Once.
    ///
    /// # Errors
    /// When the FIFO is gone; the program's input has then ended.
    pub fn start_input(&self) -> Result<(), Error> {
        let mut stdin = locked(&self.stdin);
        let (fifo, stream, exit, closed) = match std::mem::replace(&mut *stdin, Stdin::None) {
            Stdin::Waiting {
                fifo,
                stream,
                exit,
                closed,
            } => (fifo, stream, exit, closed),
            other => {
                *stdin = other;
                return Ok(());
            }
        };
        // In this order: a FIFO without a reader cannot be opened for writing
        // without waiting (fifo(7)).
        let open = || {
            let reader = pipe::OpenOptions::new().open_receiver(&fifo)?;
            let keep = (!closed).then(|| pipe::OpenOptions::new().open_sender(&fifo));
            Ok((reader, keep.transpose()?))
        };
        let (reader, keep) = open().map_err(open_error("standard input", &fifo))?;
        *stdin = Stdin::Copied {
            keep,
            copying: tokio::spawn(copy::input(reader, stream, exit)),
        };
        Ok(())
    }

    /// Ends standard input once the FIFO has been read empty and the client has
    /// closed its own end, and not before the program is started. Idempotent.
    pub fn close_stdin(&self) {
        let mut stdin = locked(&self.stdin);
        match &mut *stdin {
            Stdin::None => {}
            Stdin::Waiting { closed, .. } => *closed = true,
            Stdin::Copied { keep, .. } => *keep = None,
        }
    }

    /// Waits, at most `bound`, until the guest's last bytes have reached the
    /// client; then lets go of everything, and of a client that does not read.
    pub async fn drain(&self, bound: Duration) {
        let outputs = std::mem::take(&mut *locked(&self.outputs));
        let deadline = tokio::time::Instant::now() + bound;
        for mut output in outputs {
            if tokio::time::timeout_at(deadline, &mut output)
                .await
                .is_err()
            {
                warn!("the client did not read the last output in {bound:?}; it is lost");
                output.abort();
            }
        }
        let stdin = std::mem::replace(&mut *locked(&self.stdin), Stdin::None);
        if let Stdin::Copied { copying, .. } = stdin {
            copying.abort();
        }
        let logger = locked(&self.logger).take();
        if let Some(logger) = logger {
            logger.finish().await;
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
