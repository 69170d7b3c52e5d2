//! The messages of the monitor's control socket.
//!
//! The socket is a connected `AF_UNIX` `SOCK_SEQPACKET` pair that the launcher
//! makes; the monitor finds its end at descriptor [`CONTROL_FD`]. One packet is
//! one message: JSON of [`Versioned`], at most [`MAX_MESSAGE_BYTES`], with the
//! descriptors it names as `SCM_RIGHTS`. The launcher sends [`Request`]s, the
//! monitor [`Event`]s. It takes the requests one after the other, so that answers
//! come in their order. A request whose descriptors are not those that it names
//! is refused, and the descriptors are closed. When the launcher's end closes, the monitor ends the VM:
//! no VM outlives the shim that answers for it.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::vm::validate_descriptors;
use crate::{ConfigError, Network, VmConfig};

/// Version of these messages. A receiver refuses any other. It grows when a
/// message changes its meaning; messages that are added leave it as it is, since
/// shim and monitor are of one release.
pub const VERSION: u32 = 1;
/// Where the monitor finds its end of the control socket.
pub const CONTROL_FD: i32 = 3;
/// Longest message in bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;
/// Most descriptors with one message: below the kernel's `SCM_MAX_FD` (253).
pub const MAX_DESCRIPTORS: usize = 32;

/// A message with the version of its meaning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versioned<T> {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// The message.
    pub message: T,
}

/// What the launcher asks of the monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Boots the VM; the first request, and sent once. Answered by
    /// [`Event::Started`] or [`Event::Failed`].
    Boot(Box<VmConfig>),
    /// Gives the VM that runs one more network, in a free slot. One descriptor.
    /// Answered by [`Event::NetworkAdded`] or [`Event::NetworkRefused`]; the
    /// guest finds the device when it probes the slot again.
    AddNetwork(Network),
    /// Takes a network from the VM that runs, whether or not the guest has
    /// stopped to use it. Answered by [`Event::NetworkRemoved`] or
    /// [`Event::NetworkRefused`].
    RemoveNetwork {
        /// As in [`Event::NetworkAdded`].
        slot: u32,
    },
    /// Asks the guest to have this much memory in all. Answered by
    /// [`Event::MemoryRequested`] or [`Event::ResizeRefused`]; what the guest then has,
    /// [`Event::MemoryResized`] tells.
    ResizeMemory {
        /// In MiB, from what the VM had at the start to its most.
        size_mib: u32,
    },
    /// Makes vCPUs until there are so many, which the guest may then start. Those that
    /// are there stay. Answered by [`Event::VcpusResized`] or [`Event::ResizeRefused`].
    ResizeVcpus {
        /// 1 to the most that the VM was described with.
        count: u8,
    },
    /// Ends the VM at once, without asking the guest. Answered by
    /// [`Event::Exited`].
    Stop,
}

impl Request {
    /// Checks whatever has bounds, given how many descriptors came with the
    /// message. [`Stop`](Self::Stop) is obeyed whatever comes with it.
    ///
    /// # Errors
    /// See [`VmConfig::validate`] and [`Network::validate`].
    pub fn validate(&self, descriptors: usize) -> Result<(), ConfigError> {
        match self {
            Self::Boot(config) => config.validate(descriptors),
            Self::AddNetwork(network) => network.validate(descriptors),
            Self::RemoveNetwork { .. } | Self::ResizeMemory { .. } | Self::ResizeVcpus { .. } => {
                validate_descriptors([], descriptors)
            }
            Self::Stop => Ok(()),
        }
    }
}

