//! The kernel interfaces that no crate wraps.
#![expect(
    unsafe_code,
    reason = "ioctl, adjtimex and waitid take pointers to structures, signal a function, and fork copies memory"
)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    sys::signal::{SigHandler, Signal, signal},
    unistd::ForkResult,
};

/// Bytes of one [`add_entropy`] call.
pub const ENTROPY_BYTES: usize = 64;

/// `struct rand_pool_info` of `linux/random.h` with its buffer.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    size_bytes: libc::c_int,
    buffer: [u8; ENTROPY_BYTES],
}

nix::ioctl_write_ptr!(rnd_add_entropy, b'R', 0x03, [libc::c_int; 2]);
nix::ioctl_none!(rnd_reseed, b'R', 0x07);

/// Mixes bytes into the kernel's generator, credits the first `used` of them, and
/// reseeds it (`RNDADDENTROPY`, `RNDRESEEDCRNG` of random(4)).
///
/// # Errors
/// When `random` is not `/dev/random`, or without `CAP_SYS_ADMIN`.
pub fn add_entropy(random: impl AsFd, seed: [u8; ENTROPY_BYTES], used: usize) -> io::Result<()> {
    let info = RandPoolInfo {
        entropy_bits: 8 * used.min(ENTROPY_BYTES) as libc::c_int,
        size_bytes: ENTROPY_BYTES as libc::c_int,
        buffer: seed,
    };
    let descriptor = random.as_fd().as_raw_fd();
    // SAFETY: the request's number encodes the two leading integers, as the
    // kernel's definition does; the kernel then reads `size_bytes` more, which
    // lie in the same structure, laid out by repr(C) and alive for the call.
    unsafe { rnd_add_entropy(descriptor, (&raw const info).cast()) }?;
    // SAFETY: takes no argument; the descriptor is open for the call.
    unsafe { rnd_reseed(descriptor) }?;
    Ok(())
}

/// Lets the kernel slew the wall clock by `offset_us`, at 500 parts in a
/// million (`ADJ_OFFSET_SINGLESHOT` of adjtimex(2)).
///
/// # Errors
/// Without `CAP_SYS_TIME`.
pub fn slew_clock(offset_us: i64) -> io::Result<()> {
    // SAFETY: timex is plain integers; all zeroes is a valid value.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    timex.modes = libc::ADJ_OFFSET_SINGLESHOT;
    timex.offset = offset_us;
    // SAFETY: points to a timex that lives for the call.
    if unsafe { libc::adjtimex(&raw mut timex) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Brings an interface of the calling thread's network namespace up
/// (`SIOCSIFFLAGS` of netdevice(7)).
///
/// # Errors
/// When there is no such interface, or without `CAP_NET_ADMIN`.
pub fn set_interface_up(name: &str) -> io::Result<()> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is a byte array and a union of plain values; all zeroes is
    // a valid value, and leaves the name terminated.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    if name.len() > room {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the kernel reads and writes one ifreq, which lives for the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFFLAGS has just filled this member of the union.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: as for SIOCGIFFLAGS.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A child that ended, as the kernel tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndedChild {
    /// Its pid, free for another process now.
    pub pid: i32,
    /// `CLD_EXITED`, `CLD_KILLED` or `CLD_DUMPED`.
    pub code: i32,
    /// What it returned, or the signal that ended it.
    pub status: i32,
}

/// Reaps one child that has ended; `None` when there are children and none has.
/// Not by nix, whose signals are an enum without the real-time ones: it answers
/// EINVAL for a child that one has killed, and the child is reaped and lost.
///
/// # Errors
/// ECHILD when there is no child.
pub fn reap_child() -> io::Result<Option<EndedChild>> {
    // SAFETY: siginfo is plain integers and addresses; all zeroes is valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one siginfo, which lives for the call.
    let result =
        unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, libc::WEXITED | libc::WNOHANG) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: waitid(2) fills these members of the union, and leaves the zeroes
    // of ours when no child has ended.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok((pid != 0).then_some(EndedChild {
        pid,
        code: info.si_code,
        status,
    }))
}

/// Has the kernel forget every child of this process as it ends.
///
/// # Errors
/// None that is known.
pub fn forget_children() -> nix::Result<()> {
    // SAFETY: an ignored signal runs no code of ours.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.map(drop)
}
/// Another process with a copy of this one's memory, which must have one thread. Returns
/// its pid, and `None` in it.
///
/// # Errors
/// What the kernel refused.
pub fn fork() -> nix::Result<Option<i32>> {
    // SAFETY: with one thread, the copy holds no lock of another's.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child.as_raw())),
        ForkResult::Child => Ok(None),
    }
}
