//! One connection of the node tool, and the command that it runs.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use nix::sys::signal::{self, Signal};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use node_agent::credit::Credit;
use node_agent::wire::{Exec, Exit, Frame, Stream, WireError, read_frame, write_frame};
use node_agent::{MAX_DATA, VERSION, WINDOW};

use crate::claim::Claims;
use crate::terminal;

/// The sending half of a connection. Frames of several threads go out whole, one after the other.
#[derive(Clone)]
struct Outgoing(Arc<Mutex<TcpStream>>);

impl Outgoing {
    fn send(&self, frame: &Frame) -> Result<(), WireError> {
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        write_frame(&mut *stream, frame)
    }
}

/// Serves one connection to its end. The command's process group does not outlive it.
pub(crate) fn serve(connection: &TcpStream, claims: &Claims) -> Result<(), WireError> {
    connection.set_nodelay(true)?;
    let mut incoming = io::BufReader::with_capacity(MAX_DATA, connection.try_clone()?);
    let outgoing = Outgoing(Arc::new(Mutex::new(connection.try_clone()?)));
    if let Err(reason) = admit(&mut incoming, claims)? {
        return outgoing.send(&Frame::Refused(reason));
    }
    outgoing.send(&Frame::Welcome)?;

    let mut running: Option<Running> = None;
    let result = loop {
        let frame = match read_frame(&mut incoming) {
            Ok(Some(frame)) => frame,
            // A tool that was killed ends its session like one that is done.
            Ok(None) | Err(WireError::Io(_)) => break Ok(()),
            Err(error) => break Err(error),
        };
        let step = match (frame, &mut running) {
            (Frame::Ping, _) => outgoing
                .send(&Frame::Pong)
                .map_err(|error| error.to_string()),
            (Frame::Exec(exec), None) => match Running::start(&exec, &outgoing) {
                Ok(started) => {
                    running = Some(started);
                    Ok(())
                }
                Err(reason) => Err(reason),
            },
            (frame, Some(running)) => running.handle(frame),
            (frame, None) => Err(format!("unexpected frame {frame:?} before the command")),
        };
        if let Err(reason) = step {
            // The peer may be gone already; nothing else depends on this answer.
            let _ = outgoing.send(&Frame::Refused(reason));
            break Ok(());
        }
    };
    if let Some(running) = running {
        running.abandon();
    }
    // Threads that still hold a clone of the socket must not keep the connection open.
    let _ = connection.shutdown(Shutdown::Both);
    result
}

fn admit(incoming: &mut impl Read, claims: &Claims) -> Result<Result<(), String>, WireError> {
    Ok(match read_frame(incoming)? {
        Some(Frame::Hello(version, _) | Frame::Claim(version, _)) if version != VERSION => {
            Err(format!(
                "the node speaks version {VERSION} of the protocol, not {version}: take the node down and up again"
            ))
        }
        Some(Frame::Hello(_, token)) if claims.permits(&token) => Ok(()),
        Some(Frame::Hello(..)) => Err("this node belongs to somebody else".to_owned()),
        Some(Frame::Claim(_, claim)) => claims.take(&claim),
        _ => Err("the first frame must be Hello or Claim".to_owned()),
    })
}

/// A command under way.
struct Running {
    group: Arc<Mutex<Option<Pid>>>,
    stdin: Option<Sender<Vec<u8>>>,
    /// Bytes of stdin that have come and are not yet written; shared with the thread that writes them.
    unwritten: Arc<Mutex<u32>>,
    terminal: Option<File>,
    stdout: Arc<Credit>,
    stderr: Arc<Credit>,
}

impl Running {
    fn start(exec: &Exec, outgoing: &Outgoing) -> Result<Self, String> {
        let text = |bytes: &Vec<u8>| OsString::from_vec(bytes.clone());
        let (program, args) = exec.argv.split_first().ok_or("an empty command line")?;
        let mut command = Command::new(text(program));
        command
            .args(args.iter().map(text))
            .env_clear()
            .envs(
                exec.env
                    .iter()
                    .map(|(name, value)| (text(name), text(value))),
            )
            .current_dir(text(&exec.cwd));
        let mut terminal = None;
        if let Some(size) = exec.tty {
            let master = terminal::attach(&mut command, size);
            terminal = Some(master.map_err(|error| format!("open a terminal: {error}"))?);
        } else {
            command
                .process_group(0)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
        }
        let mut child = command.spawn().map_err(|error| {
            format!(
                "run {} in {}: {error}",
                text(program).display(),
                text(&exec.cwd).display()
            )
        })?;
        // It holds the terminal's other end, which must be open in the command alone, or its end would go unseen.
        drop(command);
        match Self::connect(&mut child, terminal, outgoing) {
            Ok(running) => Ok(running.watch(child, outgoing.clone())),
            Err(error) => {
                // Nobody can be told how it ends, so it must not go on.
                let _ = child.kill();
                let _ = child.wait();
                Err(format!("serve {}: {error}", text(program).display()))
            }
        }
    }

