//! Copying one stream.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tracing::{debug, warn};

use super::{Error, Target, open_error};
use crate::task::Exit;

/// One read: what a pipe holds by default (pipe(7)).
const BUFFER_BYTES: usize = 64 * 1024;
/// How long the last line waits for a client that does not read.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(1);

/// Where output goes.
#[derive(Debug)]
pub enum Sink {
    /// A client's FIFO.
    Fifo {
        /// Written to.
        writer: pipe::Sender,
        /// Keeps the FIFO from breaking when the client goes; never read.
        keep: pipe::Receiver,
    },
    /// A file, appended to.
    File(File),
    /// A logging program's pipe.
    Pipe(pipe::Sender),
}

impl Sink {
    /// Opens a target; `None` for `/dev/null`, which the guest has itself. A
    /// logging program is not opened but started.
    pub async fn open(target: &Target, stream: &'static str) -> Result<Option<Self>, Error> {
        let (path, opened) = match target {
            Target::Null | Target::Logger(_) => return Ok(None),
            Target::Path(path) => (path, Self::open_path(path).await),
            Target::File(path) => (path, Self::create_file(path).await),
        };
        opened.map(Some).map_err(open_error(stream, path))
    }

    async fn open_path(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        let metadata = tokio::fs::metadata(path).await?;
        if !metadata.file_type().is_fifo() {
            return File::options()
                .append(true)
                .open(path)
                .await
                .map(Self::File);
        }
        // In this order, see `open_input`.
        let keep = pipe::OpenOptions::new().open_receiver(path)?;
        let writer = pipe::OpenOptions::new().open_sender(path)?;
        Ok(Self::Fifo { writer, keep })
    }

    async fn create_file(path: &Path) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            tokio::fs::create_dir_all(directory).await?;
        }
        File::options()
            .append(true)
            .create(true)
            .mode(0o644)
            .open(path)
            .await
            .map(Self::File)
    }

    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Fifo { writer, keep: _ } | Self::Pipe(writer) => writer.write_all(bytes).await,
            Self::File(file) => {
                file.write_all(bytes).await?;
                file.flush().await
            }
        }
    }
}

/// Copies output until the guest ends it. A sink that breaks is no reason to
/// stop reading: the container would wait for ever on a reader that is gone.
///
/// With `last_words`, waits for the process's end before it closes the sink,
/// and writes what is to be said of it.
pub async fn output(
    mut from: impl AsyncRead + Unpin,
    sink: Sink,
    last_words: Option<watch::Receiver<Option<Exit>>>,
) {
    let mut sink = Some(sink);
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        // A VM that dies resets its streams: the end all the same.
        let length = from.read(&mut buffer).await.unwrap_or(0);
        if length == 0 {
            break;
        }
        if let Some(open) = &mut sink
            && let Err(error) = open.write_all(&buffer[..length]).await
        {
            warn!("nobody reads the output any more, it is dropped from now on: {error}");
            sink = None;
        }
    }
    drop(from);
    if let (Some(mut exit), Some(mut sink)) = (last_words, sink)
        && let Ok(exit) = exit
            .wait_for(Option::is_some)
            .await
            .map(|exit| exit.clone())
        && let Some(words) = exit.and_then(|exit| exit.last_words)
    {
        let line = format!("bulkhead: {words}\n");
        let _ = tokio::time::timeout(LAST_WORDS_TIMEOUT, sink.write_all(line.as_bytes())).await;
    }
}

/// Copies input until the FIFO ends (`CloseIO`) or the guest no longer reads.
pub async fn input(
    mut from: pipe::Receiver,
    mut to: UnixStream,
    mut exit: watch::Receiver<Option<Exit>>,
) {
    let copying = async {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let length = from.read(&mut buffer).await?;
            if length == 0 {
                break;
            }
            to.write_all(&buffer[..length]).await?;
        }
        // A half-close, which the guest sees after the last byte. The rest of
        // the stream stays until the guest closes, lest a reset overtake it.
        to.shutdown().await?;
        to.read(&mut [0]).await.map(drop)
    };
    tokio::select! {
        result = copying => if let Err(error) = result {
            debug!("input is no longer read: {error}");
        },
        _ = exit.wait_for(Option::is_some) => {}
    }
}
