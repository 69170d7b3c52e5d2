//! The checks, by what a user would notice.

pub mod compatibility;
pub mod containers;
pub mod control;
pub mod examples;
pub mod execs;
pub mod failures;
pub mod files;
pub mod jail;
pub mod leftovers;
pub mod memory;
pub mod nerdctl;
pub mod network;
pub mod oci;
pub mod oci_matrix;
pub mod pods;
pub mod shim;
pub mod streams;
pub mod terminals;
pub mod volumes;

use anyhow::Result;

use crate::lab::Lab;

/// One check: its name, and what it does in a lab that others use after it.
pub type Check = (&'static str, fn(&Lab) -> Result<()>);

/// Every check; what could disturb the others comes last.
pub const ALL: &[&[Check]] = &[
    containers::CHECKS,
    execs::CHECKS,
    control::CHECKS,
    nerdctl::CHECKS,
    network::CHECKS,
    terminals::CHECKS,
    shim::CHECKS,
    oci::CHECKS,
    jail::CHECKS,
    failures::CHECKS,
    examples::CHECKS,
    leftovers::CHECKS,
    compatibility::CHECKS,
    pods::CHECKS,
    files::CHECKS,
    volumes::CHECKS,
    memory::CHECKS,
    streams::CHECKS,
    oci_matrix::CHECKS,
];

/// Checks that an ordinary run leaves out, each with its reason; `make soak`
/// runs them.
pub const SKIPPED: &[(&str, &str)] = &[
    ("shim_by_itself_does_as_runcs", NOT_RUN),
    (
        "containers_find_every_oci_field_as_under_runc_or_as_is_known",
        NOT_RUN,
    ),
];

const NOT_RUN: &str = "new: has not been run as a whole in a node yet";
