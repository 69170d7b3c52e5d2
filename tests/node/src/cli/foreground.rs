//! Commands that have this process's streams, signals and terminal.

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use bulkhead_node::{Node, NodeCommand, NodeStatus, Process};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{self, SetArg, Termios};

mod window;

/// Runs `command` with this process's streams, and passes on the signals that would end it.
pub(crate) fn exec(node: &str, command: &NodeCommand) -> Result<ExitCode> {
    let signals = block(&[
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ])?;
    attend(&Node::attach(node)?, command, &signals)
}

/// Runs `command` on a terminal that this process's terminal stands in for.
pub(crate) fn shell(node: &str, command: NodeCommand) -> Result<ExitCode> {
    let size = window::size().context("`shell` needs a terminal; use `exec`")?;
    let terminal = std::env::var("TERM").unwrap_or_else(|_| "dumb".to_owned());
    let signals = block(&[Signal::SIGTERM, Signal::SIGHUP, Signal::SIGWINCH])?;
    let _raw = RawTerminal::enter()?;
    attend(
        &Node::attach(node)?,
        &command.env("TERM", terminal).tty(size),
        &signals,
    )
}

fn attend(node: &Node, command: &NodeCommand, signals: &SigSet) -> Result<ExitCode> {
    let mut process = node.spawn(command)?;
    if let Some(stdin) = process.stdin.take() {
        // Ends with this process: a read of standard input cannot be interrupted.
        thread::spawn(move || copy(&mut io::stdin().lock(), &mut { stdin }));
    }
    let stdout = process
        .stdout
        .take()
        .map(|from| thread::spawn(move || copy(&mut { from }, &mut io::stdout())));
    let stderr = process
        .stderr
        .take()
        .map(|from| thread::spawn(move || copy(&mut { from }, &mut io::stderr())));
    let process = Arc::new(process);
    pass_on(*signals, Arc::clone(&process));

    let ended = process.wait();
    for stream in [stdout, stderr].into_iter().flatten() {
        finish(stream)?;
    }
    Ok(exit_code(ended.map_err(|lost| node.explain(lost))?))
}

/// Every read is written at once: whoever watches sees it when it happens.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                to.write_all(&buffer[..count])?;
                to.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn finish(stream: JoinHandle<io::Result<()>>) -> Result<()> {
    match stream.join() {
        // Our reader has gone, like `head`: the command learns of it as its own write fails, and how it ends is told.
        Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        // Told by the session's own end.
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(()),
        Ok(result) => result.context("copy the command's output"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn exit_code(status: NodeStatus) -> ExitCode {
    let number = status.code().or(status.signal().map(|signal| 128 + signal));
    // The kernel keeps the low eight bits of a status, and signals end at 64: nothing is lost.
    ExitCode::from(
        number
            .and_then(|number| u8::try_from(number).ok())
            .unwrap_or(u8::MAX),
    )
}

/// Blocks `signals` in this thread and all that it starts from now on, the node's watch included, so that one thread can wait for
/// them.
fn block(signals: &[Signal]) -> Result<SigSet> {
    let set: SigSet = signals.iter().copied().collect();
    set.thread_block().context("block signals")?;
    Ok(set)
}

fn pass_on(signals: SigSet, process: Arc<Process>) {
    thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            let told = match signal {
                Signal::SIGWINCH => window::size().map_or(Ok(()), |size| process.resize(size)),
                other => process.signal(other as i32),
            };
            if told.is_err() {
                return;
            }
        }
    });
}

/// The terminal without line editing and signal keys, as long as this lives.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Self> {
        let before = termios::tcgetattr(io::stdin()).context("read the terminal's settings")?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)
            .context("change the terminal's settings")?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nobody to tell if it fails, and `reset` mends it.
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.0);
    }
}
