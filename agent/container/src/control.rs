//! The socket between the creator and the helper, later the new process.
//!
//! Messages are JSON, one per packet of a `SOCK_SEQPACKET` pair, with
//! descriptors beside them. End of file means that the other side has ended or
//! has executed the user's program.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use oci_spec::runtime::{Linux, Process};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest message; only an error's text could reach it, and is cut.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;
/// Most descriptors in one message.
const MAX_DESCRIPTORS: usize = 8;
/// Longest error text. A character takes at most six bytes as JSON (`\u0000`).
const MAX_ERROR_CHARACTERS: usize = 8 * 1024;

/// From the creator to the helper, once. Comes with the descriptors that it
/// names, in that order, then three for the process's standard streams unless
/// there is a terminal.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Make a container. With the specification in a memfd and the cgroup's directory.
    Create {
        id: String,
        bundle: PathBuf,
        share_dir: PathBuf,
        pod_dir: PathBuf,
        terminal: bool,
    },
    /// Make a process in a container. With an [`ExecSpec`] in a memfd, the
    /// init's pidfd, and `cgroup.procs`, open for writing, of the container's
    /// cgroup and of the one that the init is in.
    Exec { terminal: bool },
}

/// What an exec needs of the container's specification and its own.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecSpec {
    pub process: Process,
    /// The container's.
    pub linux: Option<Linux>,
}

/// From the creator to the waiting process.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// Execute the user's program.
    Start,
}

/// From helper and process to the creator.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The process exists; comes with its pidfd.
    Cloned { pid: i32 },
    /// Comes with the master of the terminal.
    Console,
    /// The process waits for [`Command::Start`].
    Ready { warnings: Vec<String> },
    /// The last message: what failed, with its causes.
    Failed { message: String },
}

impl Report {
    /// The last message, made of an error and its chain of causes.
    pub fn failed(error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message.push_str(": ");
            message.push_str(&error.to_string());
            cause = error.source();
        }
        Self::Failed {
            message: message.chars().take(MAX_ERROR_CHARACTERS).collect(),
        }
    }
}

/// Why a message was not exchanged.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("cannot make the socket to the helper")]
    Pair(#[source] Errno),
    #[error("cannot send to the other side of the creation")]
    Send(#[source] Errno),
    #[error("cannot receive from the other side of the creation")]
    Receive(#[source] Errno),
    #[error("malformed message during the creation")]
    Malformed(#[source] serde_json::Error),
    #[error("message of more than {MAX_MESSAGE_BYTES} bytes or {MAX_DESCRIPTORS} descriptors")]
    TooLong,
}

/// One end of the socket.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Both ends; neither is inherited by an executed program.
    pub fn pair() -> Result<(Self, OwnedFd), ChannelError> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(ChannelError::Pair)?;
        Ok((Self(ours), theirs))
    }

    pub fn from_socket(socket: OwnedFd) -> Self {
        Self(socket)
    }

    pub fn send<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Malformed)?;
        if bytes.len() > MAX_MESSAGE_BYTES || descriptors.len() > MAX_DESCRIPTORS {
            return Err(ChannelError::TooLong);
        }
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        loop {
            match sendmsg::<()>(
                self.0.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Err(Errno::EINTR) => {}
                result => return result.map(drop).map_err(ChannelError::Send),
            }
        }
    }

    /// The next message, or `None` at the end. Blocks.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        let mut bytes = vec![0; MAX_MESSAGE_BYTES];
        let mut control = nix::cmsg_space!([std::os::fd::RawFd; MAX_DESCRIPTORS]);
        let (len, descriptors) = loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            match recvmsg::<()>(
                self.0.as_raw_fd(),
                &mut parts,
                Some(&mut control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Ok(received) => {
                    let mut descriptors = Vec::new();
                    for message in received.cmsgs().map_err(ChannelError::Receive)? {
                        if let ControlMessageOwned::ScmRights(raw) = message {
                            descriptors.extend(raw.into_iter().map(adopt));
                        }
                    }
                    if received
                        .flags
                        .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC)
                    {
                        return Err(ChannelError::TooLong);
                    }
                    break (received.bytes, descriptors);
                }
                Err(Errno::EINTR) => {}
                // The other side ended with a message of ours unread.
                Err(Errno::ECONNRESET) => return Ok(None),
                Err(errno) => return Err(ChannelError::Receive(errno)),
            }
        };
        if len == 0 {
            return Ok(None);
        }
        let message = serde_json::from_slice(&bytes[..len]).map_err(ChannelError::Malformed)?;
        Ok(Some((message, descriptors)))
    }
}

#[expect(
    unsafe_code,
    reason = "descriptors that the kernel installed for a message"
)]
fn adopt(descriptor: std::os::fd::RawFd) -> OwnedFd {
    // SAFETY: SCM_RIGHTS installed it for this message, which is read once.
    unsafe { crate::kernel_calls::take_descriptor(descriptor) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn channel_message_with_descriptor_arrives_with_a_working_one() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::from_socket(theirs);
        let (reader, writer) = nix::unistd::pipe().unwrap();
        ours.send(&Report::Cloned { pid: 7 }, &[writer.as_fd()])
            .unwrap();
        drop((ours, writer));
        let (report, mut descriptors) = theirs.receive::<Report>().unwrap().unwrap();
        assert!(matches!(report, Report::Cloned { pid: 7 }));
        File::from(descriptors.remove(0)).write_all(b"x").unwrap();
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        assert!(theirs.receive::<Report>().unwrap().is_none());
    }

    #[test]
    fn channel_longest_error_is_cut_and_still_arrives() {
        let (ours, theirs) = Channel::pair().unwrap();
        let long = std::io::Error::other("\u{1}".repeat(1_000_000));
        ours.send(&Report::failed(&long), &[]).unwrap();
        let theirs = Channel::from_socket(theirs);
        let Some((Report::Failed { message }, _)) = theirs.receive().unwrap() else {
            panic!("no failure arrived");
        };
        assert_eq!(message.len(), MAX_ERROR_CHARACTERS);
    }
}
