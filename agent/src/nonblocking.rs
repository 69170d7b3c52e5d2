//! Pipes, pseudo terminals and sockets that wait without a thread.
#![expect(unsafe_code, reason = "registering a descriptor with the event loop")]

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{Shutdown, shutdown},
        stat::{SFlag, fstat},
    },
};
use tokio::io::unix::AsyncFd;

/// Bytes that one [`splice`](NonBlocking::splice_to) moves at the most, so that
/// others get their turn.
const SPLICE_BYTES: usize = 256 * 1024;

/// A pipe, pseudo terminal or socket. One task may read while another writes.
#[derive(Debug)]
pub struct NonBlocking(AsyncFd<File>);

impl NonBlocking {
    /// Makes the descriptor non-blocking and watches it.
    ///
    /// # Errors
    /// When it is of another kind, or watches run out; the descriptor comes back
    /// with the error.
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

    /// Whether it is a pipe, which [`splice_to`](Self::splice_to) needs at one
    /// of its ends.
    pub fn is_pipe(&self) -> bool {
        let kind = |mode| SFlag::from_bits_truncate(mode) & SFlag::S_IFMT;
        fstat(self.0.get_ref()).is_ok_and(|stat| kind(stat.st_mode) == SFlag::S_IFIFO)
    }

    /// Reads once; 0 is the end.
    ///
    /// # Errors
    /// Those of read(2). That the last slave of a terminal has closed is its end.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.0.readable().await?;
            match guard.try_io(|file| file.get_ref().read(buffer)) {
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::EIO as i32) => return Ok(0),
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    /// Those of [`read`](Self::read), and an end before the buffer's.
    pub async fn read_exact(&self, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read(&mut buffer[filled..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => filled += count,
            }
        }
        Ok(())
    }

    /// Writes once; how much it took.
    ///
    /// # Errors
    /// Those of write(2).
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.0.writable().await?;
            if let Ok(result) = guard.try_io(|file| file.get_ref().write(bytes)) {
                return result;
            }
        }
    }

    /// Tells the peer of a socket that nothing more comes.
    ///
    /// # Errors
    /// Those of shutdown(2).
    pub fn end_writing(&self) -> io::Result<()> {
        let socket = self.0.get_ref().as_raw_fd();
        Ok(shutdown(socket, Shutdown::Write)?)
    }

    /// Moves all bytes until the end into `to`; one of the two is a pipe. They
    /// stay in the kernel: what `to` does not take is still here afterwards, also
    /// when this is dropped half-way.
    ///
    /// # Errors
    /// Those of splice(2).
    pub async fn splice_to(&self, to: &Self) -> io::Result<()> {
        loop {
            let mut readable = self.0.readable().await?;
            match splice_once(self.0.get_ref(), to.0.get_ref()) {
                Ok(0) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                // One of the two is not ready, and the kernel does not say which.
                Err(Errno::EAGAIN) if is_ready(self.0.get_ref(), PollFlags::POLLIN)? => {
                    to.wait_for_room().await?;
                }
                Err(Errno::EAGAIN) => readable.clear_ready(),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    async fn wait_for_room(&self) -> io::Result<()> {
        loop {
            let mut writable = self.0.writable().await?;
            if is_ready(self.0.get_ref(), PollFlags::POLLOUT)? {
                return Ok(());
            }
            writable.clear_ready();
        }
    }
}

fn splice_once(from: &File, to: &File) -> nix::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    splice(from, None, to, None, SPLICE_BYTES, flags)
}

/// Without waiting. An end or an error counts: the next call will tell it.
fn is_ready(file: &File, events: PollFlags) -> nix::Result<bool> {
    let mut asked = [PollFd::new(file.as_fd(), events)];
    poll(&mut asked, PollTimeout::ZERO).map(|count| count > 0)
}

fn set_nonblocking(end: &OwnedFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(end, FcntlArg::F_GETFL)?);
    fcntl(end, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::pipe;
    use std::os::unix::net::UnixStream;

    fn watched(descriptor: impl Into<OwnedFd>) -> NonBlocking {
        NonBlocking::try_new(descriptor.into()).expect("is watched")
    }

    #[tokio::test]
    async fn splice_to_a_peer_that_is_slow_moves_everything() {
        let (reader, writer) = pipe().expect("pipe");
        let (to, mut peer) = UnixStream::pair().expect("socket pair");
        let sent: Vec<u8> = (0..3_000_000u32).map(|index| index as u8).collect();
        let expected = sent.clone();
        let writer = std::thread::spawn(move || File::from(writer).write_all(&sent));
        let reader_of_peer = std::thread::spawn(move || {
            let mut received = Vec::new();
            let mut buffer = vec![0; 10_000];
            while let Ok(count @ 1..) = peer.read(&mut buffer) {
                received.extend_from_slice(&buffer[..count]);
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
            received
        });
        let (from, to) = (watched(reader), watched(to));
        from.splice_to(&to).await.expect("moves");
        drop(to);
        assert!(reader_of_peer.join().expect("thread") == expected);
        writer.join().expect("thread").expect("writes");
    }

    #[tokio::test]
    async fn splice_to_drip_by_drip_never_sleeps_over_a_byte() {
        let (from, peer) = UnixStream::pair().expect("socket pair");
        let (reader, writer) = pipe().expect("pipe");
        let drips = std::thread::spawn(move || {
            let (mut peer, mut reader) = (peer, File::from(reader));
            for byte in 0..=255 {
                peer.write_all(&[byte]).expect("writes");
                let mut back = [0];
                reader.read_exact(&mut back).expect("reads");
                assert_eq!(back, [byte]);
            }
            drop(peer);
            assert_eq!(reader.read(&mut [0]).expect("reads"), 0);
        });
        let (from, to) = (watched(from), watched(writer));
        from.splice_to(&to).await.expect("moves");
        drop(to);
        drips.join().expect("thread");
    }

    #[test]
    fn is_pipe_tells_pipes_from_sockets() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .expect("runtime");
        let _inside = runtime.enter();
        let (reader, _writer) = pipe().expect("pipe");
        let (socket, _peer) = UnixStream::pair().expect("socket pair");
        assert!(watched(reader).is_pipe());
        assert!(!watched(socket).is_pipe());
    }
}
