//! The new process between `clone3` and `execveat`.
//!
//! The parent has many threads, and any of them may have held any lock when
//! the child was copied. So nothing here allocates, takes a lock or calls
//! into libc beyond its plain system call stubs; all that is needed was
//! prepared in a [`Plan`] before.
#![expect(
    unsafe_code,
    reason = "raw system calls between clone3 and execveat, where nothing else may be called"
)]

use std::ffi::{CStr, c_int, c_long};
use std::os::fd::RawFd;
use std::ptr;

use libc::syscall;

use super::step::Step;

/// All that the child needs, as plain numbers and pointers into memory that
/// the parent prepared. The child has its own copy of it.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    /// Write end of the pipe that tells failures; close-on-exec.
    pub(super) error_pipe: RawFd,
    /// Network namespace to enter.
    pub(super) network: Option<RawFd>,
    pub(super) root: RootPlan<'a>,
    /// Copies of the descriptors at numbers above any target, with their
    /// targets.
    pub(super) descriptors: &'a [(RawFd, RawFd)],
    pub(super) open_files: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) capabilities: u64,
    pub(super) program: RawFd,
    /// NULL-terminated.
    pub(super) arguments: *const *const libc::c_char,
}

#[derive(Debug)]
pub(super) enum RootPlan<'a> {
    /// A detached mount that becomes the root as it is.
    Detached(RawFd),
    /// A detached mount into which the share and procfs are mounted.
    Server { root: RawFd, share: &'a CStr },
    /// A mounted directory of the host.
    Directory(&'a CStr),
}

/// The message of a failure: the step's number and the errno.
pub(super) const FAILURE_BYTES: usize = 5;

struct Failure(Step, c_int);

/// Becomes the program, or tells through the pipe why not.
///
/// # Safety
/// Must run in a process that `clone3` has just made without `CLONE_VM`, with
/// all signals blocked; every descriptor of `plan` must be open and every
/// pointer valid, as [`super::launch`] prepares them.
pub(super) unsafe fn become_program(plan: &Plan<'_>) -> ! {
    // SAFETY: the caller's contract is this function's.
    let Err(Failure(step, errno)) = unsafe { try_become(plan) };
    let mut message = [0_u8; FAILURE_BYTES];
    message[0] = step as u8;
    message[1..].copy_from_slice(&errno.to_ne_bytes());
    // SAFETY: the message outlives the call; exit_group only ends this process,
    // without running what the parent registered for its own exit.
    unsafe {
        syscall(
            libc::SYS_write,
            plan.error_pipe,
            message.as_ptr(),
            message.len(),
        );
        loop {
            syscall(libc::SYS_exit_group, 127);
        }
    }
}

unsafe fn try_become(plan: &Plan<'_>) -> Result<std::convert::Infallible, Failure> {
    // SAFETY: each call gets numbers, NUL-terminated constants, or pointers
    // that the caller of `become_program` vouches for; all act on this process.
    unsafe {
        reset_signals();
        check(Step::Session, syscall(libc::SYS_setsid))?;
        if let Some(network) = plan.network {
            check(
                Step::Network,
                syscall(libc::SYS_setns, network, libc::CLONE_NEWNET),
            )?;
        }
        // Slave, not private: what the shim mounts into the share later must
        // reach the file server. Nothing goes the other way.
        mount(
            Step::Propagation,
            None,
            c"/",
            None,
            libc::MS_REC | libc::MS_SLAVE,
        )?;
        enter_root(&plan.root)?;
        place_descriptors(plan.descriptors)?;
        syscall(libc::SYS_umask, 0o077);
        limit(libc::RLIMIT_CORE, 0)?;
        limit(libc::RLIMIT_NOFILE, plan.open_files)?;
        drop_privileges(plan)?;
        unblock_signals();
        let environment = [ptr::null::<libc::c_char>()];
        let executed = syscall(
            libc::SYS_execveat,
            plan.program,
            c"".as_ptr(),
            plan.arguments,
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        // It returns only when it fails.
        Err(check(Step::Execute, executed)
            .err()
            .unwrap_or(Failure(Step::Execute, 0)))
    }
}

fn check(step: Step, returned: c_long) -> Result<c_long, Failure> {
    if returned >= 0 {
        return Ok(returned);
    }
    // SAFETY: errno is this thread's own variable.
    Err(Failure(step, unsafe { *libc::__errno_location() }))
}

/// Every disposition to its default: handlers go with execve anyway, but what
/// is ignored (Rust ignores SIGPIPE) would stay so. A raw call, since libc's
/// wrapper keeps two real-time signals to itself, which a parent may ignore.
unsafe fn reset_signals() {
    /// The kernel's `struct sigaction` of x86-64: all zero is `SIG_DFL`.
    const DEFAULT: [u64; 4] = [0; 4];
    const SIGSET_BYTES: usize = 8;
    let old = ptr::null_mut::<u64>();
    for signal in 1..=64 {
        // SAFETY: the kernel reads a constant and is asked nothing back;
        // SIGKILL and SIGSTOP are refused, which changes nothing.
        unsafe {
            syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT.as_ptr(),
                old,
                SIGSET_BYTES,
            );
        }
    }
}

unsafe fn unblock_signals() {
    // SAFETY: an all-zero mask is empty; sigprocmask reads it only.
    unsafe {
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
    }
}

unsafe fn mount(
    step: Step,
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
) -> Result<(), Failure> {
    let or_null = |text: Option<&CStr>| text.map_or(ptr::null(), CStr::as_ptr);
    // SAFETY: all strings are NUL-terminated or NULL, there is no data.
    let returned = unsafe {
        syscall(
            libc::SYS_mount,
            or_null(source),
            target.as_ptr(),
            or_null(kind),
            flags,
            ptr::null::<libc::c_void>(),
        )
    };
    check(step, returned).map(drop)
}

const SEALED: libc::c_ulong = libc::MS_REMOUNT
    | libc::MS_BIND
    | libc::MS_RDONLY
    | libc::MS_NOSUID
    | libc::MS_NODEV
    | libc::MS_NOEXEC;

unsafe fn enter_root(root: &RootPlan<'_>) -> Result<(), Failure> {
    // SAFETY: the descriptors and strings are the plan's.
    unsafe {
        match root {
            RootPlan::Detached(root) => attach_over_root(*root)?,
            RootPlan::Server { root, share } => {
                attach_over_root(*root)?;
                // One call from the host's tree to ours, so that no mount made
                // in between is missed. It stays a slave of the share.
                let bind = libc::MS_BIND | libc::MS_REC;
                mount(Step::BindShare, Some(share), c"share", None, bind)?;
                // The share's own directories are the host's: a guest that
                // could rename them would choose where the shim mounts next.
                // What is mounted in them keeps its own flags.
                mount(Step::SealShare, None, c"share", None, SEALED)?;
                mount_process_list(*root)?;
                mount(Step::SealRoot, None, c".", None, SEALED)?;
            }
            RootPlan::Directory(directory) => {
                check(
                    Step::EnterRoot,
                    syscall(libc::SYS_chdir, directory.as_ptr()),
                )?;
            }
        }
        // `.` for both: the old root ends up above the new one, from where it
        // is let go, and no directory for it is needed (pivot_root(2), Notes).
        let here = c".".as_ptr();
        check(Step::PivotRoot, syscall(libc::SYS_pivot_root, here, here))?;
        check(
            Step::DetachOldRoot,
            syscall(libc::SYS_umount2, here, libc::MNT_DETACH),
        )?;
        check(Step::EnterRoot, syscall(libc::SYS_chdir, c"/".as_ptr()))?;
    }
    Ok(())
}

/// Mounts the detached `root` over `/` and goes there.
unsafe fn attach_over_root(root: RawFd) -> Result<(), Failure> {
    // SAFETY: numbers and constant strings only.
    unsafe {
        check(
            Step::AttachRoot,
            syscall(
                libc::SYS_move_mount,
                root,
                c"".as_ptr(),
                libc::AT_FDCWD,
                c"/".as_ptr(),
                libc::MOVE_MOUNT_F_EMPTY_PATH,
            ),
        )?;
        check(Step::EnterRoot, syscall(libc::SYS_fchdir, root))?;
    }
    Ok(())
}

const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;

/// Mounts at `processes` the part of procfs that shows processes, and those of
/// this PID namespace only: no `/proc/sys`, which a uid of 0 may write without
/// any capability.
unsafe fn mount_process_list(root: RawFd) -> Result<(), Failure> {
    let nothing = ptr::null::<libc::c_char>();
    // SAFETY: numbers, constant strings, and descriptors made here.
    unsafe {
        let step = Step::MountProc;
        let context = check(step, syscall(libc::SYS_fsopen, c"proc".as_ptr(), 1_u32))?;
        let (key, value) = (c"subset".as_ptr(), c"pid".as_ptr());
        check(
            step,
            syscall(
                libc::SYS_fsconfig,
                context,
                FSCONFIG_SET_STRING,
                key,
                value,
                0,
            ),
        )?;
        check(
            step,
            syscall(
                libc::SYS_fsconfig,
                context,
                FSCONFIG_CMD_CREATE,
                nothing,
                nothing,
                0,
            ),
        )?;
        let attributes = libc::MOUNT_ATTR_RDONLY
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC;
        let mounted = check(step, syscall(libc::SYS_fsmount, context, 1_u32, attributes))?;
        check(
            step,
            syscall(
                libc::SYS_move_mount,
                mounted,
                c"".as_ptr(),
                root,
                c"processes".as_ptr(),
                libc::MOVE_MOUNT_F_EMPTY_PATH,
            ),
        )?;
    }
    Ok(())
}

/// Marks every descriptor close-on-exec and then places the given ones, which
/// clears the mark on them alone. Their sources lie above all targets.
unsafe fn place_descriptors(descriptors: &[(RawFd, RawFd)]) -> Result<(), Failure> {
    // SAFETY: numbers only.
    unsafe {
        let all = syscall(
            libc::SYS_close_range,
            0_u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
        check(Step::Descriptors, all)?;
        for &(source, target) in descriptors {
            check(
                Step::Descriptors,
                syscall(libc::SYS_dup3, source, target, 0),
            )?;
        }
    }
    Ok(())
}

unsafe fn limit(resource: libc::__rlimit_resource_t, value: u64) -> Result<(), Failure> {
    let limits = libc::rlimit {
        rlim_cur: value,
        rlim_max: value,
    };
    // SAFETY: the structure outlives the call, and nothing is asked back.
    let returned = unsafe {
        let old = ptr::null_mut::<libc::rlimit>();
        syscall(libc::SYS_prlimit64, 0, resource, &raw const limits, old)
    };
    check(Step::Limits, returned).map(drop)
}

/// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

unsafe fn drop_privileges(plan: &Plan<'_>) -> Result<(), Failure> {
    let kept = plan.capabilities;
    // SAFETY: numbers, and structures of linux/capability.h that outlive the
    // calls. Raw calls on purpose: libc's setresuid would try to reach the
    // other threads, of which this process has none.
    unsafe {
        for capability in 0..64_u32 {
            if kept >> capability & 1 == 0
                && syscall(libc::SYS_prctl, libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0
            {
                // EINVAL: beyond the kernel's last capability.
                match check(Step::Bounding, -1) {
                    Err(Failure(_, libc::EINVAL)) => break,
                    other => other.map(drop)?,
                }
            }
        }
        let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL;
        check(
            Step::Bounding,
            syscall(libc::SYS_prctl, libc::PR_CAP_AMBIENT, clear, 0, 0, 0),
        )?;

        let none = ptr::null::<u32>();
        let (uid, gid) = (plan.uid, plan.gid);
        check(Step::Credentials, syscall(libc::SYS_setgroups, 0, none))?;
        check(
            Step::Credentials,
            syscall(libc::SYS_setresgid, gid, gid, gid),
        )?;
        check(
            Step::Credentials,
            syscall(libc::SYS_setresuid, uid, uid, uid),
        )?;

        let header = CapabilityHeader {
            version: CAPABILITY_VERSION,
            pid: 0,
        };
        let half = |shift: u32| CapabilityData {
            effective: (kept >> shift) as u32,
            permitted: (kept >> shift) as u32,
            inheritable: 0,
        };
        let data = [half(0), half(32)];
        let set = syscall(libc::SYS_capset, &raw const header, data.as_ptr());
        check(Step::Capabilities, set)?;
        check(
            Step::NoNewPrivileges,
            syscall(libc::SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        )?;
    }
    Ok(())
}
