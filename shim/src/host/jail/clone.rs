//! The one `clone3` of the shim.
#![expect(
    unsafe_code,
    reason = "clone3 with CLONE_INTO_CGROUP and CLONE_PIDFD has no safe wrapper"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::Jailed;
use super::child::{Plan, become_program};

/// The namespaces that not every jail has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Namespaces {
    pub(super) network: bool,
    pub(super) pids: bool,
}

/// Makes the process that becomes `plan`'s program, in `cgroup` from birth.
pub(super) fn clone_into(
    plan: &Plan<'_>,
    own: Namespaces,
    cgroup: BorrowedFd<'_>,
) -> io::Result<Jailed> {
    let optional = |wanted: bool, flag: libc::c_int| if wanted { flag } else { 0 };
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP
        | optional(own.network, libc::CLONE_NEWNET)
        | optional(own.pids, libc::CLONE_NEWPID);
    // SAFETY: the child goes on to its program with what `launch` prepared for it,
    // which the copied memory holds.
    match unsafe { clone_child(namespaces, Some(cgroup)) }? {
        Some(jailed) => Ok(jailed),
        // SAFETY: this is the new process, and its signals are blocked.
        None => unsafe { become_program(plan) },
    }
}

/// Makes a process in new `namespaces`, and in `cgroup` from birth. `None` in the
/// child, with every signal blocked: it cannot run one of this program's handlers on
/// its copy of the memory.
///
/// # Safety
/// As after `fork(2)` in a program with threads, the child may do only what
/// signal-safety(7) allows, and never returns.
pub(in crate::host) unsafe fn clone_child(
    namespaces: libc::c_int,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Option<Jailed>> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid clone_args: no stack, no TLS, no tid pointers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from((namespaces | libc::CLONE_PIDFD).cast_unsigned());
    arguments.pidfd = (&raw mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    let blocked = Blocked::all()?;
    // SAFETY: without CLONE_VM the child gets its own copy of the memory, as
    // after fork(2); arguments and pidfd outlive the call.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<libc::clone_args>(),
        )
    };
    let failed = io::Error::last_os_error();
    if pid == 0 {
        std::mem::forget(blocked);
        return Ok(None);
    }
    drop(blocked);
    let Ok(pid) = u32::try_from(pid) else {
        return Err(failed);
    };
    Ok(Some(Jailed {
        pid,
        // SAFETY: clone3 succeeded, so with CLONE_PIDFD it stored a descriptor
        // that nothing else owns.
        pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
    }))
}

/// `CLONE_INTO_CGROUP` of linux/sched.h; libc has it as a truncated `c_int`.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// This thread with all signals blocked; dropped, with its former mask.
struct Blocked(libc::sigset_t);

impl Blocked {
    fn all() -> io::Result<Self> {
        // SAFETY: both sets are this function's own, and all-zero is valid.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut former: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut former) {
                0 => Ok(Self(former)),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set came from pthread_sigmask, and nothing is asked back.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut());
        }
    }
}
