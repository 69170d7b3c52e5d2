//! The contract between the shim on the host and the agent in the guest:
//! `proto/agent.proto`, the code generated from it, and the ports, paths and
//! stream header that both sides must agree on, and [`rtnetlink`], in whose words
//! the contract describes a network.

pub mod rtnetlink;
mod stream;

#[allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

/// Messages of the contract.
pub use generated::agent as api;
/// Client and server of the contract.
pub use generated::agent_ttrpc as service;
pub use stream::{
    MAX_STREAM_HEADER_BYTES, STREAM_ACCEPTED, STREAM_REFUSED, StreamHeaderError,
    decode_stream_header, encode_stream_header,
};

/// Version of the contract, as `Hello` agrees on it.
pub const PROTOCOL_VERSION: u32 = 1;
/// vsock port on which the agent serves ttrpc.
pub const AGENT_PORT: u32 = 1024;
/// vsock port on which the agent takes stdio streams.
pub const STREAM_PORT: u32 = 1025;
/// vsock port on which the agent takes connections to ports of the pod. The first
/// two bytes are the port, big-endian; the agent answers with one byte
/// ([`STREAM_ACCEPTED`] or [`STREAM_REFUSED`]) once it is connected, and the bytes of
/// both directions follow.
pub const FORWARD_PORT: u32 = 1026;
/// vsock port of the *host* to which the agent connects once when all of its
/// own ports listen. The monitor refuses the connection, as it refuses every
/// connection from a guest, and takes the attempt as the sign that the agent is
/// ready (`vmm_config::control::Event::GuestReady`).
pub const READY_PORT: u32 = 1024;

/// virtio-fs tag of the pod's share.
pub const SHARE_TAG: &str = "share";
/// Where the guest mounts the share. Below it, made by the host:
/// `containers/<container id>/rootfs` and `volumes/<number>`.
pub const SHARE_DIR: &str = "/run/bulkhead/share";
/// Where the guest keeps what the pod's containers share. Below it, made by the
/// agent: `ns/net`, `ns/ipc`, `ns/uts` (namespaces) and `shm` (a tmpfs); and what
/// follows.
pub const POD_DIR: &str = "/run/bulkhead/pod";
/// The user namespace of a pod that has one, for containers whose configuration names
/// it: their mappings are the pod's.
pub const POD_USER_NAMESPACE: &str = "/run/bulkhead/pod/ns/user";
/// The PID namespace of the pod, whose init is the agent's. Made for the first
/// container whose configuration names it.
pub const POD_PID_NAMESPACE: &str = "/run/bulkhead/pod/ns/pid";
/// A configuration that names `<container id>` below it has its container join
/// the PID namespace of that one, which must run.
pub const PID_NAMESPACES_DIR: &str = "/run/bulkhead/pod/ns/pid-of";

/// Below [`POD_DIR`]: where the guest mounts the shares of volumes whose servers
/// may not answer, each by its number in `CreatePodRequest.remote_share_tags`.
pub const REMOTE_DIR: &str = "/run/bulkhead/pod/remote";