/// What the monitor tells the launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The vCPUs run.
    Started(Timings),
    /// The guest's agent listens: connections to the guest now complete.
    GuestReady,
    /// The guest has one more network, as soon as it looks for it.
    NetworkAdded {
        /// The virtio slot that it is in, from 0: `_UID` of the guest's ACPI
        /// device.
        slot: u32,
    },
    /// The network is gone: nothing reads or writes its tap any more.
    NetworkRemoved {
        /// As in [`Event::NetworkAdded`]. Another device may come there.
        slot: u32,
    },
    /// A network could not be added or removed, and all is as it was before.
    NetworkRefused {
        /// The whole chain of causes, outermost first.
        error: String,
    },
    /// The guest was asked to have this much memory, and complies as it can.
    MemoryRequested {
        /// In MiB, rounded up to what the guest can have.
        size_mib: u32,
    },
    /// There are so many vCPUs, running or waiting for the guest to start them.
    VcpusResized {
        /// Not fewer than before.
        count: u8,
    },
    /// A resize could not be done. The memory is as it was before; of vCPUs, those that
    /// were made before the one that failed stay.
    ResizeRefused {
        /// The whole chain of causes, outermost first.
        error: String,
    },
    /// The guest has more memory than before, or less. Of changes in quick succession
    /// the last is told.
    MemoryResized {
        /// In MiB, in all.
        size_mib: u32,
    },
    /// The VM could not be made. The monitor exits.
    Failed {
        /// The whole chain of causes, outermost first.
        error: String,
    },
    /// The VM has ended. The monitor exits.
    Exited(Exit),
}

/// Where the time to the first guest instruction went, in microseconds of
/// `CLOCK_MONOTONIC` since the monitor's `main` began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timings {
    /// `KVM_CREATE_VM` was about to be called.
    pub create_vm_us: u64,
    /// The first `KVM_RUN` was about to be called.
    pub first_run_us: u64,
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exit {
    /// Why.
    pub reason: ExitReason,
    /// The last lines of the guest's kernel log, oldest first; empty when the
    /// guest ended in an orderly way or wrote none. If it says that the kernel
    /// panicked, the first line is the one with "Kernel panic - not syncing: "
    /// and the reason, and those that came after it follow, as far as there is
    /// room: the last may be missing, and what led to the panic is.
    pub guest_log: Vec<String>,
}

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset itself, and neither it nor its log says that it panicked.
    Reset,
    /// The guest's kernel panicked.
    GuestPanic,
    /// A vCPU met a fault while handling a fault.
    TripleFault,
    /// KVM could not go on with a vCPU.
    VcpuFailed {
        /// What KVM said.
        error: String,
    },
    /// A device lost what it needs on the host, such as its file server.
    DeviceFailed {
        /// Which device, as in "file system share".
        device: String,
        /// What happened, and what to check.
        error: String,
    },
    /// [`Request::Stop`], or the launcher's end of the socket closed.
    Stopped,
}

/// A packet that is not a message.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// Longer than any message.
    #[error("control message of {bytes} bytes: at most {MAX_MESSAGE_BYTES}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Not JSON, or not of this shape.
    #[error("control message cannot be read")]
    Malformed(#[source] serde_json::Error),
    /// Of another version.
    #[error(
        "control message of version {version}: this build speaks version {VERSION} only; install shim and monitor of one release"
    )]
    Version {
        /// As received.
        version: u32,
    },
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

/// Encodes a message for one packet.
///
/// # Panics
/// Never: these types have no state that JSON cannot express.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    #[derive(Serialize)]
    struct Borrowed<'a, T> {
        version: u32,
        message: &'a T,
    }
    serde_json::to_vec(&Borrowed {
        version: VERSION,
        message,
    })
    .expect("control messages hold only what JSON can express")
}

