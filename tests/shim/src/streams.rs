//! A process's FIFOs, from the client's side.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

/// How long to wait before a FIFO that nobody reads is tried again.
const PAUSE: Duration = Duration::from_millis(20);

/// Makes a FIFO.
///
/// # Errors
/// What the kernel says.
pub fn make_fifo(path: &Path) -> io::Result<()> {
    Ok(mknodat(
        CWD,
        path,
        FileType::Fifo,
        Mode::RUSR | Mode::WUSR,
        0,
    )?)
}

/// The strings of a request for standard streams, and what reads the outputs.
#[derive(Debug, Default)]
pub struct Streams {
    /// Path of standard input's FIFO.
    pub stdin: String,
    /// Path or URI of standard output.
    pub stdout: String,
    /// Path or URI of standard error.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
    readers: Vec<pipe::Receiver>,
}

impl Streams {
    /// None at all.
    pub fn none() -> Self {
        Self::default()
    }

    /// Three FIFOs in `directory`, which are named for `name`; with a terminal
    /// two. The outputs are open from now on, as a client opens them: nothing
    /// that the shim writes and closes can be missed.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn fifos(directory: &Path, name: &str, terminal: bool) -> Result<Self> {
        let make = |stream: &str| {
            let path = directory.join(format!("{name}-{stream}"));
            make_fifo(&path).with_context(|| format!("make FIFO {}", path.display()))?;
            anyhow::Ok(path)
        };
        let open = |path: &PathBuf| {
            let opened = pipe::OpenOptions::new().open_receiver(path);
            opened.with_context(|| format!("open FIFO {}", path.display()))
        };
        let (stdin, stdout) = (make("stdin")?, make("stdout")?);
        let mut readers = vec![open(&stdout)?];
        let mut stderr = String::new();
        if !terminal {
            let path = make("stderr")?;
            readers.push(open(&path)?);
            stderr = path.display().to_string();
        }
        Ok(Self {
            stdin: stdin.display().to_string(),
            stdout: stdout.display().to_string(),
            stderr,
            terminal,
            readers,
        })
    }

    /// The same place for both outputs, such as a URI.
    pub fn at(stdout: &str) -> Self {
        Self {
            stdout: stdout.to_owned(),
            stderr: stdout.to_owned(),
            ..Self::default()
        }
    }

    /// Reads both outputs to their ends. To be called when the process has been
    /// started: until the shim has opened a FIFO, it looks as if it had ended.
    pub fn collect(&mut self) -> Outputs {
        let readers = std::mem::take(&mut self.readers).into_iter();
        Outputs(readers.map(|reader| tokio::spawn(read(reader))).collect())
    }

    /// Standard output, to be read a piece at a time. As [`Streams::collect`].
    ///
    /// # Panics
    /// When it is read already.
    pub fn take_stdout(&mut self) -> pipe::Receiver {
        self.readers.remove(0)
    }
}

async fn read(mut from: pipe::Receiver) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).await?;
    Ok(bytes)
}

/// Outputs being read.
#[derive(Debug)]
pub struct Outputs(Vec<JoinHandle<io::Result<Vec<u8>>>>);

impl Outputs {
    /// Both, when they have ended.
    ///
    /// # Errors
    /// When they have not within `patience`.
    pub async fn ended(self, patience: Duration) -> Result<(Vec<u8>, Vec<u8>)> {
        let mut outputs = Vec::new();
        for output in self.0 {
            let ended = tokio::time::timeout(patience, output).await;
            let read = ended.context("an output has no end although its process has")?;
            outputs.push(read??);
        }
        let mut outputs = outputs.into_iter();
        Ok((
            outputs.next().unwrap_or_default(),
            outputs.next().unwrap_or_default(),
        ))
    }
}

