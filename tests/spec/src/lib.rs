//! The container from inside: a matrix of OCI runtime configurations, a checker
//! that runs as a container's init and verifies each field of its own
//! configuration, and the comparison of two runtimes by what it reports.
//!
//! The checker (`spec-checker`) reads its configuration with no help of the
//! product's code, so that a mistake in the product's reading of a field is not
//! repeated here. The runner (`spec-matrix`) runs in a node.

pub mod base;
pub mod check;
pub mod judge;
pub mod kernel_calls;
pub mod known;
pub mod matrix;
pub mod random;
pub mod report;
pub mod variations;
