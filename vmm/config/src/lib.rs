//! What a VM is made of, and what its launcher and its monitor say to each
//! other: pure data, no I/O.
//!
//! [`VmConfig`] describes one VM, [`Network`] what it is given later. Their open files travel beside it as
//! descriptors (`SCM_RIGHTS`); the configuration names each by its
//! [`FdIndex`]. `validate` of each is the one place where bounds are
//! checked, on the monitor's side of the socket.
//!
//! [`control`] holds the messages of the monitor's control socket.
#![forbid(unsafe_code)]

pub mod control;
mod vm;

pub use vm::{
    Boot, ConfigError, Console, FdIndex, FileSystem, MAX_COMMAND_LINE_BYTES, MAX_FILE_SYSTEMS,
    MAX_MEMORY_MIB, MAX_TAG_BYTES, MAX_VCPUS, MIN_GUEST_CID, MIN_MEMORY_MIB, MIN_MTU, Memory,
    Network, Vcpus, VmConfig, Vsock,
};
