//! A queue in use, as a device sees it.

use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::{Chain, ChainError, Interrupt};

/// A queue in use.
///
/// Any error means that the driver broke the queue's protocol (virtio 1.2
/// section 2.7): the device tells it as a guest fault and goes idle.
pub struct ActiveQueue {
    /// Index of the queue in the device.
    pub index: u16,
    /// The queue; its addresses have been checked against guest memory.
    pub queue: Queue,
    /// Fires when the driver notifies this queue.
    pub notified: EventFd,
}

/// A queue that the driver broke.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The rings are out of their bounds.
    #[error("queue {queue} is broken")]
    Ring {
        /// Index of the queue.
        queue: u16,
        /// In what way.
        #[source]
        source: virtio_queue::Error,
    },
    /// A request is out of its bounds.
    #[error("request {head} in queue {queue} is malformed")]
    Chain {
        /// Index of the queue.
        queue: u16,
        /// Its first descriptor.
        head: u16,
        /// In what way.
        #[source]
        source: ChainError,
    },
}

impl ActiveQueue {
    /// Takes the next request, if there is one.
    ///
    /// # Errors
    /// When the available ring or the request is malformed.
    pub fn pop(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Chain>, QueueError> {
        let queue = self.index;
        let size = self.queue.size();
        let chain = self
            .queue
            .iter(memory)
            .map_err(|source| QueueError::Ring { queue, source })?
            .next();
        let Some(chain) = chain else {
            return Ok(None);
        };
        let head = chain.head_index();
        match Chain::read(chain, size) {
            Ok(chain) => Ok(Some(chain)),
            Err(source) => Err(QueueError::Chain {
                queue,
                head,
                source,
            }),
        }
    }

    /// Puts the request that was popped last back, as if it had not been
    /// taken. Only directly after [`pop`](Self::pop).
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a request back to the driver, with `written` bytes in its
    /// writable part.
    ///
    /// # Errors
    /// When `head` is not a descriptor of this queue, or the used ring cannot
    /// be written.
    pub fn complete(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.queue
            .add_used(memory, head, written)
            .map_err(|source| self.broken(source))
    }

    /// Tells the driver about completed requests, if it wants to know (section
    /// 2.7.7 and, with `VIRTIO_F_EVENT_IDX`, 2.7.7.2). To be called after each
    /// batch of [`complete`](Self::complete).
    ///
    /// # Errors
    /// When the rings cannot be read.
    pub fn signal(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
    ) -> Result<(), QueueError> {
        if self
            .queue
            .needs_notification(memory)
            .map_err(|source| self.broken(source))?
        {
            interrupt.used_buffers(self.index);
        }
        Ok(())
    }

    /// Asks the driver for notifications. True when requests are there already,
    /// for which none may come: go on popping.
    ///
    /// # Errors
    /// When the rings cannot be reached.
    pub fn listen(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(memory)
            .map_err(|source| self.broken(source))
    }

    fn broken(&self, source: virtio_queue::Error) -> QueueError {
        QueueError::Ring {
            queue: self.index,
            source,
        }
    }
}
