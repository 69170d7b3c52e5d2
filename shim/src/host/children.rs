//! Who may reap which child.
//!
//! The shim is a subreaper: processes that its hooks leave behind (a port
//! reserver, say) become its children, and it must reap them without stealing
//! the exit status of a child that somebody here waits for. So every child
//! made here is listed until its owner has reaped it, and
//! [`reap_orphans`] takes only the others.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::process::Child;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, WaitOptions, pidfd_send_signal, waitid,
    waitpid,
};

use super::jail::Jailed;

/// Pids of children that have an owner.
static OWNED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

fn owned() -> MutexGuard<'static, BTreeSet<u32>> {
    OWNED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a child and lists it, as one step for [`reap_orphans`].
pub(super) fn spawn(make: impl FnOnce() -> io::Result<Jailed>) -> io::Result<Jailed> {
    let mut owned = owned();
    let jailed = make()?;
    owned.insert(jailed.pid);
    Ok(jailed)
}

/// The same for a child of the standard library's making.
pub fn spawn_command(command: &mut std::process::Command) -> io::Result<Child> {
    let mut owned = owned();
    let child = command.spawn()?;
    owned.insert(child.id());
    Ok(child)
}

/// Strikes a child off the list: its owner has reaped it.
pub fn forget(pid: u32) {
    owned().remove(&pid);
}

/// Waits for a child to end and collects it; `None` if that was done before.
pub fn reap(pid: u32, pidfd: BorrowedFd<'_>) -> Option<WaitIdStatus> {
    let status = loop {
        match waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(status) => break status,
            Err(_) => break None,
        }
    };
    // Collected before: the number may be another child's by now.
    if status.is_some() {
        forget(pid);
    }
    status
}

/// How a child has ended, in words such as "killed by signal 9"; `None` while
/// it runs and once it is collected. Leaves it to be collected.
pub fn end_of(pidfd: BorrowedFd<'_>) -> Option<String> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let status = waitid(WaitId::PidFd(pidfd), options).ok().flatten()?;
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Some(format!("exit status {code}")),
        (None, Some(signal)) => Some(format!("killed by signal {signal}")),
        (None, None) => None,
    }
}

/// Kills a child and collects it. Idempotent.
pub fn kill_and_reap(pid: u32, pidfd: BorrowedFd<'_>) -> Option<WaitIdStatus> {
    // ESRCH: it has ended already, and is collected all the same.
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
    reap(pid, pidfd)
}

/// Reaps ended children that nobody here waits for. Call it on SIGCHLD instead
/// of `waitpid(-1)`. Does not block.
pub fn reap_orphans() {
    let owned = owned();
    for pid in children() {
        if owned.contains(&pid) {
            continue;
        }
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            // ECHILD: somebody was faster. Neither needs an answer.
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

/// All children of this process. They are listed by the thread that made
/// them, orphans by any thread (`proc_pid_children(5)`).
fn children() -> Vec<u32> {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            list.split_ascii_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::process::{PidfdFlags, pidfd_open};
    use std::os::fd::AsFd;
    use std::process::Command;

    /// Held by tests that reap orphans, which may be each other's.
    static REAPING: Mutex<()> = Mutex::new(());

    fn alone() -> MutexGuard<'static, ()> {
        REAPING.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[test]
    #[expect(clippy::zombie_processes, reason = "reaped by its pidfd")]
    fn reap_orphans_with_an_owned_child_leaves_its_status() {
        let _alone = alone();
        let child = spawn_command(Command::new("/bin/sh").args(["-c", "exit 7"])).expect("starts");
        let pid = Pid::from_raw(child.id().cast_signed()).expect("a pid");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("opens");
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).expect("waits");
        reap_orphans();
        let status = reap(child.id(), pidfd.as_fd()).expect("is still there to be collected");
        assert_eq!(status.exit_status(), Some(7));
    }

    #[test]
    #[expect(clippy::zombie_processes, reason = "reaped by its pidfd")]
    fn end_of_a_killed_child_names_the_signal_and_leaves_it_to_be_collected() {
        let child = spawn_command(Command::new("/bin/sleep").arg("1000")).expect("starts");
        let pid = Pid::from_raw(child.id().cast_signed()).expect("a pid");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("opens");
        assert_eq!(end_of(pidfd.as_fd()), None);
        pidfd_send_signal(&pidfd, Signal::TERM).expect("signals");
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).expect("waits");
        assert_eq!(
            end_of(pidfd.as_fd()).as_deref(),
            Some("killed by signal 15")
        );
        assert!(reap(child.id(), pidfd.as_fd()).is_some());
        assert_eq!(end_of(pidfd.as_fd()), None);
    }

    #[test]
    #[expect(clippy::zombie_processes, reason = "reaped by its pidfd")]
    fn reap_of_a_collected_child_leaves_the_list_to_the_numbers_next_owner() {
        let child = spawn_command(&mut Command::new("/bin/true")).expect("starts");
        let pid = Pid::from_raw(child.id().cast_signed()).expect("a pid");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("opens");
        assert!(reap(child.id(), pidfd.as_fd()).is_some());
        assert!(!owned().contains(&child.id()));
        owned().insert(child.id());
        assert!(kill_and_reap(child.id(), pidfd.as_fd()).is_none());
        assert!(owned().remove(&child.id()), "it is the next child's");
    }

    #[test]
    fn reap_orphans_with_an_unowned_ended_child_collects_it() {
        let _alone = alone();
        let mut child = Command::new("/bin/true").spawn().expect("starts");
        let pid = Pid::from_raw(child.id().cast_signed()).expect("a pid");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("opens");
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).expect("waits");
        reap_orphans();
        assert!(child.wait().is_err(), "nothing is left to wait for");
    }
}