/// Reads until `wanted` has come.
///
/// # Errors
/// When it has not within `patience`, with what came.
pub async fn read_until(
    from: &mut pipe::Receiver,
    wanted: &[u8],
    patience: Duration,
) -> Result<Vec<u8>> {
    let mut seen = Vec::new();
    let reading = async {
        while !seen.windows(wanted.len()).any(|window| window == wanted) {
            if from.read_buf(&mut seen).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
        }
        Ok(())
    };
    let outcome = tokio::time::timeout(patience, reading).await;
    if let Ok(Ok(())) = outcome {
        return Ok(seen);
    }
    bail!(
        "waited for {:?}, read {:?}: {outcome:?}",
        String::from_utf8_lossy(wanted),
        String::from_utf8_lossy(&seen)
    )
}

/// A client's end of standard input.
///
/// # Errors
/// When nobody reads it within `patience`.
pub async fn open_input(fifo: &str, patience: Duration) -> Result<pipe::Sender> {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        match pipe::OpenOptions::new().open_sender(fifo) {
            Ok(sender) => return Ok(sender),
            // As fifo(7) says of a FIFO without a reader: the shim may open it
            // a little after its answer.
            Err(error)
                if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error())
                    && tokio::time::Instant::now() < deadline =>
            {
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(error).with_context(|| format!("open {fifo} to write")),
        }
    }
}

/// Opens standard input, writes, and closes it again.
///
/// # Errors
/// When it is not read within `patience`.
pub async fn write_input(fifo: &str, bytes: &[u8], patience: Duration) -> Result<()> {
    let mut sender = open_input(fifo, patience).await?;
    let written = tokio::time::timeout(patience, sender.write_all(bytes)).await;
    written
        .context("standard input is not read")?
        .context("write to standard input")
}

/// Bytes that look like nothing in particular, always the same: what is lost,
/// doubled or out of its place shows.
pub fn pattern(length: usize) -> Vec<u8> {
    // xorshift64 (Marsaglia 2003) with his first example of shifts.
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Says where two byte strings part, if they do.
pub fn first_difference(wanted: &[u8], seen: &[u8]) -> Option<String> {
    if wanted == seen {
        return None;
    }
    let same = wanted.iter().zip(seen).take_while(|(a, b)| a == b).count();
    Some(format!(
        "{} bytes came of {}, the first {same} are right",
        seen.len(),
        wanted.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn fifos_keep_what_was_written_and_closed_before_they_are_read() {
        let directory = tempfile::tempdir().expect("makes a directory");
        let mut streams = Streams::fifos(directory.path(), "p", false).expect("makes");
        for (path, text) in [(&streams.stdout, "out"), (&streams.stderr, "err")] {
            std::fs::write(path, text).expect("writes");
        }
        let outputs = streams.collect().ended(Duration::from_secs(5)).await;
        assert_eq!(outputs.expect("end"), (b"out".to_vec(), b"err".to_vec()));
    }

    #[tokio::test]
    async fn open_input_without_a_reader_fails_in_time() {
        let directory = tempfile::tempdir().expect("makes a directory");
        let streams = Streams::fifos(directory.path(), "p", true).expect("makes");
        let opened = open_input(&streams.stdin, Duration::from_millis(1)).await;
        opened.expect_err("nobody reads");
    }

    #[tokio::test]
    async fn read_until_what_never_comes_tells_what_came() {
        let directory = tempfile::tempdir().expect("makes a directory");
        let mut streams = Streams::fifos(directory.path(), "p", true).expect("makes");
        std::fs::write(&streams.stdout, "abc").expect("writes");
        let mut stdout = streams.take_stdout();
        let missed = read_until(&mut stdout, b"x", Duration::from_secs(5)).await;
        assert!(missed.expect_err("ends").to_string().contains("abc"));
    }

    #[test]
    fn first_difference_counts_what_is_right() {
        let wanted = pattern(1000);
        assert_eq!(first_difference(&wanted, &wanted), None);
        let mut seen = wanted.clone();
        seen.remove(400);
        let told = first_difference(&wanted, &seen).expect("differ");
        assert!(
            told.starts_with("999 bytes came of 1000, the first 400"),
            "{told}"
        );
    }
}
