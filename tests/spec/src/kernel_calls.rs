//! The system calls that no crate wraps, and those that seccomp profiles are tried with.
#![expect(
    unsafe_code,
    reason = "raw system calls; each block says why its arguments are fit"
)]

use std::io;

use libc::{c_int, c_long, c_ulong};

fn outcome(returned: c_long) -> io::Result<c_long> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(returned)
    }
}

/// Calls that nothing but the checker makes, by name, with a first argument.
/// They take numbers only, and change nothing.
pub const CALLS: &[(&str, c_long)] = &[
    ("getpgid", libc::SYS_getpgid),
    ("getsid", libc::SYS_getsid),
    ("getppid", libc::SYS_getppid),
    ("sched_yield", libc::SYS_sched_yield),
    ("sched_get_priority_max", libc::SYS_sched_get_priority_max),
    // Above all numbers that a profile can name.
    ("a call of the future", 3000),
];

/// Makes one of [`CALLS`].
///
/// # Errors
/// What the kernel or a seccomp filter answered.
///
/// # Panics
/// For a name that is not there.
pub fn call(name: &str, argument: c_ulong) -> io::Result<()> {
    let number = CALLS.iter().find(|(known, _)| *known == name);
    let number = number.expect("a name of CALLS").1;
    // SAFETY: these calls take at most one number and no pointer; one that does
    // not exist answers ENOSYS.
    outcome(unsafe { libc::syscall(number, argument) }).map(drop)
}

/// Class and priority of this process's requests to disks (`ioprio_get(2)`).
///
/// # Errors
/// As the call's.
pub fn io_priority() -> io::Result<(u64, u64)> {
    const IOPRIO_WHO_PROCESS: c_int = 1;
    // linux/ioprio.h
    const IOPRIO_CLASS_SHIFT: u64 = 13;
    // SAFETY: numbers only; 0 is the calling thread.
    let value = outcome(unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0) })?;
    let value = value.unsigned_abs();
    Ok((
        value >> IOPRIO_CLASS_SHIFT,
        value & ((1 << IOPRIO_CLASS_SHIFT) - 1),
    ))
}

/// The execution domain (`personality(2)`), all bits of it.
///
/// # Errors
/// As the call's.
pub fn personality() -> io::Result<c_long> {
    // Asks without a change.
    const ASK: c_ulong = 0xffff_ffff;
    // SAFETY: a number only.
    outcome(unsafe { libc::syscall(libc::SYS_personality, ASK) })
}

/// `struct sched_attr` in its first version (linux/sched/types.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Scheduling {
    size: u32,
    /// `SCHED_OTHER` and the like.
    pub policy: u32,
    /// `SCHED_FLAG_RESET_ON_FORK` and the like.
    pub flags: u64,
    /// Of the ordinary policies.
    pub nice: i32,
    /// Of the real-time policies.
    pub priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// How this process is scheduled (`sched_getattr(2)`).
///
/// # Errors
/// As the call's.
pub fn scheduling() -> io::Result<Scheduling> {
    let mut attributes = Scheduling::default();
    let size = size_of::<Scheduling>();
    // SAFETY: the kernel writes at most `size` bytes to a structure of that size
    // of which every value is valid.
    let returned =
        unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    outcome(returned).map(|_| attributes)
}

/// Mode and nodes of the memory policy (`get_mempolicy(2)`).
///
/// # Errors
/// As the call's.
pub fn memory_policy() -> io::Result<(c_int, u64)> {
    let mut mode: c_int = 0;
    // Room for as many nodes as any kernel is built for (CONFIG_NODES_SHIFT 10).
    let mut nodes = [0_u64; 16];
    // SAFETY: the kernel writes an int and at most `bits` bits, both of which are there.
    let returned = unsafe {
        let bits = size_of_val(&nodes) * 8;
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            nodes.as_mut_ptr(),
            bits,
            0,
            0,
        )
    };
    outcome(returned).map(|_| (mode, nodes[0]))
}
