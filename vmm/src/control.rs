//! The control socket: packets of `vmm-config` messages, and the descriptors
//! that come with them.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockType, getsockopt, recvmsg, send, sockopt,
};
use thiserror::Error;
use vmm_config::FdIndex;
use vmm_config::control::{
    CONTROL_FD, DecodeError, Event, MAX_DESCRIPTORS, MAX_MESSAGE_BYTES, Request, decode, encode,
};

/// Trouble with the control socket.
#[derive(Debug, Error)]
pub enum ControlError {
    /// Not started by a launcher.
    #[error(
        "descriptor {CONTROL_FD} is not a control socket: bulkhead-vmm is started by the shim, with a Unix seqpacket socket there"
    )]
    NotInherited(#[source] io::Error),
    /// The socket failed.
    #[error("cannot receive from the control socket")]
    Receive(#[source] io::Error),
    /// More than fits.
    #[error(
        "control message with more than {MAX_MESSAGE_BYTES} bytes or {MAX_DESCRIPTORS} descriptors"
    )]
    Truncated,
    /// Not a message.
    #[error("control message is not understood")]
    Decode(#[source] DecodeError),
}

/// The monitor's end of the control socket.
pub struct Control(OwnedFd);

/// What came.
pub enum Received {
    /// A request with its descriptors.
    Request(Request, Descriptors),
    /// The launcher's end is closed.
    HangUp,
}

impl Control {
    /// Takes the socket that the launcher left at [`CONTROL_FD`]. To be called
    /// once, before the process opens anything.
    ///
    /// # Errors
    /// When there is no such socket.
    pub fn inherit() -> Result<Self, ControlError> {
        let socket = adopt_inherited(CONTROL_FD).map_err(ControlError::NotInherited)?;
        match getsockopt(&socket, sockopt::SockType) {
            Ok(SockType::SeqPacket) => Ok(Self(socket)),
            Ok(_) => Err(ControlError::NotInherited(Errno::EPROTOTYPE.into())),
            Err(errno) => Err(ControlError::NotInherited(errno.into())),
        }
    }

    /// Receives one request; blocks until there is one.
    ///
    /// # Errors
    /// When what comes is not a request. The socket goes on.
    pub fn receive(&self) -> Result<Received, ControlError> {
        // One byte more than any message, so that a longer one is noticed.
        let mut packet = vec![0; MAX_MESSAGE_BYTES + 1];
        let mut ancillary = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let mut buffers = [IoSliceMut::new(&mut packet)];
        let message = loop {
            match recvmsg::<()>(
                self.0.as_raw_fd(),
                &mut buffers,
                Some(&mut ancillary),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Ok(message) => break message,
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Ok(Received::HangUp),
                Err(errno) => return Err(ControlError::Receive(errno.into())),
            }
        };
        let flags = message.flags;
        let bytes = message.bytes;
        let descriptors = match message.cmsgs() {
            Ok(messages) => messages.flat_map(rights).collect(),
            Err(_) => Vec::new(),
        };
        let descriptors = Descriptors(descriptors);
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(ControlError::Truncated);
        }
        // No message is empty.
        if bytes == 0 {
            return Ok(Received::HangUp);
        }
        let request = decode(&packet[..bytes]).map_err(ControlError::Decode)?;
        Ok(Received::Request(request, descriptors))
    }

    /// Sends an event. A launcher that does not read, or that is gone, must not
    /// keep the VM: the event is lost then.
    pub fn send(&self, event: &Event) {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let _ = send(self.0.as_raw_fd(), &encode(event), flags);
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The descriptors of one message, each taken once.
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// How many came.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Takes the one that the configuration names.
    ///
    /// # Panics
    /// When it is not there: the configuration must have been validated with
    /// [`count`](Self::count).
    pub fn take(&mut self, FdIndex(index): FdIndex) -> OwnedFd {
        self.0
            .get_mut(index as usize)
            .and_then(Option::take)
            .expect("a validated configuration names each descriptor once")
    }
}

/// Owns an inherited descriptor, if it is open.
fn adopt_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    #![expect(
        unsafe_code,
        reason = "an inherited descriptor is known by number only"
    )]
    // SAFETY: borrowed only to ask whether it is open, which a closed one answers with an error.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(borrowed, FcntlArg::F_GETFD)?;
    // SAFETY: it is open, and nobody else in this process owns it: the launcher put it there for
    // this purpose, and `main` calls this once, before it opens anything.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Owns the descriptors of a control message.
fn rights(message: ControlMessageOwned) -> Vec<Option<OwnedFd>> {
    #![expect(unsafe_code, reason = "SCM_RIGHTS delivers descriptors by number only")]
    let ControlMessageOwned::ScmRights(fds) = message else {
        return Vec::new();
    };
    fds.into_iter()
        // SAFETY: the kernel has just made these for us, and nobody else knows them.
        .map(|fd| Some(unsafe { OwnedFd::from_raw_fd(fd) }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, ControlMessage, SockFlag, sendmsg, socketpair};
    use std::io::IoSlice;

    fn pair() -> (OwnedFd, Control) {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .expect("socketpair");
        (ours, Control(theirs))
    }

    fn send_packet(socket: &OwnedFd, packet: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(packet)],
            if fds.is_empty() { &[] } else { &rights },
            MsgFlags::empty(),
            None,
        )
        .expect("sent");
    }

    #[test]
    fn receive_request_with_descriptors_gives_both() {
        let (launcher, control) = pair();
        let fds = [launcher.as_raw_fd(); 3];
        send_packet(&launcher, &encode(&Request::Stop), &fds);
        let Ok(Received::Request(Request::Stop, mut descriptors)) = control.receive() else {
            panic!("the request did not arrive");
        };
        assert_eq!(descriptors.count(), 3);
        assert!(descriptors.take(FdIndex(2)).as_raw_fd() > 2);
    }

    #[test]
    fn receive_after_close_is_a_hang_up() {
        let (launcher, control) = pair();
        drop(launcher);
        assert!(matches!(control.receive(), Ok(Received::HangUp)));
    }

    #[test]
    fn receive_too_many_descriptors_is_refused() {
        let (launcher, control) = pair();
        let fds = [launcher.as_raw_fd(); MAX_DESCRIPTORS + 4];
        send_packet(&launcher, &encode(&Request::Stop), &fds);
        assert!(matches!(control.receive(), Err(ControlError::Truncated)));
    }

    #[test]
    fn receive_garbage_is_refused_and_the_next_request_arrives() {
        let (launcher, control) = pair();
        send_packet(&launcher, b"garbage", &[]);
        send_packet(&launcher, &encode(&Request::Stop), &[]);
        assert!(matches!(control.receive(), Err(ControlError::Decode(_))));
        assert!(matches!(
            control.receive(),
            Ok(Received::Request(Request::Stop, _))
        ));
    }

    #[test]
    fn send_to_a_launcher_that_is_gone_is_no_failure() {
        let (launcher, control) = pair();
        drop(launcher);
        control.send(&Event::GuestReady);
    }
}
