//! The targets, each a module with a function `run`.

pub mod agent_spec;
pub mod agent_stream;
pub mod control;
pub mod fs_handshake;
pub mod fs_relay;
pub mod legacy;
pub mod mmio;
pub mod net;
pub mod ramoops;
pub mod saved_state;
pub mod shim_answers;
pub mod shim_spec;
pub mod shim_start;
pub mod vsock;
