//! The checks, by what a user would notice.

pub mod compatibility;
pub mod containers;
pub mod examples;
pub mod failures;
pub mod files;
pub mod jail;
pub mod leftovers;
pub mod pods;

use anyhow::Result;

use crate::lab::Lab;

/// One check: its name, and what it does in a lab that others use after it.
pub type Check = (&'static str, fn(&Lab) -> Result<()>);

/// Every check; what could disturb the others comes last.
pub const ALL: &[&[Check]] = &[
    containers::CHECKS,
    jail::CHECKS,
    failures::CHECKS,
    examples::CHECKS,
    leftovers::CHECKS,
    compatibility::CHECKS,
    pods::CHECKS,
    files::CHECKS,
];

const FAILS: &str = "fails: a defect of ours or of the check, not yet found";
const UNSEEN: &str = "not yet seen to pass in a node";

/// Checks that an ordinary run leaves out, each with its reason; `make soak`
/// runs them.
pub const SKIPPED: &[(&str, &str)] = &[
    ("host_network_is_refused_by_name", FAILS),
    ("guest_panic_ends_with_255_and_a_last_line", FAILS),
    ("death_of_the_monitor_ends_with_255_and_a_last_line", FAILS),
    ("delete_killed_at_random_points_ends_clean", FAILS),
    ("killed_shim_leaves_nothing", FAILS),
    ("nerdctl_with_its_default_network_leaves_nothing", FAILS),
    ("hooks_run_on_the_host_in_their_order", UNSEEN),
    ("exit_code_on_containerd_1_7", UNSEEN),
    ("exit_code_on_containerd_2_3", UNSEEN),
    (
        "pod_survives_its_containers_and_a_restart_on_containerd_2_4",
        UNSEEN,
    ),
    (
        "pod_survives_its_containers_and_a_restart_on_containerd_2_3",
        UNSEEN,
    ),
    (
        "pod_survives_its_containers_and_a_restart_on_containerd_1_7",
        UNSEEN,
    ),
    ("small_files_read_back", UNSEEN),
    ("file_of_256_mib_reads_back", UNSEEN),
    ("links_renames_xattrs_holes_and_locks_work", UNSEEN),
    ("mmap_writes_survive_a_kill", UNSEEN),
];
