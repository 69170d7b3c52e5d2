//! What the shim does on the host: the pod's directory, cgroup, user ids,
//! share and network namespace, the jailed processes, and the way back from
//! all of it.
//!
//! [`pod::HostPod`] puts the parts together and writes down each step before
//! it is taken, so that [`cleanup::cleanup`] can undo whatever a killed shim
//! leaves behind. Everything here blocks and is meant to be called from
//! `spawn_blocking`; what can be awaited is handed out as a descriptor that
//! `AsyncFd` takes (pidfds, the monitor's control socket).

pub mod apparmor;
pub mod cgroup;
pub mod children;
pub mod cleanup;
pub mod deadline;
pub mod directory;
pub mod hooks;
pub mod id_maps;
pub mod install;
pub mod jail;
pub mod loopback;
mod mount_attributes;
mod mount_table;
pub mod mounts;
pub mod netns;
pub mod network;
pub mod overlay_options;
pub mod pod;
pub mod record;
pub mod share;
pub mod source;
pub mod stand_in;
pub mod uid;
pub mod vm;
pub mod volumes;
