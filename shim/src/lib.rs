//! The containerd shim: the task services of one pod.
//!
//! `containerd-shim-bulkhead-v2 start` finds or makes the pod's server
//! ([`bootstrap`]); the server ([`server`]) answers containerd ([`service`]),
//! keeps each task's life ([`task`]), tells containerd of it ([`events`]),
//! carries its standard streams ([`stdio`]) and runs the pod ([`pod`]): the VM
//! through [`host`], the containers in it through the agent.

pub mod args;
pub mod bootstrap;
pub mod delete;
pub mod events;
pub mod features;
pub mod host;
pub mod log;
pub mod pod;
mod readiness;
pub mod server;
pub mod service;
pub mod spec;
pub mod stdio;
pub mod task;
