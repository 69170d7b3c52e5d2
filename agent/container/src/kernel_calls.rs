//! Kernel calls that neither `nix` nor the standard library has in a safe form.
//!
//! Each function is a thin, safe shape of one call; what is done with them is
//! decided elsewhere.
#![expect(
    unsafe_code,
    reason = "system calls and ioctls without a safe wrapper; descriptors that the kernel hands out"
)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::sched::CloneFlags;

/// `MOUNT_ATTR_*` of `linux/mount.h`.
pub mod mount_attr {
    pub const RDONLY: u64 = 0x0000_0001;
    pub const NOSUID: u64 = 0x0000_0002;
    pub const NODEV: u64 = 0x0000_0004;
    pub const NOEXEC: u64 = 0x0000_0008;
    /// Mask of the three that exclude each other.
    pub const ATIME: u64 = 0x0000_0070;
    pub const RELATIME: u64 = 0x0000_0000;
    pub const NOATIME: u64 = 0x0000_0010;
    pub const STRICTATIME: u64 = 0x0000_0020;
    pub const NODIRATIME: u64 = 0x0000_0080;
    pub const NOSYMFOLLOW: u64 = 0x0020_0000;
    pub const IDMAP: u64 = 0x0010_0000;
}

// linux/mount.h
const OPEN_TREE_CLONE: u32 = 1;
const OPEN_TREE_CLOEXEC: u32 = libc::O_CLOEXEC as u32;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x0000_0004;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x0000_0040;
const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const FSCONFIG_CMD_RECONFIGURE: u32 = 7;
const FSPICK_CLOEXEC: u32 = 1;
const FSPICK_EMPTY_PATH: u32 = 8;
// linux/fcntl.h
const AT_RECURSIVE: u32 = 0x8000;
const AT_EMPTY_PATH: u32 = libc::AT_EMPTY_PATH as u32;

/// What [`clone_sibling`] and [`clone_child`] return, once in each of the two processes.
#[derive(Debug)]
pub enum Cloned {
    /// In the new process.
    Child,
    /// In the caller.
    Parent {
        /// The new process in the caller's PID namespace.
        pid: i32,
        /// A reference to it that no other process can take over.
        pidfd: OwnedFd,
    },
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn new_descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let descriptor = check(result)? as RawFd;
    // SAFETY: the call that produced `result` succeeded and returns a new
    // descriptor, which nothing else in this process knows yet.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Takes over a descriptor that came with the process or in a message.
///
/// # Safety
/// Open, and owned by nothing else.
pub unsafe fn take_descriptor(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the caller's promise.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// clone3 with `CLONE_PARENT` and `CLONE_PIDFD`: the new process has the
/// caller's parent as its parent. The caller must be single-threaded.
pub fn clone_sibling(namespaces: CloneFlags) -> io::Result<Cloned> {
    // The exit signal stays 0: with CLONE_PARENT it is the caller's own.
    clone(namespaces.bits() | libc::CLONE_PARENT, 0)
}

/// clone3 with `CLONE_PIDFD`: the new process is the caller's to reap. The
/// caller must be single-threaded.
pub fn clone_child(namespaces: CloneFlags) -> io::Result<Cloned> {
    clone(namespaces.bits(), libc::SIGCHLD.unsigned_abs().into())
}

fn clone(flags: i32, exit_signal: u64) -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    // SAFETY: plain integers, for which zero means "not used".
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from((flags | libc::CLONE_PIDFD).cast_unsigned());
    arguments.exit_signal = exit_signal;
    arguments.pidfd = ptr::from_mut(&mut pidfd) as u64;

    // SAFETY: no CLONE_VM and no stack: this is a fork. The caller has one
    // thread, so the child's copy of memory holds no lock of another thread.
    // `arguments` and `pidfd` outlive the call.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            ptr::from_ref(&arguments),
            size_of::<libc::clone_args>(),
        )
    })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    Ok(Cloned::Parent {
        pid: pid as i32,
        // SAFETY: CLONE_PIDFD stored a new descriptor, owned by nobody else.
        pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
    })
}

/// Does something as another effective user, without privileges; the calling thread
/// alone, unlike with `seteuid(3)`. Its user must be root, whose it is again afterwards.
pub fn as_effective_user<T>(uid: u32, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let become_user = |uid: u32| {
        const UNCHANGED: libc::uid_t = libc::uid_t::MAX;
        // SAFETY: takes three integers.
        check(unsafe { libc::syscall(libc::SYS_setresuid, UNCHANGED, uid, UNCHANGED) })
    };
    become_user(uid)?;
    let done = work();
    become_user(0)?;
    done
}

