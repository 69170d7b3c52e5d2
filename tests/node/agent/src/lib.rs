//! The protocol between the node tool and the agent in the node, shared by both sides.
//!
//! One TCP connection carries one session. The tool speaks first, with [`Frame::Claim`] (once in a node's life) or
//! [`Frame::Hello`]; the agent answers [`Frame::Welcome`] or [`Frame::Refused`]. Then the tool sends [`Frame::Exec`], and stdin,
//! signals and window sizes for it; the agent sends what the command writes, and how it ends. A [`Frame::Ping`] is answered at
//! any time. When the tool closes the connection, the command's process group is killed.

pub mod credit;
pub mod wire;

pub use wire::Frame;

/// The version of the protocol. Tool and agent are built from one tree, so it only guards against a stale node.
pub const VERSION: u32 = 1;

/// Bytes of one stream that its sender may have under way before the receiver has used them up.
pub const WINDOW: u32 = 256 * 1024;

/// Bytes in one data frame.
pub const MAX_DATA: usize = 64 * 1024;
