//! The launcher's end of the monitor's control socket.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use vmm_config::control::{Event, MAX_DESCRIPTORS, MAX_MESSAGE_BYTES, Request, decode, encode};

use super::Error;

/// What the control socket had to say.
#[derive(Debug)]
pub enum Received {
    /// The monitor reports.
    Event(Event),
    /// Nothing yet: wait until [`super::Monitor::control`] is readable.
    Pending,
    /// The monitor closed its end: it is gone.
    Closed,
}

/// Our end of the socket, non-blocking.
#[derive(Debug)]
pub(super) struct Control(OwnedFd);

fn failed(operation: &'static str) -> impl FnOnce(Errno) -> Error {
    move |source| Error::Control {
        operation,
        source: source.into(),
    }
}

impl Control {
    /// Makes the pair; the second is the monitor's.
    pub(super) fn pair() -> Result<(Self, OwnedFd), Error> {
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let (ours, theirs) =
            socketpair(family, kind, SocketFlags::CLOEXEC, None).map_err(failed("make"))?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(failed("make"))?;
        Ok((Self(ours), theirs))
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Sends one request. The socket's buffer holds far more than the few that
    /// are ever sent, so that a full one means a monitor that does not read.
    pub(super) fn send(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let packet = encode(request);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(failed("pass descriptors over")(Errno::TOOBIG));
        }
        sendmsg(
            &self.0,
            &[IoSlice::new(&packet)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .map(drop)
        .map_err(failed("write to"))
    }

    /// Takes the next event without blocking. The monitor is not trusted:
    /// descriptors that it sends are closed by the kernel.
    pub(super) fn receive(&self) -> Result<Received, Error> {
        // One byte more than a message may have, to notice one that is longer.
        let mut packet = vec![0_u8; MAX_MESSAGE_BYTES + 1];
        let mut ancillary = RecvAncillaryBuffer::default();
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut packet)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match recvmsg(&self.0, &mut parts, &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) => return Ok(Received::Pending),
                Err(Errno::CONNRESET) | Ok(rustix::net::RecvMsg { bytes: 0, .. }) => {
                    return Ok(Received::Closed);
                }
                other => break other.map_err(failed("read from"))?.bytes,
            }
        };
        Ok(Received::Event(decode(&packet[..received])?))
    }

    /// The next event, or `Pending` once `timeout` has passed.
    pub(super) fn wait(&self, timeout: Duration) -> Result<Received, Error> {
        let end = std::time::Instant::now() + timeout;
        loop {
            match self.receive()? {
                Received::Pending => {}
                other => return Ok(other),
            }
            let left = end.saturating_duration_since(std::time::Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Ok(Received::Pending),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(failed("wait for")(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_config::control::Timings;

    #[test]
    fn receive_tells_events_silence_and_the_end_apart() {
        let (ours, theirs) = Control::pair().expect("makes");
        assert!(matches!(ours.receive(), Ok(Received::Pending)));
        let event = encode(&Event::Started(Timings::default()));
        rustix::net::send(&theirs, &event, SendFlags::empty()).expect("sends");
        let got = ours.wait(Duration::from_secs(5)).expect("receives");
        assert!(matches!(got, Received::Event(Event::Started(_))), "{got:?}");
        rustix::net::send(&theirs, b"nonsense", SendFlags::empty()).expect("sends");
        assert!(matches!(ours.receive(), Err(Error::Decode(_))));
        drop(theirs);
        assert!(matches!(ours.receive(), Ok(Received::Closed)));
    }

    #[test]
    fn send_passes_the_descriptors_in_order() {
        let (ours, theirs) = Control::pair().expect("makes");
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        let both = [read.as_fd(), write.as_fd()];
        ours.send(&Request::Stop, &both).expect("sends");
        let mut packet = [0_u8; 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut packet)];
        recvmsg(&theirs, parts, &mut ancillary, RecvFlags::empty()).expect("receives");
        let got: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                rustix::net::RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(got.len(), 2);
        rustix::io::write(&got[1], b"x").expect("the second is the write end");
        let mut byte = [0];
        assert_eq!(rustix::io::read(&read, &mut byte), Ok(1));
    }
}
