//! The disposable test host: a Debian 13 VM with containerd, CNI and the tools in it, in which everything of Bulkhead that
//! needs KVM is tried.
//!
//! ```no_run
//! use bulkhead_node::{Node, NodeCommand, NodeOptions};
//!
//! # fn main() -> Result<(), bulkhead_node::NodeError> {
//! let node = Node::up(NodeOptions::new("example").prefix("/tmp/prefix"))?;
//! let output = node.run(NodeCommand::new("ctr").args(["version"]))?;
//! assert!(output.status.success(), "{}", output.stderr_text());
//! node.down()?;
//! # Ok(())
//! # }
//! ```
//!
//! [`Node::up`] clones a snapshot of a booted node, which it builds when the cache does not have it (minutes, with progress on
//! standard error). A node ends when it is dropped or its process ends, by whatever cause; it fails the test when its
//! kernel complained on the console. `tests/node/README.md` tells what is in a node.

mod accel;
mod claim;
mod command;
pub mod console;
mod golden;
mod health;
mod image;
mod launcher;
mod network;
mod node;
mod qemu;
mod qmp;
mod rundir;
mod session;
mod starting;
mod transfer;

pub use accel::ProbeError;
pub use command::{NodeCommand, NodeStatus, Output, PATH, TIME_FACTOR_VARIABLE};
pub use golden::{Golden, GoldenError};
pub use image::{Base, Image, ImageError};
pub use network::NetworkError;
pub use node::{Node, NodeError, NodeOptions};
pub use node_agent::wire::WindowSize;
pub use qemu::{Mode, Qemu};
pub use qmp::QmpError;
pub use rundir::{RUN_VARIABLE, Record, RunDirError, running};
pub use session::{Process, ProcessInput, ProcessOutput, SessionError};
pub use transfer::TransferError;
