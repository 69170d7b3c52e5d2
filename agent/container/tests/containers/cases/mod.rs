//! What a user of a container would notice.

mod attributes;
mod exec;
mod files;
mod lifecycle;
mod process;
mod resources;
mod user_namespaces;

use crate::fixture::Host;

type Case = fn(&Host);

pub const ALL: [(&str, Case); 57] = [
    ("run_exit_code_is_the_programs", process::run_exit_code),
    (
        "run_streams_connect_and_nothing_else_is_open",
        process::run_streams,
    ),
    (
        "run_namespaces_are_the_containers_own",
        process::run_namespaces,
    ),
    (
        "run_pid_namespace_by_path_is_shared",
        process::run_joined_pid_namespace,
    ),
    (
        "run_namespaces_by_path_are_the_pods",
        process::run_joined_namespaces,
    ),
    (
        "run_identity_limits_and_environment_have_their_effect",
        process::run_identity,
    ),
    (
        "run_unprivileged_user_has_no_capability_but_ambient",
        process::run_unprivileged,
    ),
    (
        "run_without_oom_score_does_not_inherit_the_agents",
        process::run_without_oom_score,
    ),
    (
        "run_program_is_one_that_the_user_may_execute",
        process::run_search,
    ),
    (
        "run_default_mounts_and_devices_are_there",
        files::run_default_files,
    ),
    (
        "run_protected_paths_cannot_be_used",
        files::run_protected_paths,
    ),
    (
        "run_readonly_root_keeps_mounts_writable",
        files::run_readonly_root,
    ),
    ("run_bind_mounts_have_their_flags", files::run_binds),
    (
        "run_recursive_readonly_reaches_submounts",
        files::run_recursive_readonly,
    ),
    ("run_hostile_links_stay_inside", files::run_hostile_links),
    (
        "run_escape_by_chroot_ends_at_the_containers_root",
        files::run_escape,
    ),
    (
        "run_seccomp_denies_and_newer_calls_get_enosys",
        process::run_seccomp,
    ),
    (
        "run_seccomp_without_no_new_privileges_works",
        process::run_seccomp_privileged,
    ),
    ("run_sysctl_is_the_namespaces", process::run_sysctl),
    ("run_cgroup_is_the_containers_root", resources::run_cgroup),
    (
        "run_cgroup_without_namespace_shows_its_own_part",
        resources::run_cgroup_bind,
    ),
    ("run_devices_follow_the_rules", resources::run_devices),
    (
        "run_privileged_leaves_out_devices_of_the_host",
        resources::run_privileged,
    ),
    (
        "run_terminal_is_controlling_and_sized",
        process::run_terminal,
    ),
    (
        "create_missing_program_says_so",
        lifecycle::create_missing_program,
    ),
    (
        "start_unusable_program_says_so",
        lifecycle::start_unusable_program,
    ),
    ("create_failures_leave_nothing", lifecycle::create_failures),
    (
        "create_taken_cgroup_is_left_alone",
        lifecycle::create_taken_cgroup,
    ),
    ("signal_reaches_init_and_all", lifecycle::signal_processes),
    (
        "start_that_hangs_holds_up_neither_signal_nor_delete",
        lifecycle::start_that_hangs,
    ),
    (
        "container_tells_its_root_and_bind_sources",
        lifecycle::container_binds,
    ),
    (
        "delete_kills_everything_and_is_idempotent",
        lifecycle::delete_everything,
    ),
    (
        "delete_never_started_leaves_nothing",
        lifecycle::delete_never_started,
    ),
    (
        "exec_is_in_the_containers_namespaces_and_cgroup",
        exec::exec_joins,
    ),
    (
        "exec_identity_is_its_own_or_the_containers",
        exec::exec_identity,
    ),
    (
        "exec_is_under_the_containers_seccomp_filter",
        exec::exec_seccomp,
    ),
    (
        "exec_terminal_is_controlling_sized_and_resized",
        exec::exec_terminal,
    ),
    (
        "exec_that_cannot_be_is_refused_and_leaves_nothing",
        exec::exec_refusals,
    ),
    (
        "exec_without_a_running_init_is_refused",
        exec::exec_needs_a_running_container,
    ),
    (
        "exec_ends_with_its_container",
        exec::exec_ends_with_its_container,
    ),
    (
        "pause_stops_all_that_runs_until_resume_or_kill",
        lifecycle::pause_and_resume,
    ),
    (
        "figures_are_told_until_the_deletion",
        resources::figures_until_deleted,
    ),
    (
        "update_replaces_device_rules_and_limits",
        resources::update_devices_and_limits,
    ),
    (
        "run_user_namespace_has_its_files_and_devices",
        user_namespaces::run_files,
    ),
    (
        "run_user_namespace_has_its_users_and_execs",
        user_namespaces::run_identity,
    ),
    (
        "run_user_namespace_has_terminals",
        user_namespaces::run_terminal,
    ),
    (
        "create_user_namespace_that_cannot_be_is_refused",
        user_namespaces::create_refusals,
    ),
    (
        "run_idmapped_mounts_show_mapped_ids",
        user_namespaces::run_idmapped_mounts,
    ),
    (
        "run_in_the_pods_user_namespace_is_privileged_over_the_pods_others",
        user_namespaces::run_in_the_pods,
    ),
    (
        "run_scheduler_and_io_priority_have_their_effect",
        attributes::run_scheduler,
    ),
    (
        "exec_scheduling_and_affinity_have_their_effect",
        attributes::exec_scheduling,
    ),
    (
        "run_personality_and_memory_policy_are_inherited",
        attributes::run_execution_domain,
    ),
    (
        "run_time_offsets_move_the_clocks",
        attributes::run_time_offsets,
    ),
    (
        "start_hooks_run_as_the_program_before_it",
        attributes::start_hooks,
    ),
    ("run_tmpfs_copies_up_and_keeps_the_mode", files::run_copy_up),
    ("run_remount_changes_what_is_there", files::run_remount),
    (
        "run_rootfs_propagation_is_as_asked_for",
        attributes::run_rootfs_propagation,
    ),
];
