//! Container creation inside the guest.
//!
//! The caller is the agent, PID 1 of the guest and multi-threaded. A container
//! is therefore made by the agent's own binary, executed again as a
//! single-threaded *helper* ([`HELPER_ARGUMENT`], [`helper_main`]). The helper
//! joins the container's cgroup, clones the container's *init* into new
//! namespaces as its own sibling (so that the init is the agent's child) and
//! ends. The init builds the root file system, reports and waits; on
//! [`Process::start`] it executes the user's program.
//!
//! An exec ([`Container::exec`]) is made the same way, in the namespaces of a
//! running init instead of new ones.
//!
//! Nothing here waits for a child process: the caller reaps every process of
//! the guest, the helper and each init included. Results travel over a socket,
//! on which end of file means that the other side is gone.
//!
//! What a specification may ask for is decided before anything is made
//! ([`parse`], [`validate`]); what is not supported is refused by name.

mod apparmor;
mod cgroup;
mod container;
mod control;
mod create;
mod credentials;
mod exec;
mod execution_domain;
mod helper;
mod hooks;
mod init;
mod joined;
mod kernel_calls;
mod launch;
pub mod mountinfo;
mod namespaces;
mod outside;
mod process;
mod program;
mod rootfs;
mod scheduling;
mod seccomp;
mod setup;
mod spec_support;
mod sysctl;
mod terminal;
mod user_namespace;

pub use cgroup::{CgroupError, DeviceFigures, Figures, HugePages, Keyed, Pressure, Waiting};
pub use container::{Container, UpdateError};
pub use create::{CreateError, CreateOptions, create};
pub use exec::ExecError;
pub use helper::helper_main;
pub use launch::{ContainerStdio, LaunchError};
pub use process::{Process, ResizeError, SignalError, StartError};
pub use scheduling::SchedulingError;
pub use spec_support::{ParseError, Unsupported, parse, parse_process, parse_resources, validate};
pub use sysctl::{SysctlError, check as check_sysctl, set as set_sysctl};

/// First argument with which the agent's binary is executed as the helper. Its
/// `main` must compare `argv[1]` with this before it does anything else (no
/// thread, no descriptor) and then call [`helper_main`].
pub const HELPER_ARGUMENT: &str = "container-helper";
