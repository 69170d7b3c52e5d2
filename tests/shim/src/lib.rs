//! Drives a containerd shim by itself: no containerd, but its part played as
//! the real one plays it. The same scenarios run against any shim, so that ours
//! is held to what runc's does in the same run.
//!
//! [`shim`] runs a shim's binary and speaks to it, [`events`] listens to what it
//! publishes, [`scenarios`] are what is tried, and [`compare`] holds two shims'
//! [`report`]s against each other.

pub mod bundle;
pub mod client;
pub mod compare;
pub mod declared;
pub mod events;
pub mod process;
pub mod report;
pub mod scenarios;
pub mod shim;
pub mod start;
pub mod streams;