/// Decodes one packet.
///
/// # Errors
/// Too long, of another version, or malformed. The version is looked at first,
/// so that a mismatch is told as such and not as a malformed message.
pub fn decode<T: for<'de> Deserialize<'de>>(packet: &[u8]) -> Result<T, DecodeError> {
    if packet.len() > MAX_MESSAGE_BYTES {
        return Err(DecodeError::TooLong {
            bytes: packet.len(),
        });
    }
    let VersionOnly { version } = serde_json::from_slice(packet).map_err(DecodeError::Malformed)?;
    if version != VERSION {
        return Err(DecodeError::Version { version });
    }
    serde_json::from_slice::<Versioned<T>>(packet)
        .map(|versioned| versioned.message)
        .map_err(DecodeError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FdIndex;
    use proptest::prelude::*;

    #[test]
    fn decode_of_encode_is_the_message() {
        let event = Event::Exited(Exit {
            reason: ExitReason::DeviceFailed {
                device: "file system share".to_owned(),
                error: "server closed its socket".to_owned(),
            },
            guest_log: vec!["last line".to_owned()],
        });
        let decoded: Event = decode(&encode(&event)).expect("decodes");
        assert_eq!(decoded, event);
    }

    #[test]
    fn messages_of_a_vm_that_runs_are_written_as_documented() {
        let add = Request::AddNetwork(Network {
            mac: [2, 0, 0, 0, 0, 255],
            mtu: 1500,
            tap: FdIndex(0),
        });
        let json = br#"{"version":1,"message":{"add_network":{"mac":[2,0,0,0,0,255],"mtu":1500,"tap":0}}}"#;
        assert_eq!(encode(&add), json);
        assert_eq!(decode::<Request>(json).expect("decodes"), add);
        let resize = br#"{"version":1,"message":{"resize_memory":{"size_mib":584}}}"#;
        assert_eq!(encode(&Request::ResizeMemory { size_mib: 584 }), resize);
        let resize = br#"{"version":1,"message":{"resize_vcpus":{"count":3}}}"#;
        assert_eq!(encode(&Request::ResizeVcpus { count: 3 }), resize);
        let remove = br#"{"version":1,"message":{"remove_network":{"slot":3}}}"#;
        assert_eq!(encode(&Request::RemoveNetwork { slot: 3 }), remove);
        for (event, json) in [
            (
                Event::NetworkAdded { slot: 3 },
                r#"{"network_added":{"slot":3}}"#,
            ),
            (
                Event::NetworkRemoved { slot: 3 },
                r#"{"network_removed":{"slot":3}}"#,
            ),
            (
                Event::MemoryRequested { size_mib: 584 },
                r#"{"memory_requested":{"size_mib":584}}"#,
            ),
            (
                Event::VcpusResized { count: 3 },
                r#"{"vcpus_resized":{"count":3}}"#,
            ),
            (
                Event::MemoryResized { size_mib: 584 },
                r#"{"memory_resized":{"size_mib":584}}"#,
            ),
            (
                Event::ResizeRefused {
                    error: "no".to_owned(),
                },
                r#"{"resize_refused":{"error":"no"}}"#,
            ),
            (
                Event::NetworkRefused {
                    error: "no slot is left".to_owned(),
                },
                r#"{"network_refused":{"error":"no slot is left"}}"#,
            ),
        ] {
            let json = format!(r#"{{"version":1,"message":{json}}}"#);
            assert_eq!(String::from_utf8_lossy(&encode(&event)), json);
            assert_eq!(decode::<Event>(json.as_bytes()).expect("decodes"), event);
        }
    }

    #[test]
    fn validate_request_with_a_descriptor_that_it_does_not_name_is_refused() {
        let remove = Request::RemoveNetwork { slot: 3 };
        assert_eq!(remove.validate(0), Ok(()));
        let unused = ConfigError::UnusedDescriptor { count: 1, named: 0 };
        assert_eq!(remove.validate(1), Err(unused));
    }

    #[test]
    fn decode_other_version_names_the_version() {
        let packet = br#"{"version":2,"message":{"something":"new"}}"#;
        assert!(matches!(
            decode::<Request>(packet),
            Err(DecodeError::Version { version: 2 })
        ));
    }

    #[test]
    fn decode_unknown_request_is_malformed() {
        let packet = br#"{"version":1,"message":"reboot"}"#;
        assert!(matches!(
            decode::<Request>(packet),
            Err(DecodeError::Malformed(_))
        ));
    }

    proptest! {
        #[test]
        fn decode_any_bytes_never_panics(packet in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<Request>(&packet);
        }
    }
}
