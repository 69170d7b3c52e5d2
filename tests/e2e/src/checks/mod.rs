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
pub mod oci_matrix;
pub mod oci;
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
    ("terminal_of_nerdctl_run_follows_its_size", NOT_RUN),
    ("detached_terminal_logs_its_prompt", NOT_RUN),
    ("init_of_nerdctl_is_pid_1", NOT_RUN),
    ("stop_kills_what_ignores_it_with_137", NOT_RUN),
    ("restart_of_containerd_leaves_the_task_running", NOT_RUN),
];

const NOT_RUN: &str = "new: has not been run as a whole in a node yet";
    ("oci_fields_of_a_process_have_their_effect", UNTRIED),
    ("oci_user_namespace_works_on_the_hosts_files", UNTRIED),
    ("oci_start_container_hooks_run_in_the_guest", UNTRIED),
];

/// To be taken out of [`SKIPPED`] once each has passed, and failed with its field broken.
const UNTRIED: &str = "has not yet passed in a node";
