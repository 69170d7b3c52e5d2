//! The host's end: a descriptor that takes and gives one frame at a time, from
//! and to guest memory.
#![expect(
    unsafe_code,
    reason = "ioctls of the tap, and vectors of guest memory, which no Rust reference may point to"
)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{
    IFF_NAPI_FRAGS, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUNGETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ,
    c_int, c_ulong, iovec,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_memory::VolatileSlice;

use super::NetError;
use super::header::HEADER_BYTES;

/// Prepares a tap for a driver: length of the header, and `TUN_F_*` of what may
/// be left undone in frames for it.
type SetUp = fn(BorrowedFd<'_>, offloads: u32) -> io::Result<()>;

/// The tap, with a header of [`HEADER_BYTES`] before each frame.
pub(super) struct Tap {
    fd: OwnedFd,
    set_up: SetUp,
}

impl Tap {
    /// Checks that it is one, so that whatever it says later is about frames.
    pub(super) fn try_new(fd: OwnedFd) -> Result<Self, NetError> {
        let flags = interface_flags(fd.as_fd()).map_err(NetError::NotAttached)?;
        let needed = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if flags & (needed | IFF_NAPI_FRAGS) != needed {
            return Err(NetError::Flags { flags });
        }
        Self::try_with(fd, set_up).map_err(NetError::Blocking)
    }

    /// A socket that keeps packets apart, in place of a tap.
    #[cfg(any(test, feature = "stepped"))]
    pub(super) fn of_socket(fd: OwnedFd) -> io::Result<Self> {
        Self::try_with(fd, |_, _| Ok(()))
    }

    fn try_with(fd: OwnedFd, set_up: SetUp) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { fd, set_up })
    }

    /// Does what a driver's features ask for.
    pub(super) fn set_up(&self, offloads: u32) -> io::Result<()> {
        (self.set_up)(self.fd.as_fd(), offloads)
    }

    /// Takes one frame from the pieces, header first.
    pub(super) fn write(&self, frame: &Pieces<'_>) -> io::Result<()> {
        let (vectors, count) = (frame.vectors.as_ptr(), frame.vectors.len() as c_int);
        // SAFETY: `vectors` points to `count` initialised vectors, each of which names memory that
        // `frame` borrows, host memory exclusively; the kernel only reads it. That the guest may
        // write to its part meanwhile is the kernel's business, which copies it before it looks.
        uninterrupted(|| unsafe { libc::writev(self.fd.as_raw_fd(), vectors, count) }).map(drop)
    }

    /// Fills the pieces with the next frame, header first. Returns its length,
    /// or all that there is room for when it is longer. 0 when there will be no
    /// more.
    pub(super) fn read(&self, room: &mut Pieces<'_>) -> io::Result<usize> {
        let (vectors, count) = (room.vectors.as_ptr(), room.vectors.len() as c_int);
        // SAFETY: `vectors` points to `count` initialised vectors, each of which names writable
        // memory that `room` borrows: host memory exclusively, guest memory as volatile slices, so
        // that no Rust reference to it exists. The kernel writes no more than their lengths.
        uninterrupted(|| unsafe { libc::readv(self.fd.as_raw_fd(), vectors, count) })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn uninterrupted(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(bytes) = usize::try_from(call()) {
            return Ok(bytes);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn interface_flags(fd: BorrowedFd<'_>) -> io::Result<c_int> {
    // SAFETY: all zeros are a valid `ifreq`: plain numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: `TUNGETIFF` writes one `ifreq`, to a live one of ours. On a descriptor of another
    // kind no driver knows the number.
    if unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `TUNGETIFF` has filled this member of the union; any bits are a number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    // Not negative, although the highest bit is in use.
    Ok(c_int::from(flags.cast_unsigned()))
}

fn set_up(fd: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    let header_bytes = HEADER_BYTES as c_int;
    // SAFETY: `TUNSETVNETHDRSZ` reads one int, from a live one of ours.
    if unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const header_bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the argument of `TUNSETOFFLOAD` is a number.
    if unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, c_ulong::from(offloads)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Memory that one frame is scattered over, in order.
#[derive(Default)]
pub(super) struct Pieces<'m> {
    vectors: Vec<iovec>,
    bytes: usize,
    memory: PhantomData<(VolatileSlice<'m>, &'m mut [u8])>,
}

impl<'m> Pieces<'m> {
    /// Most that one system call takes (`UIO_MAXIOV` of Linux).
    pub(super) const MAX: usize = 1024;

    /// Bytes in them.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds guest memory. False when there is room for only one more, which is
    /// then left out: that is for [`push_own`](Self::push_own).
    pub(super) fn push(&mut self, slice: &VolatileSlice<'m>) -> bool {
        let fits = self.vectors.len() + 1 < Self::MAX;
        if fits {
            self.add(slice.ptr_guard_mut().as_ptr(), slice.len());
        }
        fits
    }

    /// Adds memory of this process: once.
    pub(super) fn push_own(&mut self, bytes: &'m mut [u8]) {
        self.add(bytes.as_mut_ptr(), bytes.len());
    }

    fn add(&mut self, address: *mut u8, length: usize) {
        self.vectors.push(iovec {
            iov_base: address.cast(),
            iov_len: length,
        });
        self.bytes += length;
    }
}
