//! The way into the guest: one Unix socket that the monitor listens on.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// The guest accepts at once, or when it has booted.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// `OK ` with the largest port, and room.
const MAX_ANSWER_BYTES: usize = 32;

/// Why the guest cannot be reached.
#[derive(Debug, Error)]
pub enum Error {
    /// The socket on the host's side.
    #[error("{operation} {path}")]
    Socket {
        /// As in "listen on".
        operation: &'static str,
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Nobody in the guest takes the connection.
    #[error("connect to port {port} of the guest")]
    Connect {
        /// The vsock port.
        port: u32,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// Something other than the monitor's answer.
    #[error("connect to port {port} of the guest: the monitor answered {answer:?}")]
    Answer {
        /// The vsock port.
        port: u32,
        /// As received.
        answer: String,
    },
    /// No answer at all.
    #[error("connect to port {port} of the guest: no answer in {CONNECT_TIMEOUT:?}")]
    Timeout {
        /// The vsock port.
        port: u32,
    },
}

/// The host's side of a guest's sockets.
#[derive(Clone, Debug)]
pub struct Vsock {
    directory: Arc<OwnedFd>,
    path: PathBuf,
}

impl Vsock {
    /// Listens at `path`, for the monitor to accept.
    ///
    /// The name is used through a descriptor of its directory, for it may be
    /// longer than a socket's name can be.
    pub fn listen(path: &Path) -> Result<(Self, UnixListener), Error> {
        let failed = |operation| {
            move |source: io::Error| Error::Socket {
                operation,
                path: path.to_owned(),
                source,
            }
        };
        let directory = path.parent().unwrap_or(Path::new("/"));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory, flags, Mode::empty())
            .map_err(|errno| failed("open the directory of")(errno.into()))?;
        let vsock = Self {
            directory: Arc::new(directory),
            path: path.to_owned(),
        };
        let listener = UnixListener::bind(vsock.address()).map_err(failed("listen on"))?;
        Ok((vsock, listener))
    }

    /// Connects to `port` of the guest. Waits for a guest that is booting, but
    /// not for ever.
    pub async fn connect(&self, port: u32) -> Result<UnixStream, Error> {
        tokio::time::timeout(CONNECT_TIMEOUT, self.shake_hands(port))
            .await
            .unwrap_or(Err(Error::Timeout { port }))
    }

    async fn shake_hands(&self, port: u32) -> Result<UnixStream, Error> {
        let failed = |source| Error::Connect { port, source };
        let mut stream = UnixStream::connect(self.address()).await.map_err(failed)?;
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .await
            .map_err(failed)?;
        // Byte by byte: what follows the newline belongs to the stream.
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') && answer.len() < MAX_ANSWER_BYTES {
            answer.push(stream.read_u8().await.map_err(failed)?);
        }
        if answer == format!("OK {port}\n").as_bytes() {
            Ok(stream)
        } else {
            Err(Error::Answer {
                port,
                answer: String::from_utf8_lossy(&answer).into_owned(),
            })
        }
    }

    fn address(&self) -> PathBuf {
        let directory = format!("/proc/self/fd/{}", self.directory.as_raw_fd());
        Path::new(&directory).join(self.path.file_name().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[tokio::test]
    async fn connect_by_a_name_longer_than_sockets_have_leaves_the_stream_untouched() {
        let root = tempfile::tempdir().expect("makes a directory");
        let directory = root.path().join("x".repeat(120));
        std::fs::create_dir(&directory).expect("makes a directory");
        let (vsock, listener) = Vsock::listen(&directory.join("vsock.sock")).expect("listens");
        let guest = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accepts");
            let mut line = [0; 13];
            stream.read_exact(&mut line).expect("reads");
            stream.write_all(b"OK 1025\nfirst bytes").expect("writes");
            line
        });
        let mut stream = vsock.connect(1025).await.expect("connects");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("reads");
        assert_eq!(&guest.join().expect("ends"), b"CONNECT 1025\n");
        assert_eq!(text, "first bytes");
    }

    #[tokio::test]
    async fn connect_to_a_dead_monitor_is_an_error() {
        let root = tempfile::tempdir().expect("makes a directory");
        let (vsock, listener) = Vsock::listen(&root.path().join("vsock.sock")).expect("listens");
        drop(listener);
        assert!(matches!(
            vsock.connect(1024).await,
            Err(Error::Connect { port: 1024, .. })
        ));
    }
}
