//! Talking to the kernel about links, addresses, routes, neighbours and rules.
//!
//! Shim and agent speak to their kernels in the same words, and the shim passes
//! on to the agent what its own kernel said ([`SetNetworkRequest`]): nothing is
//! lost by being described anew, and what a kernel learns to say needs no change
//! of the contract.
//!
//! [`SetNetworkRequest`]: crate::api::SetNetworkRequest

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use thiserror::Error;

/// Flag of a dump during which the tables changed (`NLM_F_DUMP_INTR`).
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Dumps that are begun anew before one with gaps is taken for an error: a
/// table that changes all the time is not ours to wait for.
const DUMP_ATTEMPTS: usize = 10;
/// Messages begin at multiples of this (`NLMSG_ALIGNTO`).
const ALIGNMENT: usize = 4;

/// Why the kernel did not do what it was asked.
#[derive(Debug, Error)]
pub enum Error {
    /// No socket, or it failed.
    #[error("{operation} the route netlink socket")]
    Socket {
        /// As in "read from".
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused.
    #[error(transparent)]
    Refused(io::Error),
    /// What came is no message.
    #[error("the kernel's netlink answer is malformed: {reason}")]
    Malformed {
        /// In what way.
        reason: String,
    },
    /// The tables did not hold still.
    #[error("the network's tables changed during each of {DUMP_ATTEMPTS} attempts to read them")]
    Unsteady,
}

impl Error {
    /// What the kernel said, if it refused.
    pub fn refusal(&self) -> Option<i32> {
        match self {
            Self::Refused(source) => source.raw_os_error(),
            Self::Socket { .. } | Self::Malformed { .. } | Self::Unsteady => None,
        }
    }
}

fn failed(operation: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Socket { operation, source }
}

/// A blocking socket to the kernel's routing tables, of the network namespace in
/// which it was opened, whatever thread uses it.
pub struct Rtnetlink {
    socket: Socket,
    sequence: u32,
}

impl Rtnetlink {
    /// Opens it in the calling thread's network namespace.
    ///
    /// # Errors
    /// Without descriptors left.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed("open"))?;
        socket.bind_auto().map_err(failed("bind"))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Hears of every change of these multicast groups (`RTNLGRP_*`) from now on.
    ///
    /// # Errors
    /// When there is no such group.
    pub fn subscribe(&self, groups: &[u32]) -> Result<(), Error> {
        for group in groups {
            let joined = self.socket.add_membership(*group);
            joined.map_err(failed("join a group of"))?;
        }
        Ok(())
    }

    /// Throws away what has come. For a socket that only tells that something
    /// has changed, and is non-blocking.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn discard_news(&self) -> Result<(), Error> {
        let mut buffer = Vec::with_capacity(1 << 16);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                // More happened than there was room for: news as well.
                Err(error) if error.raw_os_error() == Some(ENOBUFS) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(failed("read from")(error)),
            }
        }
    }

    /// From now on nothing waits in it.
    ///
    /// # Errors
    /// Never, for an open socket.
    pub fn set_nonblocking(&self) -> Result<(), Error> {
        self.socket.set_non_blocking(true).map_err(failed("set up"))
    }

    /// Asks for a change, and waits until it is made. `flags` are those besides
    /// `NLM_F_REQUEST` and `NLM_F_ACK`.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), Error> {
        let sequence = self.send(message, NLM_F_ACK | flags)?;
        self.answers(sequence, |_, _| ())
    }

    /// Asks for one object.
    ///
    /// # Errors
    /// What the kernel said, as when there is no such object.
    pub fn look_up(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let mut found = Vec::new();
        let sequence = self.send(message, NLM_F_ACK)?;
        self.answers(sequence, |answer, _| found.push(answer))?;
        Ok(found)
    }

    /// Asks for a whole table.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut table = Vec::new();
            let mut interrupted = false;
            let sequence = self.send(message.clone(), NLM_F_DUMP)?;
            self.answers(sequence, |answer, flags| {
                table.push(answer);
                interrupted |= flags & NLM_F_DUMP_INTR != 0;
            })?;
            if !interrupted {
                return Ok(table);
            }
        }
        Err(Error::Unsteady)
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<u32, Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        let sent = self.socket.send(&encode(message), 0);
        sent.map_err(failed("write to"))?;
        Ok(self.sequence)
    }

    /// Calls `take` with each answer and its flags, until the last has come.
    fn answers(
        &self,
        sequence: u32,
        mut take: impl FnMut(RouteNetlinkMessage, u16),
    ) -> Result<(), Error> {
        loop {
            let (datagram, _) = match self.socket.recv_from_full() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other.map_err(failed("read from"))?,
            };
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message = decode::<RouteNetlinkMessage>(rest)?;
                let length = (message.header.length as usize).next_multiple_of(ALIGNMENT);
                rest = rest.get(length..).unwrap_or_default();
                if message.header.sequence_number != sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => take(answer, message.header.flags),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(Error::Refused(error.to_io()));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(()),
                    _ => {}
                }
            }
        }
    }
}

impl AsFd for Rtnetlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The bytes of a message, its header's length and type made right.
pub fn encode(mut message: NetlinkMessage<RouteNetlinkMessage>) -> Vec<u8> {
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// The first message in these bytes.
///
/// # Errors
/// When there is none.
pub fn decode<T: NetlinkDeserializable>(bytes: &[u8]) -> Result<NetlinkMessage<T>, Error> {
    NetlinkMessage::deserialize(bytes).map_err(|error| Error::Malformed {
        reason: error.to_string(),
    })
}

/// `errno.h` of Linux, on every architecture that there is a KVM for.
const ENOBUFS: i32 = 105;