/// Starts the configuration of a new file system.
pub fn fsopen(fstype: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: `fstype` is NUL-terminated.
    new_descriptor(unsafe { libc::syscall(libc::SYS_fsopen, fstype.as_ptr(), FSOPEN_CLOEXEC) })
}

/// Sets an option of a file system that is being configured.
pub fn fsconfig_set(context: BorrowedFd<'_>, key: &CStr, value: Option<&CStr>) -> io::Result<()> {
    let (command, value) = match value {
        Some(value) => (FSCONFIG_SET_STRING, value.as_ptr()),
        None => (FSCONFIG_SET_FLAG, ptr::null()),
    };
    // SAFETY: key and value are NUL-terminated, or the value is null as
    // FSCONFIG_SET_FLAG wants it.
    check(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            key.as_ptr(),
            value,
            0,
        )
    })
    .map(drop)
}

/// Starts a change of the file system that is mounted at `mount`.
pub fn fspick(mount: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = FSPICK_CLOEXEC | FSPICK_EMPTY_PATH;
    // SAFETY: the path is NUL-terminated (and empty: the descriptor itself).
    new_descriptor(unsafe {
        libc::syscall(libc::SYS_fspick, mount.as_raw_fd(), c"".as_ptr(), flags)
    })
}

/// Ends the configuration: the superblock exists afterwards.
pub fn fsconfig_create(context: BorrowedFd<'_>) -> io::Result<()> {
    fsconfig_command(context, FSCONFIG_CMD_CREATE)
}

/// Ends the change that [`fspick`] started.
pub fn fsconfig_reconfigure(context: BorrowedFd<'_>) -> io::Result<()> {
    fsconfig_command(context, FSCONFIG_CMD_RECONFIGURE)
}

fn fsconfig_command(context: BorrowedFd<'_>, command: u32) -> io::Result<()> {
    // SAFETY: the commands of the two callers take neither key nor value.
    check(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            ptr::null::<libc::c_char>(),
            ptr::null::<libc::c_char>(),
            0,
        )
    })
    .map(drop)
}

/// A detached mount of a configured file system.
pub fn fsmount(context: BorrowedFd<'_>, attributes: u64) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    new_descriptor(unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            attributes as u32,
        )
    })
}

/// A detached copy of the mount at `source`, with what is mounted below it if `recursive`.
pub fn clone_mount(source: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    // SAFETY: the path is NUL-terminated (and empty: the descriptor itself).
    new_descriptor(unsafe {
        libc::syscall(libc::SYS_open_tree, source.as_raw_fd(), c"".as_ptr(), flags)
    })
}

/// Attaches a detached mount at `target`.
pub fn attach_mount(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both paths are NUL-terminated (and empty: the descriptors themselves).
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// `struct mount_attr` of `linux/mount.h`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct MountAttributes {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE` or 0.
    pub propagation: u64,
    /// With [`mount_attr::IDMAP`]: the user namespace that maps the ids.
    pub userns_fd: u64,
}

/// Changes the attributes of the mount that `mount` is the root of.
pub fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    attributes: MountAttributes,
    recursive: bool,
) -> io::Result<()> {
    let mut flags = AT_EMPTY_PATH;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    // SAFETY: the path is NUL-terminated; `attributes` has the layout and the
    // size that are passed and outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            ptr::from_ref(&attributes),
            size_of::<MountAttributes>(),
        )
    })
    .map(drop)
}

/// A reference to the process that has this pid now.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    new_descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Sends a signal to the process that `pidfd` refers to.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: integers, and a null siginfo, for which the kernel makes its own.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// Closes every descriptor from `first` on. Only for a process that owns none of them yet.
pub fn close_descriptors_from(first: u32) -> io::Result<()> {
    // SAFETY: integers only. Closing under an owner's feet is excluded by the
    // contract: the helper calls this before it owns any descriptor.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) }).map(drop)
}

/// Makes every descriptor from `first` on close when the process executes a program.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })
    .map(drop)
}

/// Installs a seccomp filter in the calling thread, the only one.
pub fn install_seccomp_filter(
    program: &[libc::sock_filter],
    flags: libc::c_ulong,
) -> io::Result<()> {
    let Ok(len) = u16::try_from(program.len()) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let program = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: `program` points to `len` instructions that outlive the call; the
    // kernel only reads them, whatever the pointer's type says.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            ptr::from_ref(&program),
        )
    })
    .map(drop)
}

/// `struct sigaction` as the kernel has it (x86-64: handler, flags, restorer, mask).
#[repr(C)]
#[derive(Default)]
struct KernelSignalAction([u64; 4]);