    fn connect(
        child: &mut Child,
        terminal: Option<File>,
        outgoing: &Outgoing,
    ) -> Result<Self, WireError> {
        // First of all, so that it comes before any output.
        outgoing.send(&Frame::Started(child.id()))?;
        let (input, output, errors) = if let Some(master) = &terminal {
            (Some(master.try_clone()?), Some(master.try_clone()?), None)
        } else {
            (
                child
                    .stdin
                    .take()
                    .map(|pipe| File::from(OwnedFd::from(pipe))),
                child
                    .stdout
                    .take()
                    .map(|pipe| File::from(OwnedFd::from(pipe))),
                child
                    .stderr
                    .take()
                    .map(|pipe| File::from(OwnedFd::from(pipe))),
            )
        };
        let (stdout, stderr) = (Arc::new(Credit::default()), Arc::new(Credit::default()));
        for (stream, from, credit) in [
            (Stream::Stdout, output, &stdout),
            (Stream::Stderr, errors, &stderr),
        ] {
            match from {
                Some(from) => pump_out(stream, from, credit, outgoing),
                None => outgoing.send(&Frame::Eof(stream))?,
            }
        }
        let unwritten = Arc::new(Mutex::new(0));
        let stdin = input.map(|input| {
            let (sender, receiver) = mpsc::channel();
            let (unwritten, outgoing) = (Arc::clone(&unwritten), outgoing.clone());
            let is_terminal = terminal.is_some();
            thread::spawn(move || pump_in(&receiver, input, is_terminal, &unwritten, &outgoing));
            sender
        });
        let pid = Pid::from_raw(child.id() as i32);
        Ok(Self {
            group: Arc::new(Mutex::new(Some(pid))),
            stdin,
            unwritten,
            terminal,
            stdout,
            stderr,
        })
    }

    /// Waits for the command in a thread of its own and tells how it ended.
    fn watch(self, mut child: Child, outgoing: Outgoing) -> Self {
        let group = Arc::clone(&self.group);
        thread::spawn(move || {
            // First only look: until it is reaped its pid cannot become somebody else's, and signals take the lock.
            let pid = Pid::from_raw(child.id() as i32);
            let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
            while waitid(Id::Pid(pid), look) == Err(nix::Error::EINTR) {}
            let status = {
                let mut group = group.lock().unwrap_or_else(PoisonError::into_inner);
                *group = None;
                child.wait()
            };
            let exit = match status {
                Ok(status) => match (status.code(), status.signal()) {
                    (Some(code), _) => Exit::Code(code),
                    (None, signal) => Exit::Signal(signal.unwrap_or_default()),
                },
                Err(_) => Exit::Code(255),
            };
            // A tool that has gone does not want to know.
            let _ = outgoing.send(&Frame::Exit(exit));
        });
        self
    }

    fn handle(&mut self, frame: Frame) -> Result<(), String> {
        match frame {
            Frame::Data(Stream::Stdin, bytes) => return self.take_stdin(bytes),
            Frame::Eof(Stream::Stdin) => self.stdin = None,
            Frame::Eof(Stream::Stdout) => self.stdout.close(),
            Frame::Eof(Stream::Stderr) => self.stderr.close(),
            Frame::Credit(Stream::Stdout, bytes) => {
                return self.stdout.give(bytes).map_err(|error| error.to_string());
            }
            Frame::Credit(Stream::Stderr, bytes) => {
                return self.stderr.give(bytes).map_err(|error| error.to_string());
            }
            Frame::Signal(number) => self.signal(
                Signal::try_from(number).map_err(|_| format!("no signal has number {number}"))?,
            ),
            Frame::Resize(size) => {
                if let Some(master) = &self.terminal {
                    terminal::resize(master, size).map_err(|error| format!("resize: {error}"))?;
                }
            }
            other => return Err(format!("unexpected frame {other:?}")),
        }
        Ok(())
    }

    fn take_stdin(&mut self, bytes: Vec<u8>) -> Result<(), String> {
        let Some(stdin) = &self.stdin else {
            return Err("stdin after its end".to_owned());
        };
        {
            let mut unwritten = self
                .unwritten
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *unwritten += bytes.len() as u32;
            if *unwritten > WINDOW {
                return Err("more stdin than the window allows".to_owned());
            }
        }
        // The receiver stays until this sender is dropped.
        let _ = stdin.send(bytes);
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        let group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pid) = *group {
            // It may have left its group's last member dead: nothing to tell.
            let _ = signal::killpg(pid, signal);
        }
    }

    /// Ends everything when the tool has gone.
    fn abandon(self) {
        self.signal(Signal::SIGKILL);
        self.stdout.close();
        self.stderr.close();
    }
}

fn pump_out(stream: Stream, mut from: File, credit: &Arc<Credit>, outgoing: &Outgoing) {
    let (credit, outgoing) = (Arc::clone(credit), outgoing.clone());
    thread::spawn(move || {
        let mut buffer = vec![0; MAX_DATA];
        while let Some(allowed) = credit.wait() {
            match from.read(&mut buffer[..allowed]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A terminal says EIO when the last process has closed it.
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    credit.spend(count);
                    if outgoing
                        .send(&Frame::Data(stream, buffer[..count].to_vec()))
                        .is_err()
                    {
                        return;
                    }
                }
            }
        }
        let _ = outgoing.send(&Frame::Eof(stream));
    });
}

fn pump_in(
    from: &Receiver<Vec<u8>>,
    mut to: File,
    is_terminal: bool,
    unwritten: &Mutex<u32>,
    outgoing: &Outgoing,
) {
    // The end-of-file character: a terminal has no other way to say it.
    const VEOF: u8 = 4;
    while let Ok(bytes) = from.recv() {
        if to.write_all(&bytes).is_err() {
            let _ = outgoing.send(&Frame::Eof(Stream::Stdin));
            return;
        }
        let count = bytes.len() as u32;
        *unwritten.lock().unwrap_or_else(PoisonError::into_inner) -= count;
        if outgoing.send(&Frame::Credit(Stream::Stdin, count)).is_err() {
            return;
        }
    }
    if is_terminal {
        let _ = to.write_all(&[VEOF]);
    }
}
