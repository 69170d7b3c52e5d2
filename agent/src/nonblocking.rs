//! Pipes and pseudo terminals as asynchronous streams.
#![expect(unsafe_code, reason = "registering a descriptor with the event loop")]

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll, ready},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};

/// A pipe or pseudo terminal as an asynchronous stream.
pub struct NonBlocking(AsyncFd<File>);

impl NonBlocking {
    /// Makes the descriptor non-blocking and watches it.
    ///
    /// # Errors
    /// When it is neither a pipe nor a terminal, or watches run out; the
    /// descriptor comes back with the error.
    pub fn try_new(end: OwnedFd) -> Result<Self, (OwnedFd, io::Error)> {
        if let Err(errno) = set_nonblocking(&end) {
            return Err((end, errno.into()));
        }
        // SAFETY: the descriptor must stay open and the same while registered.
        // A File keeps its descriptor until it is dropped, this type hands out
        // no way to replace it, and into_inner deregisters it first.
        let registered = unsafe { AsyncFd::register(File::from(end)) };
        registered.map(Self).map_err(|error| {
            let (file, cause) = error.into_parts();
            (file.into(), cause)
        })
    }

    /// The descriptor, no longer watched; it stays non-blocking.
    pub fn into_inner(self) -> OwnedFd {
        self.0.into_inner().into()
    }
}

fn set_nonblocking(end: &OwnedFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(end, FcntlArg::F_GETFL)?);
    fcntl(end, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

impl AsyncRead for NonBlocking {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            match guard.try_io(|file| file.get_ref().read(unfilled)) {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                // A pseudo terminal whose last slave has closed.
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::EIO as i32) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for NonBlocking {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            if let Ok(result) = guard.try_io(|file| file.get_ref().write(bytes)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
