//! Watching over a VM's two processes: the monitor's events, the file server's
//! end, and what both wrote last.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tracing::{debug, error, info};
use vmm_config::control::{Event, Exit, ExitReason};

use super::machine::{End, Machine, State, Watcher};
use crate::host::vm::{Received, Vm};
use crate::readiness::readable;

/// Lines of a process's log that an error quotes.
const QUOTED_LINES: usize = 5;
/// Longest line that is kept: a process may be made to write anything.
const MAX_LINE_BYTES: usize = 1024;
/// How long an ended process's log may take to end, should somebody hold it.
const LOG_TIMEOUT: Duration = Duration::from_secs(1);

/// Watches over `vm` until it has ended, and then collects its processes.
///
/// # Errors
/// When its descriptors cannot be watched.
///
/// # Panics
/// Outside a tokio runtime.
pub fn supervise(mut vm: Vm) -> io::Result<Machine> {
    let (machine, watcher) = Machine::new();
    let monitor_log = vm.monitor.log.take().map(|log| follow("monitor", log));
    let server_log = vm
        .file_server
        .log
        .take()
        .map(|log| follow("file server", log));
    let control = readable(vm.monitor.control().try_clone_to_owned()?)?;
    let server = readable(vm.file_server.pidfd().try_clone_to_owned()?)?;
    tokio::spawn(async move {
        let Watcher { state, mut stop } = watcher;
        let cause = watch(&vm, &control, &server, &state, &mut stop).await;
        // Both are collected before anybody hears of the end: who cleans up
        // after it meets no process of the VM.
        let killed =
            tokio::task::spawn_blocking(move || (vm.monitor.kill(), vm.file_server.kill())).await;
        if let Ok((Err(error), _) | (_, Err(error))) = killed {
            error!("a process of the VM cannot be collected: {error}");
        }
        let monitor_tail = tail(monitor_log).await;
        let server_tail = tail(server_log).await;
        let reason = cause.describe(&monitor_tail, &server_tail);
        state.send_replace(State::Ended(End { reason }));
    });
    Ok(machine)
}

/// What ended a VM, before the logs are read to their end.
#[derive(Debug)]
enum Cause {
    Told(Exit),
    Failed(String),
    MonitorGone,
    FileServerGone,
    Asked(String),
    Control(String),
}

impl Cause {
    fn describe(self, monitor_log: &[String], server_log: &[String]) -> String {
        match self {
            Self::Failed(error) => error,
            Self::Told(exit) => {
                let lines = exit.guest_log;
                match exit.reason {
                    ExitReason::PowerOff => "the guest powered off".to_owned(),
                    ExitReason::Reset => quote("the guest reset itself", "guest's log", &lines),
                    ExitReason::GuestPanic => {
                        quote("the guest's kernel panicked", "guest's log", &lines)
                    }
                    ExitReason::TripleFault => quote(
                        "the guest's kernel crashed (triple fault)",
                        "guest's log",
                        &lines,
                    ),
                    ExitReason::VcpuFailed { error } => {
                        format!("KVM could not run the guest: {error}")
                    }
                    ExitReason::DeviceFailed { device, error } => quote(
                        &format!("device {device} failed: {error}"),
                        "file server's log",
                        server_log,
                    ),
                    ExitReason::Stopped => "the VM was stopped".to_owned(),
                }
            }
            Self::MonitorGone => quote("the VM's monitor died", "monitor's log", monitor_log),
            Self::FileServerGone => quote(
                "the pod's file server (virtiofsd) died",
                "its log",
                server_log,
            ),
            Self::Asked(reason) => reason,
            Self::Control(error) => quote(
                &format!("the VM's monitor cannot be understood: {error}"),
                "monitor's log",
                monitor_log,
            ),
        }
    }
}

fn quote(what: &str, whose: &str, lines: &[String]) -> String {
    if lines.is_empty() {
        return what.to_owned();
    }
    let from = lines.len().saturating_sub(QUOTED_LINES);
    format!("{what}; last of the {whose}: {}", lines[from..].join(" | "))
}

