//! The connection to a file server: vhost-user, with us as the front end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use thiserror::Error;
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::bounce::Bounce;
use super::shadow_queue::{Broken, ShadowQueue};

/// Queues: requests that must not wait, and all others.
pub(super) const QUEUES: usize = 2;

/// What a file server must offer.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::REPLY_ACK;

/// Why a share has no file server any more. The pod cannot go on.
#[derive(Debug, Error)]
pub enum ServerFailed {
    /// It closed its socket.
    #[error("file server (virtiofsd) of share {share} ended; check its log")]
    Ended {
        /// The share's tag.
        share: String,
    },
    /// It does not speak vhost-user as it should.
    #[error("file server (virtiofsd) of share {share} cannot be set up; check its log")]
    SetUp {
        /// The share's tag.
        share: String,
        /// What went wrong.
        #[source]
        source: vhost::Error,
    },
    /// It lacks something.
    #[error(
        "file server of share {share} offers features {offered:#x}, but {FEATURES:#x} are needed; \
         use the virtiofsd that belongs to this release"
    )]
    Features {
        /// The share's tag.
        share: String,
        /// Its feature bits.
        offered: u64,
    },
    /// It returned what it was never given, or a reply that is none.
    #[error("file server (virtiofsd) of share {share} broke its protocol: {what}")]
    Protocol {
        /// The share's tag.
        share: String,
        /// In what way.
        what: String,
    },
    /// The host has no more of something.
    #[error("requests of share {share} cannot be passed on")]
    Host {
        /// The share's tag.
        share: String,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

/// Why the server is of no use any more, before it is told which share's.
#[derive(Debug)]
pub(super) enum Trouble {
    Ended,
    SetUp(vhost::Error),
    Features(u64),
    Protocol(String),
    Host(io::Error),
}

impl Trouble {
    pub(super) fn of_share(self, share: &str) -> ServerFailed {
        let share = share.to_owned();
        match self {
            Self::Ended => ServerFailed::Ended { share },
            Self::SetUp(source) => ServerFailed::SetUp { share, source },
            Self::Features(offered) => ServerFailed::Features { share, offered },
            Self::Protocol(what) => ServerFailed::Protocol { share, what },
            Self::Host(source) => ServerFailed::Host { share, source },
        }
    }
}

impl From<vhost::Error> for Trouble {
    fn from(error: vhost::Error) -> Self {
        use vhost::vhost_user::Error as Protocol;
        match error {
            vhost::Error::VhostUserProtocol(
                Protocol::Disconnected | Protocol::SocketBroken(_) | Protocol::PartialMessage,
            ) => Self::Ended,
            error => Self::SetUp(error),
        }
    }
}

impl From<Broken> for Trouble {
    fn from(broken: Broken) -> Self {
        Self::Protocol(broken.to_string())
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

pub(super) struct Server {
    front_end: Frontend,
    socket: UnixStream,
    pub(super) bounce: Bounce,
    pub(super) queues: [ShadowQueue; QUEUES],
    introduced: bool,
}

impl Server {
    /// Says nothing to the file server yet.
    pub(super) fn try_new(socket: UnixStream) -> io::Result<Self> {
        Ok(Self {
            front_end: Frontend::from_stream(socket.try_clone()?, QUEUES as u64),
            socket,
            bounce: Bounce::try_new()?,
            queues: [ShadowQueue::try_new(0)?, ShadowQueue::try_new(1)?],
            introduced: false,
        })
    }

    /// The socket, whose other end closes when the file server ends.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Starts the queues, empty.
    ///
    /// Waits for the file server's answers: only on the device's own thread.
    pub(super) fn start(&mut self) -> Result<(), Trouble> {
        if !self.introduced {
            self.introduce()?;
            self.introduced = true;
        }
        for (index, queue) in self.queues.iter_mut().enumerate() {
            queue.clear(self.bounce.memory())?;
            self.front_end.set_vring_num(index, ShadowQueue::size())?;
            self.front_end.set_vring_base(index, 0)?;
            self.front_end.set_vring_addr(index, &queue.config())?;
            self.front_end.set_vring_call(index, &queue.call)?;
            self.front_end.set_vring_kick(index, &queue.kick)?;
            self.front_end.set_vring_enable(index, true)?;
        }
        Ok(())
    }

    /// Stops the queues. Does not wait for requests: the caller has none.
    pub(super) fn stop(&mut self) -> Result<(), Trouble> {
        for index in 0..QUEUES {
            self.front_end.get_vring_base(index)?;
        }
        Ok(())
    }

    fn introduce(&mut self) -> Result<(), Trouble> {
        self.front_end.set_owner()?;
        let offered = self.front_end.get_features()?;
        if offered & FEATURES != FEATURES {
            return Err(Trouble::Features(offered));
        }
        self.front_end.set_features(FEATURES)?;
        let offered = self.front_end.get_protocol_features()?;
        self.front_end
            .set_protocol_features(offered & PROTOCOL_FEATURES)?;
        // From here on every message is confirmed, so that a refusal is
        // noticed where it happens.
        if offered.contains(PROTOCOL_FEATURES) {
            self.front_end
                .set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        self.front_end.set_mem_table(&[self.bounce.region()])?;
        Ok(())
    }
}
