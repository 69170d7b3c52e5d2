//! Where ours is meant to differ from runc's shim.

use crate::compare::Declared;

/// Each difference with its reason.
pub const DECLARED: &[Declared] = &[];

/// Scenarios in which runc's shim itself does not do what is asked of ours,
/// each with what is wrong.
pub const EXCUSED: &[(&str, &str)] = &[];
