//! Watching over a VM's two processes: the monitor's events, the file server's
//! end, and what both wrote last.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::{debug, error, info};
use vmm_config::Memory;
use vmm_config::control::{Event, Exit, ExitReason};

use super::machine::{Change, End, Machine, State, Watcher};
use super::printable::printable;
use crate::host::children;
use crate::host::vm::{FileServer, Received, Vm};
use crate::readiness::readable;

/// Lines of a process's log that an error quotes.
const QUOTED_LINES: usize = 5;
/// Longest line that is kept: a process may be made to write anything.
const MAX_LINE_BYTES: usize = 1024;
/// How long an ended process's log may take to end, should somebody hold it.
const LOG_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the other process of a VM may take to follow the one that ended,
/// and to tell why.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(2);

/// Watches over `vm`, which has booted with this memory, until it has ended, and then
/// collects its processes.
///
/// # Errors
/// When its descriptors cannot be watched.
///
/// # Panics
/// Outside a tokio runtime.
pub fn supervise(mut vm: Vm, memory: Memory) -> io::Result<Machine> {
    let (machine, watcher) = Machine::new(memory.size_mib);
    let monitor_log = vm.monitor.log.take().map(|log| follow("monitor", log));
    let server_log = vm
        .file_server
        .log
        .take()
        .map(|log| follow("file server", log));
    for server in &mut vm.remote_servers {
        if let Some(log) = server.log.take() {
            follow("file server of a remote share", log);
        }
    }
    let control = readable(vm.monitor.control().try_clone_to_owned()?)?;
    let monitor = readable(vm.monitor.pidfd().try_clone_to_owned()?)?;
    let server = readable(vm.file_server.pidfd().try_clone_to_owned()?)?;
    tokio::spawn(async move {
        let mut watcher = watcher;
        let mut cause = watch(&vm, &control, &server, &mut watcher).await;
        let Watcher { state, .. } = watcher;
        // Before they are killed, which would hide it.
        match &mut cause {
            Cause::MonitorGone(how) => *how = end_of(&monitor).await,
            Cause::FileServerGone(how) => *how = end_of(&server).await,
            Cause::Told(_) | Cause::Failed(_) | Cause::Asked(_) | Cause::Control(_) => {}
        }
        // Both are collected before anybody hears of the end: who cleans up
        // after it meets no process of the VM.
        let Vm {
            monitor,
            file_server,
            remote_servers,
        } = vm;
        let remote = tokio::spawn(kill_remote(remote_servers));
        let killed = tokio::task::spawn_blocking(move || (monitor.kill(), file_server.kill()));
        let killed = killed.await;
        // Not for long: one that waits for an answer to its request cannot die.
        let _ = tokio::time::timeout(VERDICT_TIMEOUT, remote).await;
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

/// Kills file servers, each on a thread that nobody has to wait for; the answer
/// comes when all have gone.
async fn kill_remote(servers: Vec<FileServer>) {
    let gone = servers.into_iter().map(|server| {
        let (tell, told) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            if let Err(error) = server.kill() {
                error!("{error}");
            }
            let _ = tell.send(());
        });
        told
    });
    for told in gone.collect::<Vec<_>>() {
        let _ = told.await;
    }
}

/// What ended a VM, before the logs are read to their end.
#[derive(Debug)]
enum Cause {
    Told(Exit),
    Failed(String),
    /// And how, if that is known.
    MonitorGone(Option<String>),
    FileServerGone(Option<String>),
    Asked(String),
    Control(String),
}

impl Cause {
    /// For a user's terminal: the monitor and what both processes log may be in
    /// the hands of whoever broke them.
    fn describe(self, monitor_log: &[String], server_log: &[String]) -> String {
        printable(&self.tell(monitor_log, server_log))
    }

    fn tell(self, monitor_log: &[String], server_log: &[String]) -> String {
        match self {
            Self::Failed(error) => error,
            Self::Told(exit) => {
                let lines = exit.guest_log;
                match exit.reason {
                    ExitReason::PowerOff => "the guest powered off".to_owned(),
                    ExitReason::Reset => quote("the guest reset itself", "guest's log", &lines),
                    ExitReason::GuestPanic => quote_panic(&lines),
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
            Self::MonitorGone(how) => quote(
                &died("the VM's monitor (bulkhead-vmm)", how),
                "monitor's log",
                monitor_log,
            ),
            Self::FileServerGone(how) => quote(
                &died("the pod's file server (virtiofsd)", how),
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

/// Only a signal from outside is unexplained by the process's own log.
fn died(who: &str, how: Option<String>) -> String {
    match how {
        Some(how) if how.contains("signal") => {
            format!("{who} died, {how}: look for it, and for the OOM killer, in the host's log")
        }
        Some(how) => format!("{who} died, {how}"),
        None => format!("{who} died"),
    }
}

/// The panic and what the kernel said next: what came before it matters less,
/// and a long trace may follow.
fn quote_panic(lines: &[String]) -> String {
    let what = "the guest's kernel panicked";
    if lines.is_empty() {
        return what.to_owned();
    }
    let panic = lines.iter().position(|line| line.contains("Kernel panic"));
    let from = panic.unwrap_or(0);
    let to = lines.len().min(from + QUOTED_LINES);
    format!("{what}: {}", lines[from..to].join(" | "))
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
    watcher: &mut Watcher,
) -> Cause {
    let Watcher {
        state,
        memory_mib,
        stop,
        changes,
    } = watcher;
    let mut waiting = VecDeque::new();
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
                    Ok(Received::Closed) => return Cause::MonitorGone(None),
                    Ok(Received::Event(event)) => match event {
                        Event::Started(timings) => debug!(?timings, "the VM runs"),
                        Event::GuestReady => {
                            info!("the guest is ready");
                            state.send_replace(State::Ready);
                        }
                        Event::Failed { error } => return Cause::Failed(error),
                        Event::Exited(exit) => return Cause::Told(exit),
                        Event::NetworkAdded { slot } | Event::NetworkRemoved { slot } => {
                            answer(&mut waiting, Ok(slot));
                        }
                        Event::VcpusResized { count } => answer(&mut waiting, Ok(count.into())),
                        Event::MemoryRequested { size_mib } => answer(&mut waiting, Ok(size_mib)),
                        Event::NetworkRefused { error } | Event::ResizeRefused { error } => {
                            answer(&mut waiting, Err(printable(&error)));
                        }
                        Event::MemoryResized { size_mib } => {
                            debug!(size_mib, "the VM's memory has changed");
                            memory_mib.send_replace(size_mib);
                        }
                    },
                    Err(error) => return Cause::Control(error.to_string()),
                }
            }
            // The server also ends when the monitor has gone.
            _ = server.readable() => return why_server_ended(vm, control).await,
            Some(reason) = stop.recv() => {
                return Cause::Asked(reason);
            }
            Some(change) = changes.recv() => {
                let Change { request, descriptor, answer } = change;
                let descriptors: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
                match vm.monitor.change(&request, &descriptors) {
                    Ok(()) => waiting.push_back(answer),
                    Err(error) => drop(answer.send(Err(error.to_string()))),
                }
            }
        }
    }
}

/// The monitor answers in the order of the requests; one answer too many is its
/// fault, and nobody's loss.
fn answer(
    waiting: &mut VecDeque<oneshot::Sender<Result<u32, String>>>,
    answer: Result<u32, String>,
) {
    if let Some(asked) = waiting.pop_front() {
        let _ = asked.send(answer);
    }
}

/// The file server has ended: by itself, or after the monitor, whose own words
/// count then. A monitor that only reports the loss of its file server adds
/// nothing to it.
async fn why_server_ended(vm: &Vm, control: &AsyncFd<OwnedFd>) -> Cause {
    let told = async {
        loop {
            let Ok(mut readable) = control.readable().await else {
                return Cause::FileServerGone(None);
            };
            match vm.monitor.try_event() {
                Ok(Received::Pending) => readable.clear_ready(),
                Ok(Received::Event(
                    Event::Started(_)
                    | Event::GuestReady
                    | Event::NetworkAdded { .. }
                    | Event::NetworkRemoved { .. }
                    | Event::NetworkRefused { .. }
                    | Event::MemoryRequested { .. }
                    | Event::VcpusResized { .. }
                    | Event::MemoryResized { .. }
                    | Event::ResizeRefused { .. },
                )) => {}
                Ok(Received::Event(Event::Failed { error })) => return Cause::Failed(error),
                Ok(Received::Event(Event::Exited(exit))) => match exit.reason {
                    ExitReason::DeviceFailed { .. } => return Cause::FileServerGone(None),
                    _ => return Cause::Told(exit),
                },
                Ok(Received::Closed) => return Cause::MonitorGone(None),
                Err(error) => return Cause::Control(error.to_string()),
            }
        }
    };
    tokio::time::timeout(VERDICT_TIMEOUT, told)
        .await
        .unwrap_or(Cause::FileServerGone(None))
}

/// How the process of `pidfd` has ended, once it has.
async fn end_of(pidfd: &AsyncFd<OwnedFd>) -> Option<String> {
    // Its sockets close a moment before it is a zombie.
    let ended = tokio::time::timeout(VERDICT_TIMEOUT, pidfd.readable()).await;
    drop(ended.ok()?.ok()?);
    children::end_of(pidfd.get_ref().as_fd())
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
    fn describe_what_a_broken_monitor_says_is_bounded_and_printable() {
        let words = format!("\x1b]0;owned\x07{}", "x".repeat(100_000));
        let exit = Exit {
            reason: ExitReason::GuestPanic,
            guest_log: vec![words.clone()],
        };
        for cause in [Cause::Failed(words.clone()), Cause::Told(exit)] {
            let reason = cause.describe(&[], &[]);
            assert!(reason.contains("?]0;owned?xxx"), "{reason}");
            assert!(reason.len() < 5000, "{} bytes", reason.len());
        }
        let log = [words];
        let reason = Cause::MonitorGone(None).describe(&log, &[]);
        assert!(reason.contains("died") && !reason.contains('\x1b'));
    }

    #[test]
    fn describe_panic_quotes_the_panic_and_not_the_end_of_its_trace() {
        let mut guest_log = vec!["Kernel panic - not syncing: sysrq".to_owned()];
        guest_log.extend((0..12).map(|depth| format!("frame {depth}")));
        let exit = Exit {
            reason: ExitReason::GuestPanic,
            guest_log,
        };
        let reason = Cause::Told(exit).describe(&[], &[]);
        assert!(
            reason.contains("panicked") && reason.contains("not syncing: sysrq"),
            "{reason}"
        );
        assert!(!reason.contains("frame 11"), "{reason}");
    }

    #[test]
    fn quote_panic_after_other_lines_begins_with_it() {
        let lines = ["one", "two", "Kernel panic - not syncing", "four"].map(str::to_owned);
        let reason = quote_panic(&lines);
        assert!(
            reason.ends_with(": Kernel panic - not syncing | four"),
            "{reason}"
        );
        let reason = quote_panic(&lines[..2]);
        assert!(reason.ends_with(": one | two"), "{reason}");
    }

    #[test]
    fn describe_a_killed_monitor_names_it_and_the_signal() {
        let killed = Cause::MonitorGone(Some("killed by signal 9".to_owned()));
        let reason = killed.describe(&[], &[]);
        assert!(
            reason.contains("bulkhead-vmm") && reason.contains("signal 9"),
            "{reason}"
        );
    }

    #[test]
    fn describe_file_server_quotes_its_log() {
        let reason = Cause::FileServerGone(None).describe(&[], &["bad request".to_owned()]);
        assert!(
            reason.contains("virtiofsd") && reason.contains("bad request"),
            "{reason}"
        );
    }
}