async fn watch(
    vm: &Vm,
    control: &AsyncFd<OwnedFd>,
    server: &AsyncFd<OwnedFd>,
    state: &tokio::sync::watch::Sender<State>,
    stop: &mut tokio::sync::mpsc::UnboundedReceiver<String>,
) -> Cause {
    loop {
        tokio::select! {
            // What the monitor has to say first: it names its reason.
            biased;
            readable = control.readable() => {
                let mut readable = match readable {
                    Ok(readable) => readable,
                    Err(error) => return Cause::Control(error.to_string()),
                };
                match vm.monitor.try_event() {
                    Ok(Received::Pending) => readable.clear_ready(),
                    Ok(Received::Closed) => return Cause::MonitorGone,
                    Ok(Received::Event(event)) => match event {
                        Event::Started(timings) => debug!(?timings, "the VM runs"),
                        Event::GuestReady => {
                            info!("the guest is ready");
                            state.send_replace(State::Ready);
                        }
                        Event::Failed { error } => return Cause::Failed(error),
                        Event::Exited(exit) => return Cause::Told(exit),
                    },
                    Err(error) => return Cause::Control(error.to_string()),
                }
            }
            _ = server.readable() => {
                // The server also ends when the monitor has gone: then the
                // monitor's own words count, if it left any.
                return match vm.monitor.try_event() {
                    Ok(Received::Event(Event::Exited(exit))) => Cause::Told(exit),
                    Ok(Received::Event(Event::Failed { error })) => Cause::Failed(error),
                    Ok(Received::Closed) => Cause::MonitorGone,
                    _ => Cause::FileServerGone,
                };
            }
            Some(reason) = stop.recv() => {
                return Cause::Asked(reason);
            }
        }
    }
}

/// The last lines of a process's log, once it has ended.
type Following = JoinHandle<Vec<String>>;

fn follow(whose: &'static str, log: OwnedFd) -> Following {
    tokio::spawn(async move {
        let mut last = VecDeque::with_capacity(QUOTED_LINES);
        let Ok(log) = pipe::Receiver::from_owned_fd(log) else {
            return Vec::new();
        };
        let mut lines = BufReader::with_capacity(MAX_LINE_BYTES, log);
        let mut line = Vec::new();
        while read_line(&mut lines, &mut line).await {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            info!(process = whose, "{text}");
            if last.len() == QUOTED_LINES {
                last.pop_front();
            }
            last.push_back(text);
            line.clear();
        }
        last.into()
    })
}

/// Reads one line, or as much of it as fits; false at the end.
async fn read_line(from: &mut BufReader<pipe::Receiver>, line: &mut Vec<u8>) -> bool {
    loop {
        let Ok(bytes) = from.fill_buf().await else {
            return false;
        };
        if bytes.is_empty() {
            return !line.is_empty();
        }
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let length = end.map_or(bytes.len(), |end| end + 1);
        line.extend_from_slice(&bytes[..length]);
        from.consume(length);
        if end.is_some() || line.len() >= MAX_LINE_BYTES {
            return true;
        }
    }
}

async fn tail(following: Option<Following>) -> Vec<String> {
    let Some(mut following) = following else {
        return Vec::new();
    };
    let Ok(lines) = tokio::time::timeout(LOG_TIMEOUT, &mut following).await else {
        following.abort();
        return Vec::new();
    };
    lines.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn follow_keeps_the_last_lines_and_bounds_each() {
        let (reader, writer) = rustix::pipe::pipe().expect("makes a pipe");
        let following = follow("test", reader);
        for number in 0..20 {
            let line = format!("line {number}\n");
            rustix::io::write(&writer, line.as_bytes()).expect("writes");
        }
        rustix::io::write(&writer, &[b'x'; 3 * MAX_LINE_BYTES]).expect("writes");
        drop(writer);
        let last = tail(Some(following)).await;
        assert_eq!(last.len(), QUOTED_LINES);
        assert_eq!(last[1], "line 19");
        assert!(last.iter().all(|line| line.len() <= 2 * MAX_LINE_BYTES));
    }

    #[test]
    fn describe_panic_quotes_the_guests_last_lines() {
        let exit = Exit {
            reason: ExitReason::GuestPanic,
            guest_log: vec!["Kernel panic - not syncing".to_owned()],
        };
        let reason = Cause::Told(exit).describe(&[], &[]);
        assert!(
            reason.contains("panicked") && reason.contains("not syncing"),
            "{reason}"
        );
    }

    #[test]
    fn describe_file_server_quotes_its_log() {
        let reason = Cause::FileServerGone.describe(&[], &["bad request".to_owned()]);
        assert!(
            reason.contains("virtiofsd") && reason.contains("bad request"),
            "{reason}"
        );
    }
}
