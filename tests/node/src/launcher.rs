//! Starting QEMU so that it ends when its owner ends, however that happens.
#![expect(unsafe_code, reason = "code between fork and exec")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid, getppid, setsid};

/// How long a started process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// Killed when this process ends, by whatever cause.
    Owner,
    /// Lives on by itself, away from this process's terminal and its Ctrl-C.
    Detached,
}

/// Starts `command` with the descriptors `inherited` open under the same numbers.
///
/// # Errors
/// When the process cannot be started.
pub fn spawn(
    mut command: Command,
    inherited: Vec<OwnedFd>,
    lifetime: Lifetime,
) -> io::Result<Child> {
    let owner = getpid();
    let numbers: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: the closure makes system calls only (fcntl, prctl, getppid, setsid), all async-signal-safe; it allocates
    // nothing, and the vector that it reads was filled before the fork.
    unsafe {
        command.pre_exec(move || prepare(&numbers, lifetime, owner));
    }
    let started = match lifetime {
        Lifetime::Detached => command.spawn(),
        Lifetime::Owner => spawn_from_lasting_thread(command),
    };
    // Only now: the child's copies have the numbers that its command line names.
    drop(inherited);
    started
}

fn prepare(inherited: &[RawFd], lifetime: Lifetime, owner: Pid) -> io::Result<()> {
    for number in inherited {
        // SAFETY: the caller of `spawn` keeps these descriptors open until the child has executed its program.
        let descriptor = unsafe { std::os::fd::BorrowedFd::borrow_raw(*number) };
        fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
    }
    match lifetime {
        Lifetime::Detached => {
            setsid()?;
        }
        Lifetime::Owner => {
            set_pdeathsig(Signal::SIGKILL)?;
            // The owner may have died before the request was in place.
            if getppid() != owner {
                return Err(io::Error::from(io::ErrorKind::BrokenPipe));
            }
        }
    }
    Ok(())
}

type Request = (Command, mpsc::Sender<io::Result<Child>>);

/// The kernel sends the parent-death signal when the *thread* that forked ends. Test threads come and go, so everything is
/// started from one thread that ends with the process.
fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    static THREAD: OnceLock<Mutex<mpsc::Sender<Request>>> = OnceLock::new();
    let requests = THREAD.get_or_init(|| {
        let (sender, receiver) = mpsc::channel::<Request>();
        thread::spawn(move || {
            for (mut command, answer) in receiver {
                // Whoever asked waits for the answer.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (answer, result) = mpsc::channel();
    let sent = requests
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, answer));
    let gone = || io::Error::other("the launcher thread has ended");
    sent.map_err(|_| gone())?;
    result.recv().map_err(|_| gone())?
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn spawn_owner_child_outlives_the_thread_that_asked() {
        let mut child = thread::spawn(|| {
            let mut command = Command::new("cat");
            command.stdin(Stdio::piped());
            spawn(command, Vec::new(), Lifetime::Owner).unwrap()
        })
        .join()
        .unwrap();
        drop(child.stdin.take());
        let status = child.wait().unwrap();
        assert!(status.success(), "{:?}", status.signal());
    }

    #[test]
    fn spawn_inherited_descriptor_is_open_under_its_number() {
        let file = tempfile::tempfile().unwrap();
        let number = file.as_raw_fd();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("echo hello >&{number}")]);
        let copy = file.try_clone().unwrap();
        let mut child = spawn(command, vec![file.into()], Lifetime::Owner).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(copy.metadata().unwrap().len(), 6);
    }
}