/// Gives every signal its default disposition and empties the signal mask.
pub fn reset_signals() {
    let default = KernelSignalAction::default();
    let none: u64 = 0;
    // Not by the C library, which keeps two signals to itself and refuses to
    // touch them even if they were inherited as ignored.
    for signal in 1..=64 {
        // SAFETY: all zeros is SIG_DFL, which installs no handler; the size is
        // the kernel's signal set. Signals that cannot be changed answer EINVAL.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                ptr::from_ref(&default),
                ptr::null_mut::<KernelSignalAction>(),
                size_of::<u64>(),
            )
        };
    }
    // SAFETY: an empty set of the size that is passed, and no previous set wanted.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            ptr::from_ref(&none),
            ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    };
}

/// The slave of a pseudo terminal, without a path lookup.
pub fn open_terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: TIOCGPTPEER takes open flags as an integer and returns a new descriptor.
    new_descriptor(libc::c_long::from(unsafe {
        libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTPEER,
            libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
        )
    }))
}

/// Lets the slave of a pseudo terminal be opened.
pub fn unlock_terminal(master: BorrowedFd<'_>) -> io::Result<()> {
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int, which outlives the call.
    check(libc::c_long::from(unsafe {
        libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked)
    }))
    .map(drop)
}

/// Makes a terminal the controlling one of the caller, a session leader without one.
pub fn set_controlling_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(libc::c_long::from(unsafe {
        libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0)
    }))
    .map(drop)
}

/// Sets the size of a terminal in characters.
pub fn set_terminal_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    check(libc::c_long::from(unsafe {
        libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size)
    }))
    .map(drop)
}

/// Type of the namespace that a descriptor refers to.
pub fn namespace_type(namespace: BorrowedFd<'_>) -> io::Result<CloneFlags> {
    // SAFETY: NS_GET_NSTYPE takes no argument.
    let bits = check(libc::c_long::from(unsafe {
        libc::ioctl(namespace.as_raw_fd(), libc::NS_GET_NSTYPE)
    }))?;
    Ok(CloneFlags::from_bits_retain(bits as i32))
}

/// Brings the loopback interface of the calling process's network namespace up.
pub fn bring_loopback_up(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: plain data, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *target = *byte as libc::c_char;
    }
    // SAFETY: SIOCGIFFLAGS and SIOCSIFFLAGS read and write one ifreq, which
    // outlives both calls; after the first the union holds flags.
    unsafe {
        check(libc::c_long::from(libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFFLAGS,
            &raw mut request,
        )))?;
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        check(libc::c_long::from(libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS,
            &raw const request,
        )))?;
    }
    Ok(())
}

/// Sets the NIS domain name of the calling process's UTS namespace.
pub fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: the pointer is valid for the length that is passed; the kernel
    // wants no NUL.
    check(libc::c_long::from(unsafe {
        libc::setdomainname(name.as_ptr().cast(), name.len())
    }))
    .map(drop)
}

/// `struct sched_attr` of `linux/sched/types.h`, in its first version but for the size.
#[derive(Debug, Default, Clone, Copy)]
pub struct SchedulingAttributes {
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    /// Nanoseconds, as the two below.
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// Sets policy and parameters of a thread, 0 being the caller.
pub fn set_scheduling_attributes(pid: i32, attributes: &SchedulingAttributes) -> io::Result<()> {
    #[repr(C)]
    struct SchedAttr {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let attributes = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: attributes.policy,
        flags: attributes.flags,
        nice: attributes.nice,
        priority: attributes.priority,
        runtime: attributes.runtime,
        deadline: attributes.deadline,
        period: attributes.period,
    };
    // SAFETY: `attributes` has the layout and, in its first field, the size of
    // the kernel's (SCHED_ATTR_SIZE_VER0), and outlives the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, ptr::from_ref(&attributes), 0) })
        .map(drop)
}

/// Sets the I/O priority of a thread, 0 being the caller.
pub fn set_io_priority(pid: i32, priority: i32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, priority) })
        .map(drop)
}

/// Sets the caller's execution domain.
pub fn set_personality(domain: u32) -> io::Result<()> {
    // SAFETY: an integer only.
    check(unsafe { libc::syscall(libc::SYS_personality, libc::c_ulong::from(domain)) }).map(drop)
}

/// Sets the caller's memory policy: a mode with flags, and nodes as bits.
pub fn set_memory_policy(mode: u32, nodes: u64) -> io::Result<()> {
    let (mask, bits) = if nodes == 0 {
        (ptr::null(), 0)
    } else {
        // The kernel reads one bit less than it is told.
        (ptr::from_ref(&nodes), libc::c_ulong::from(u64::BITS) + 1)
    };
    // SAFETY: `mask` is null or points to the bits that are told, rounded up to
    // whole words less the one that does not count; it outlives the call.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, bits) }).map(drop)
}
