//! The checks, by what a user would notice.

pub mod apparmor;
pub mod compatibility;
pub mod containers;
pub mod control;
pub mod crictl;
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
pub mod pid_namespaces;
pub mod pods;
pub mod shim;
pub mod streams;
pub mod tenants;
pub mod terminals;
pub mod user_namespaces;
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
    oci_matrix::CHECKS,
    apparmor::CHECKS,
    jail::CHECKS,
    tenants::CHECKS,
    failures::CHECKS,
    examples::CHECKS,
    leftovers::CHECKS,
    compatibility::CHECKS,
    pods::CHECKS,
    crictl::CHECKS,
    pid_namespaces::CHECKS,
    user_namespaces::CHECKS,
    files::CHECKS,
    volumes::CHECKS,
    memory::CHECKS,
    streams::CHECKS,
];

/// Checks that `make soak` alone runs, each with its reason.
pub const FOR_SOAK: &[(&str, &str)] = &[
    (
        "output_rate_beside_runc",
        "a rate is measured on a machine that does nothing else",
    ),
    (
        "containers_find_every_oci_field_as_under_runc_or_as_is_known",
        "some seeds pack variations together that exclude each other, which fails the run",
    ),
    (
        "pod_survives_its_containers_and_a_restart_on_containerd_2_3",
        "between the versions that ordinary runs have, 1.7 and 2.4",
    ),
    (
        "pod_of_the_shims_sandboxer_survives_its_containers_and_a_restart_on_containerd_2_3",
        "ordinary runs have it on 2.4",
    ),
];
